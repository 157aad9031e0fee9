"""The command line: `atod-train PRESET [--section.setting value ..]`, `study FILE`, and others."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import tyro

from atod_gym.errors import AtodError, MissingExtraError
from atod_train.config import SECTIONS, RunConfig
from atod_train.presets import PRESETS, keep_loaded_models, with_options

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
    except ImportError as error:
        print(f"atod-train: {_missing(error)}", file=sys.stderr)
        return 2
    if chosen[:1] == ["study"]:
        from atod_train.studies import study_cli

        return _guarded("the same command with --resume", study_cli.study, chosen[1:])
    if chosen[:1] == ["resume"]:
        return _guarded("the same command", _resume, chosen[1:])
    return _guarded("the same command with --resume", _start, chosen)


@dataclass(frozen=True)
class TrainCommand(RunConfig):
    """Make one run."""

    out: str = ""
    """Folder of the study; empty: runs/<preset>."""
    resume: bool = False
    """Continue runs that the folder holds; finished ones too, if train.steps is larger."""
    preset: tyro.conf.Suppress[str] = ""


@dataclass(frozen=True)
class QuickstartCommand(TrainCommand):
    """Make ATOD and OPD on the same start, teacher and tasks."""

    runs: tuple[str, ...] | None = None
    """Runs of the study to make: atod, opd."""
    seeds: tuple[int, ...] | None = None
    """Seeds to make each run with."""
    jobs: int | None = None
    """Runs at the same time, each in a process of its own. 2 by default."""


def _start(arguments: list[str]) -> None:
    """Make the runs of a preset."""
    from atod_train.studies.file import QUICKSTART, Selection, read_study, study_of
    from atod_train.studies.study import run_study

    command = _parsed(arguments)
    config = RunConfig(*(getattr(command, name) for name in SECTIONS))
    out = Path(command.out or Path("runs") / command.preset)
    if isinstance(command, QuickstartCommand):
        default = PRESETS["houses-tiny"].config
        for name, old, new in (
            ("algorithm.method", default.algorithm.method, config.algorithm.method),
            ("train.seed", default.train.seed, config.train.seed),
        ):
            if old != new:
                raise AtodError(
                    f"{name}={new} cannot be set: the quickstart's runs have their own (--runs, "
                    f"--seeds). For one run: atod-train houses-tiny --{name} {new}"
                )
        selection = Selection(command.seeds, None, command.runs, command.jobs)
        study = read_study(QUICKSTART, out, selection, config)
    else:
        study = study_of(config, out, name=command.preset)
    run_study(study, out, command.resume)


def _parsed(arguments: list[str]) -> TrainCommand:
    """Return the settings of a command line that begins with a preset."""
    # tyro takes no keys but those of a default: a preset's options are added to what was given.
    presets = {name: preset.config for name, preset in PRESETS.items()}
    commands: dict[str, tuple[str, TrainCommand]] = {
        "quickstart": (
            "ATOD beside OPD on generated houses, six to nine minutes on a processor",
            QuickstartCommand(**_bare(presets["houses-tiny"]), preset="quickstart"),
        )
    }
    for name, preset in PRESETS.items():
        commands[name] = (preset.summary, TrainCommand(**_bare(preset.config), preset=name))
    command: TrainCommand = tyro.extras.overridable_config_cli(
        commands, prog="atod-train", description=_DESCRIPTION, args=arguments
    )
    default = presets["houses-tiny" if command.preset == "quickstart" else command.preset]
    command = with_options(command, default)
    if any(argument.startswith("--start.epochs") for argument in arguments):
        return command
    return keep_loaded_models(command)


def _bare(config: RunConfig) -> dict[str, Any]:
    """Return the sections of settings without options of the environment."""
    return {
        **{name: getattr(config, name) for name in SECTIONS},
        "env": replace(config.env, options={}),
    }


def _resume(arguments: Sequence[str]) -> None:
    """Continue the runs of a folder with the settings that are kept there.

    Raises:
        AtodError: not one folder, or no study in it.
    """
    from atod_train.studies.file import read_kept_study
    from atod_train.studies.study import run_study

    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise AtodError(
            "resume takes one folder, such as `atod-train resume runs/quickstart`; all settings "
            "are those kept in it."
        )
    study, out = read_kept_study(Path(arguments[0]))
    run_study(study, out, resume=True)


def _guarded(again: str, work: Callable[..., None], *arguments: Any) -> int:
    """Runs something that trains, and ends the process where it trains with others."""
    from atod_train.distributed import end_process

    return end_process(_told(again, work, *arguments))


def _told(again: str, work: Callable[..., None], *arguments: Any) -> int:
    """Runs something that trains; what goes wrong is told in a line. `again`: what goes on."""
    import transformers

    from atod_train.training.stopping import StoppedByUser

    transformers.utils.logging.disable_progress_bar()
    try:
        work(*arguments)
    except StoppedByUser as stop:
        print(f"atod-train: {stop}; {again} continues from there", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(
            f"atod-train: stopped at once; {again} continues from the last checkpoint",
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
