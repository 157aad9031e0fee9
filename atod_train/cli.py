"""The command line: `atod-train PRESET [--section.setting value ..]`, `study FILE`, and others."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError, MissingExtraError
from atod_train.config import RunConfig, StudyConfig
from atod_train.presets import PRESETS

_DESCRIPTION = """Train a student with one or several methods from a preset's settings.

Other commands, each with --help: resume FOLDER (continue its runs), study FILE (the runs of a study
file), results FILE .. (tables of studies), doctor (what this machine can run), serve-teacher MODEL
(a teacher for students elsewhere); and --version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a preset; returns the exit code (2: a user's mistake, 130: stopped by Ctrl-C)."""
    # Warnings about hub tokens and parallel tokenizers say nothing to our users.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    if chosen[:1] in (["--version"], ["-V"]):
        print(f"atod-train {metadata.version('atod-gym')}")
        return 0
    try:
        if chosen[:1] == ["doctor"]:
            from atod_train import doctor

            return doctor.main(chosen[1:])
        if chosen[:1] == ["serve-teacher"]:
            from atod_train.teachers import server as serve_teacher

            return serve_teacher.main(chosen[1:])
        if chosen[:1] == ["results"]:
            from atod_train.studies import study_cli

            return study_cli.results(chosen[1:])
        import tyro  # noqa: F401 - whether it is there
    except ImportError as error:
        print(f"atod-train: {_missing(error)}", file=sys.stderr)
        return 2
    if chosen[:1] == ["study"]:
        from atod_train.studies import study_cli

        return _guarded("the same command", study_cli.study, chosen[1:], _parsed)
    if chosen[:1] == ["resume"]:
        return _guarded("the same command", _resume, chosen[1:])
    config = _parsed(chosen)
    preset = next((name for name in chosen if name in PRESETS), "run")
    out = Path(config.study.out or Path("runs") / preset)
    return _guarded("the same command with --study.resume", _run, config, out)


def _parsed(arguments: list[str]) -> RunConfig:
    """The settings of a command line that begins with a preset."""
    import tyro

    # tyro takes no keys but those of a default: a preset's options are added to what was given.
    configs = {
        name: (preset.summary, _with_options(preset.config, {})) for name, preset in PRESETS.items()
    }
    config: RunConfig = tyro.extras.overridable_config_cli(
        configs, prog="atod-train", description=_DESCRIPTION, args=arguments
    )
    own = next(PRESETS[name].config.env.options for name in arguments if name in PRESETS)
    config = _with_options(config, own | config.env.options)
    if any(argument.startswith("--start.epochs") for argument in arguments):
        return config
    return _loaded_models_stay(config)


def _loaded_models_stay(config: RunConfig) -> RunConfig:
    """The passes over demonstrations that a preset names are for models made from scratch."""
    from atod_train.models.policy import MODEL_SHAPES

    models = (config.model.student, config.model.teacher)
    student, teacher = (
        epochs if name in MODEL_SHAPES else 0.0
        for name, epochs in zip(models, config.start.epochs, strict=True)
    )
    return replace(config, start=replace(config.start, epochs=(student, teacher)))


def _with_options(config: RunConfig, options: dict[str, int | str]) -> RunConfig:
    return replace(config, env=replace(config.env, options=options))


def _resume(arguments: Sequence[str]) -> None:
    """Continue the runs of a folder with the settings that are kept there.

    Raises:
        AtodError: not one folder, or no run in it.
    """
    from atod_train.files import read_json
    from atod_train.reports.run_folder import CONFIG_FILE, read_config

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise AtodError(
            "resume takes one folder, such as `atod-train resume runs/quickstart`; all settings "
            "are those kept in it."
        )
    out = Path(arguments[0])
    if (out / CONFIG_FILE).is_file():  # of one run
        out = out.parent
    runs = sorted(out.glob(f"*/{CONFIG_FILE}"))
    if not runs:
        raise AtodError(
            f"{out} holds no run of atod-train ({CONFIG_FILE} in a folder for each run). The runs "
            "of a study file continue with `atod-train study FILE`."
        )
    config = read_config(runs[0].parent)
    # Runs that have not begun have no folder yet: the others name them.
    kept = read_json(runs[0]).get("study", {})
    study = StudyConfig(
        out=str(out),
        methods=tuple(kept.get("methods", ())),
        seeds=tuple(kept.get("seeds", ())),
        jobs=int(kept.get("jobs", 1)),
        resume=True,
    )
    _run(replace(config, study=study), out)


def _run(config: RunConfig, out: Path) -> None:
    from atod_train.distributed import is_main_process
    from atod_train.reports.results import results_of
    from atod_train.reports.run_summary import read_run
    from atod_train.reports.tables import all_tables, as_text
    from atod_train.studies.study import run_study

    report = run_study(config, out)
    if is_main_process():
        runs = [read_run(path.parent) for path in sorted(out.glob("*/config.json"))]
        print(as_text(all_tables(results_of(out.name, runs), by_split=True)))
        print(f"report: {report}")


def _guarded(again: str, work: Callable[..., None], *arguments: Any) -> int:
    """Runs something that trains, and ends the process where it trains with others."""
    from atod_train.distributed import end_process

    return end_process(_told(again, work, *arguments))


def _told(again: str, work: Callable[..., None], *arguments: Any) -> int:
    """Runs something that trains; what goes wrong is told in a line. `again`: what goes on."""
    import transformers

    from atod_train.training.trainer import StoppedByUser

    transformers.utils.logging.disable_progress_bar()
    try:
        work(*arguments)
    except StoppedByUser as stop:
        print(f"atod-train: {stop}; {again} goes on from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(
            f"atod-train: stopped at once; {again} goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 130
    except AtodError as error:
        print(f"atod-train: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"atod-train: error: {error}. {_advice(error)} What was saved is intact, and {again} "
            "continues from it.",
            file=sys.stderr,
        )
        return 2
    return 0


def _advice(error: OSError) -> str:
    """Return what a user can do about an error of the system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space or choose another folder."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a folder that you may write to."
    if isinstance(error, ConnectionError | TimeoutError):
        return "Check that the server is up and reachable."
    return "Check the file or device that is named."


def _missing(error: ImportError) -> MissingExtraError:
    package = (error.name or "").partition(".")[0]
    extra = "servers" if package in ("starlette", "uvicorn") else "train"
    return MissingExtraError(f"{package} is not installed: pip install 'atod-gym[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
