"""The command line: `atod-train PRESET [--section.setting value ..]`, `doctor`, `serve-teacher`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from atod_gym.errors import AtodError, MissingExtraError
from atod_train.config import RunConfig
from atod_train.presets import PRESETS


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
        import tyro
    except ImportError as error:
        print(f"atod-train: {_missing(error)}", file=sys.stderr)
        return 2
    configs = {name: (preset.summary, preset.config) for name, preset in PRESETS.items()}
    config: RunConfig = tyro.extras.overridable_config_cli(configs, prog="atod-train", args=chosen)
    preset = next((name for name in chosen if name in PRESETS), "run")
    out = Path(config.study.out or Path("runs") / preset)
    return _run(config, out)


def _run(config: RunConfig, out: Path) -> int:
    import transformers

    from atod_train.processes import is_main_process, leave_processes
    from atod_train.report_data import read_run
    from atod_train.study import run_study
    from atod_train.study_tables import print_tables
    from atod_train.trainer import StoppedByUser

    transformers.utils.logging.disable_progress_bar()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        report = run_study(config, out)
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
    finally:
        leave_processes()
    if not is_main_process():
        return 0
    runs = [read_run(path.parent) for path in sorted(out.glob("*/config.json"))]
    print_tables(runs, console)
    console.print(f"report: {report}")
    return 0


def _missing(error: ImportError) -> MissingExtraError:
    package = (error.name or "").partition(".")[0]
    extra = "servers" if package in ("starlette", "uvicorn") else "train"
    return MissingExtraError(f"{package} is not installed: pip install 'atod[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
