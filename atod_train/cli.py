"""Define the command line `atod-train COMMAND`, parsed by tyro: one dataclass per command."""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from importlib import metadata
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

try:
    import tyro
    from tyro.conf import Positional, Suppress, UseAppendAction
except ImportError as error:
    print(
        f"atod-train needs the package {error.name}: pip install 'atod-gym[train]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

from atod_gym.errors import AtodError, InvalidSettingError
from atod_gym.terminal import flush_output
from atod_train.config import SECTIONS, Method, RunConfig
from atod_train.presets import PRESETS, completed, without_tables
from atod_train.studies.file import Study, StudySelection, read_kept_study, read_study, study_of
from atod_train.training.loggers import LoggerName, LogTo
from atod_train.training.stopping import StoppedByUser

_DESCRIPTION = """Train small agents with ATOD and other methods. Each command has --help.
`atod-train --version` prints the version."""


class Command(Protocol):
    """A command of the command line; its fields are the arguments."""

    def run(self, words: Sequence[str]) -> int:
        """Run the command, and return the exit code.

        Args:
            words: the command line after the program's name.

        Raises:
            AtodError: a mistake of the user, for one line on the standard error stream.
        """


# -- commands that train ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Train(RunConfig):
    """Make one run. Another method or seed with the same --out shares start, teacher and report."""

    out: Path = Path("runs")
    """Folder of the study."""
    log: tuple[LoggerName, ...] = LogTo().loggers
    """Loggers of the numbers of a run, besides its folder: tensorboard, wandb, trackio. The
    study is one project there. wandb needs an account, or WANDB_MODE=offline."""
    resume: bool = False
    """Continue the runs of the folder; finished ones, too, if train.steps is larger."""
    preset: Suppress[str] = ""

    def run(self, words: Sequence[str]) -> int:
        """Make the run."""
        study = study_of(self.config(words), self.out, name=self.preset, log=self.log)
        return _train(study, self.out, self.resume)

    def config(self, words: Sequence[str]) -> RunConfig:
        """Return the settings of the run."""
        config = RunConfig(*(getattr(self, name) for name in SECTIONS))
        return completed(config, PRESETS[self.preset].config, words)


@dataclass(frozen=True)
class Quickstart(Train):
    """Train ATOD and OPD, and report the differences."""

    runs: tuple[Method, ...] = ("atod", "opd")
    """Methods; each is a run."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of each run."""
    jobs: int = 2
    """Number of runs at the same time, each in its own process."""

    def run(self, words: Sequence[str]) -> int:
        """Make the runs."""
        config = self.config(words)
        method, seed = config.algorithm.method, config.train.seed
        if (method, seed) != ("atod", 0):
            raise InvalidSettingError(
                "quickstart has --runs and --seeds, not algorithm.method and train.seed: "
                f"atod-train quickstart --runs {method} --seeds {seed}"
            )
        study = study_of(
            config,
            self.out,
            self.runs,
            self.seeds,
            name=self.preset,
            jobs=self.jobs,
            log=self.log,
        )
        return _train(study, self.out, self.resume)


@dataclass(frozen=True, kw_only=True)
class StudyCommand(StudySelection):
    """Make the runs of a study file: several methods, seeds and environments."""

    file: Positional[Path]
    """TOML file. Its format is described in atod_train/studies/file.py."""
    out: Path | None = None
    """Folder of the study. Default: runs/<name of the file>."""
    resume: bool = False
    """Continue the runs of the folder; finished ones, too, if train.steps is larger."""
    results_only: bool = False
    """Train nothing: write results and report of the finished runs."""

    def run(self, words: Sequence[str]) -> int:
        """Make the runs."""
        out = self.out or Path("runs") / self.file.stem
        study = read_study(self.file, out, self)
        if not self.results_only:
            return _train(study, out, self.resume)
        from atod_train.studies.study import report_study

        report_study(study, out)
        return 0


@dataclass(frozen=True)
class Resume:
    """Continue every run of a folder with its stored settings; begin those that have not begun."""

    folder: Positional[Path]
    """Folder of a study, such as runs/quickstart, or of one of its runs."""

    def run(self, words: Sequence[str]) -> int:
        """Continue the runs."""
        study, out = read_kept_study(self.folder)
        return _train(study, out, resume=True)


# -- other commands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultsCommand:
    """Print the tables of a study as Markdown, from the results.json of all its parts."""

    files: Positional[tuple[Path, ...]]
    """results.json of one or more folders; each (file, seed) is one replicate."""
    out: Path | None = None
    """Also write report.html and figures (PNG) to this folder."""
    pair: UseAppendAction[tuple[tuple[str, str], ...]] = ()
    """Labels A B: whether A solves more than B; may be repeated. start and teacher are labels, too.
    Default: the first run with each other one."""
    splits: bool = False
    """Print a table for each split, too."""

    def run(self, words: Sequence[str]) -> int:
        """Print the tables."""
        from atod_train.reports.answer import answer
        from atod_train.reports.report import write_report
        from atod_train.reports.results import REFERENCES, read_results
        from atod_train.reports.tables import all_tables, claims_table, describe

        if not self.files:
            raise InvalidSettingError("results needs at least one results.json.")
        environments = read_results(self.files)
        labels = dict.fromkeys(label for found in environments for label in found.labels)
        known = (*labels, *REFERENCES)
        for name in (name for pair in self.pair for name in pair if name not in known):
            raise InvalidSettingError(f"--pair: no {name!r}; known: {', '.join(known)}.")
        if self.out:
            report = write_report(self.out, environments, pictures=True)
        for environment in environments:
            print(f"## {environment.name}\n\n{describe(environment)}\n")
            if found := answer(environment):
                print("\n\n".join((found.headline, *found.remarks)) + "\n")
            for table in all_tables(environment, self.pair, by_split=self.splits):
                print(f"{table.title}:\n\n{table.markdown}")
        if len(environments) > 1:
            claims = claims_table(environments, self.pair)
            print(f"## All environments\n\n{claims.title}:\n\n{claims.markdown}")
        if self.out:
            print(f"report: {report}")
        return 0


@dataclass(frozen=True)
class Doctor:
    """Report what this machine can run, what is missing, and whether models can be used."""

    student: str = "tiny"
    """The model to train, as model.student."""
    teacher: str = "small"
    """Its teacher, as model.teacher; a server is contacted."""
    max_context: int = 2048
    """Longest sequence in tokens, as model.max_context."""
    server: UseAppendAction[tuple[str, ...]] = ()
    """URL of an environment's server to check; may be repeated."""

    def run(self, words: Sequence[str]) -> int:
        """Print the findings."""
        from atod_train import doctor

        return doctor.examine(self.student, self.teacher, self.max_context, self.server)


@dataclass(frozen=True)
class ServeTeacher:
    """Score prompts for students on other machines, which name this server: --model.teacher URL."""

    model: Positional[str]
    """A folder, a hub name or smollm2, as model.teacher."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all addresses of this machine, which needs a token."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    max_body: int = 8 * 2**20
    """Maximum size of a request, in bytes."""
    token_env: str | None = None
    """Environment variable with a token that every request must carry."""
    allowed_host: UseAppendAction[tuple[str, ...]] = ()
    """Further host name that the server accepts without a token; *: every name; may be
    repeated. IP addresses, localhost and the machine's name always work."""
    parent: int | None = None
    """End when the process with this id has ended."""
    device: str = "auto"
    """A torch device; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto: bfloat16 on a GPU, else float32."""
    max_context: int = 0
    """Longest prompt in tokens; 0: that of the model, at most 65536."""
    tokens_per_microbatch: int = 16384
    """Padded tokens of one forward pass; fewer need less memory."""
    threads: int = 0
    """Threads of the processor; 0: torch's choice."""

    def run(self, words: Sequence[str]) -> int:
        """Serve until SIGTERM or Ctrl-C."""
        from atod_train.teachers import server

        server.serve(**vars(self))
        return 0


# -- running them ----------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: command line without the program's name; None: that of the process.

    Returns:
        The exit code: 2 for a mistake of the user, 130 after Ctrl-C or SIGTERM.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in each worker
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # they would break up the lines
    words = list(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        if words[:1] in (["--version"], ["-V"]):
            print(f"atod-train {metadata.version('atod-gym')}")
            return 0
        return _parsed(words).run(words)

    return _guarded(work)


def _parsed(words: Sequence[str]) -> Command:
    """Return the command of a command line."""
    others: dict[str, type[Command]] = {
        "study": StudyCommand,
        "resume": Resume,
        "results": ResultsCommand,
        "doctor": Doctor,
        "serve-teacher": ServeTeacher,
    }
    commands = [
        *(
            _training(name, Quickstart if name == "quickstart" else Train, preset.summary)
            for name, preset in PRESETS.items()
        ),
        *(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in others.items()),
    ]
    command: Command = tyro.cli(
        reduce(or_, commands),
        prog="atod-train",
        description=_DESCRIPTION,
        args=list(words),
        config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
    )
    return command


def _training(name: str, kind: type[Train], about: str) -> Any:
    """Return the command that starts from the settings of a preset."""
    config = without_tables(PRESETS[name].config)
    sections = {section: getattr(config, section) for section in SECTIONS}
    default = kind(**sections, preset=name, out=Path("runs") / name)
    return Annotated[kind, tyro.conf.subcommand(name, default=default, description=about)]


def _train(study: Study, out: Path, resume: bool) -> int:
    """Make the runs of a study, and end the process if it trains with others."""
    from atod_train.distributed import end_process
    from atod_train.studies.study import run_study

    def work() -> int:
        run_study(study, out, resume)
        return 0

    again = shlex.join(["atod-train", "resume", str(out)])
    return end_process(_guarded(work, f"Continue with: {again}"))


def _guarded(work: Callable[[], int], again: str = "") -> int:
    """Call a function and return its exit code; print an error in one line, with the remedy."""
    try:
        return work()
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = "servers" if package in ("starlette", "uvicorn") else "train"
        text, code = f"{package} is not installed: pip install 'atod-gym[{extra}]'", 2
    except AtodError as error:
        text, code = f"error: {error}", 2
    except BrokenPipeError:
        return 0
    except OSError as error:
        text, code = f"error: {error}. {_advice(error)} {again}", 2
    except (KeyboardInterrupt, StoppedByUser) as stop:
        text, code = f"{str(stop) or 'stopped at once'}. {again}", 130
    finally:
        flush_output()
    print(f"atod-train: {text.rstrip()}", file=sys.stderr)
    return code


def _advice(error: OSError) -> str:
    """Return advice for an error of the system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space or choose another folder."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a folder that you may write to."
    if isinstance(error, ConnectionError | TimeoutError):
        return "Check that the server is running and reachable."
    return "Check the file or device in the message."


if __name__ == "__main__":
    sys.exit(main())
