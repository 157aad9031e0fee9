"""The command line: `atod-train PRESET [--section.setting value ..]`, `study FILE`, and others."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from atod_gym.errors import AtodError, MissingExtraError
from atod_train.config import RunConfig
from atod_train.presets import PRESETS

if TYPE_CHECKING:
    from atod_train.report_data import RunSummary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a preset; returns the exit code (2: a user's mistake, 130: stopped by Ctrl-C)."""
    # Warnings about hub tokens and parallel tokenizers say nothing to our users.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if chosen[:1] == ["doctor"]:
            from atod_train import doctor

            return doctor.main(chosen[1:])
        if chosen[:1] == ["serve-teacher"]:
            from atod_train import serve_teacher

            return serve_teacher.main(chosen[1:])
        import tyro  # noqa: F401 - whether it is there
    except ImportError as error:
        print(f"atod-train: {_missing(error)}", file=sys.stderr)
        return 2
    if chosen[:1] == ["study"]:
        return _guarded(_study, chosen[1:])
    config = _parsed(chosen)
    preset = next((name for name in chosen if name in PRESETS), "run")
    out = Path(config.study.out or Path("runs") / preset)
    return _guarded(_run, config, out)


def _parsed(arguments: list[str]) -> RunConfig:
    """The settings of a command line that begins with a preset."""
    import tyro

    configs = {name: (preset.summary, preset.config) for name, preset in PRESETS.items()}
    config: RunConfig = tyro.extras.overridable_config_cli(
        configs, prog="atod-train", args=arguments
    )
    return config


def _run(config: RunConfig, out: Path) -> None:
    from atod_train.report_data import read_run
    from atod_train.study import run_study

    report = run_study(config, out)
    _show([read_run(path.parent) for path in sorted(out.glob("*/config.json"))], report)


def _study(arguments: list[str]) -> None:
    from atod_train.processes import is_main_process
    from atod_train.report_data import read_run
    from atod_train.study import make_runs
    from atod_train.study_file import read_study
    from atod_train.study_results import RESULTS_FILE, write_results

    parser = argparse.ArgumentParser(
        prog="atod-train study",
        description="Make the runs of a study file, or go on with them; "
        "the format is described in atod_train/study_file.py.",
    )
    parser.add_argument("file", type=Path, help="TOML file")
    parser.add_argument("--out", type=Path, help="folder (default: runs/<name of the file>)")
    options = parser.parse_args(arguments)
    out = options.out or Path("runs") / options.file.stem
    done = {}
    for part in read_study(options.file, out, _parsed):
        report = make_runs(part.config, part.runs, part.folder)
        if is_main_process():
            print(f"\n{part.name}")
            done[part.name] = [read_run(run.folder) for run in part.runs]
            write_results(out / RESULTS_FILE, done)
            _show(done[part.name], report)


def _show(runs: Sequence[RunSummary], report: Path) -> None:
    """Prints the tables of a study."""
    from atod_train.processes import is_main_process
    from atod_train.study_tables import print_tables

    if is_main_process():
        console = Console(width=None if sys.stdout.isatty() else 120)
        print_tables(runs, console)
        console.print(f"report: {report}")


def _guarded(work: Callable[..., None], *arguments: Any) -> int:
    """Runs something that trains, and ends the process where it trains with others."""
    from atod_train.processes import end_process

    return end_process(_told(work, *arguments))


def _told(work: Callable[..., None], *arguments: Any) -> int:
    """Runs something that trains; what goes wrong is told in a line."""
    import transformers

    from atod_train.trainer import StoppedByUser

    transformers.utils.logging.disable_progress_bar()
    try:
        work(*arguments)
    except StoppedByUser as stop:
        print(f"atod-train: {stop}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print(
            "atod-train: stopped at once; the same command with --study.resume goes on from the "
            "last checkpoint",
            file=sys.stderr,
        )
        return 130
    except AtodError as error:
        print(f"atod-train: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(
            f"atod-train: error: {error}. Free space or choose another folder with --study.out; "
            "what was saved is intact and --study.resume goes on from it.",
            file=sys.stderr,
        )
        return 2
    return 0


def _missing(error: ImportError) -> MissingExtraError:
    package = (error.name or "").partition(".")[0]
    extra = "servers" if package in ("starlette", "uvicorn") else "train"
    return MissingExtraError(f"{package} is not installed: pip install 'atod[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
