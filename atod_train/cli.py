"""The command line, read by tyro: `atod-train COMMAND`, one dataclass for each command."""

from __future__ import annotations

import errno
import os
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from importlib import metadata
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_train.config import SECTIONS, RunConfig
from atod_train.presets import PRESETS, keep_loaded_models, with_options

if TYPE_CHECKING:
    from atod_train.reports.results import Results
    from atod_train.studies.file import Study

try:
    import tyro
    from tyro.conf import Positional, Suppress, UseAppendAction, arg
except ImportError as error:
    print(
        f"atod-train needs the package {error.name}: pip install 'atod-gym[train]'",
        file=sys.stderr,
    )
    raise SystemExit(2) from None

_T = TypeVar("_T")
Unset = Annotated[_T | None, arg(help_behavior_hint="")]
"""An argument whose default depends on others; the help shows no default but that of its text."""

_DESCRIPTION = """Train small agents with ATOD and other methods. Each command has --help.
`atod-train --version` prints the version."""


class Command:
    """A command of the command line."""

    @abstractmethod
    def run(self, words: Sequence[str]) -> int:
        """Do it, and return the exit code.

        Args:
            words: the command line after the command.

        Raises:
            AtodError: a mistake of the user, for one line on the standard error stream.
        """


# -- commands that train ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Train(RunConfig, Command):
    """Make one run. Another method or seed with the same --out shares start, teacher and report."""

    out: Unset[Path] = None
    """Folder of the study. Default: runs/<name of the command>."""
    resume: bool = False
    """Continue runs that the folder holds; finished ones too, if train.steps is larger."""
    preset: Suppress[str] = ""

    def run(self, words: Sequence[str]) -> int:
        """Make the run."""
        out = self.out or Path("runs") / self.preset
        return _train(lambda: self.study(self.config(words), out), out, self.resume)

    def config(self, words: Sequence[str]) -> RunConfig:
        """Return the settings of the run."""
        config = RunConfig(*(getattr(self, name) for name in SECTIONS))
        config = with_options(config, PRESETS[self.preset].config)
        has_epochs = any(word.startswith("--start.epochs") for word in words)
        return config if has_epochs else keep_loaded_models(config)

    def study(self, config: RunConfig, out: Path) -> Study:
        """Return the study of the run."""
        from atod_train.studies.file import study_of

        return study_of(config, out, name=self.preset)


@dataclass(frozen=True)
class Quickstart(Train):
    """ATOD and OPD on the same start, teacher and tasks: generated houses, on a processor."""

    runs: Unset[tuple[str, ...]] = None
    """Which runs are made. Default: atod opd."""
    seeds: Unset[tuple[int, ...]] = None
    """Seeds that each run is made with. Default: 0."""
    jobs: Unset[int] = None
    """Runs at the same time, each in a process of its own. Default: 2."""

    def run(self, words: Sequence[str]) -> int:
        """Make the runs."""
        out = self.out or Path("runs") / "quickstart"
        default = PRESETS[self.preset].config
        for name, old, new in (
            ("algorithm.method", default.algorithm.method, self.algorithm.method),
            ("train.seed", default.train.seed, self.train.seed),
        ):
            if old != new:
                raise InvalidSettingError(
                    f"{name}={new} is not for the quickstart, whose runs have their own (--runs, "
                    f"--seeds). For one run: atod-train {self.preset} --{name} {new}"
                )
        return _train(lambda: self.study(self.config(words), out), out, self.resume)

    def study(self, config: RunConfig, out: Path) -> Study:
        """Return the study of the runs."""
        from atod_train.studies.file import QUICKSTART, Selection, read_study

        selection = Selection(self.seeds, None, self.runs, self.jobs)
        return read_study(QUICKSTART, out, selection, config)


@dataclass(frozen=True)
class StudyCommand(Command):
    """Make the runs of a study file: several methods, seeds and environments."""

    file: Positional[Path]
    """TOML file. Its format is described in atod_train/studies/file.py; quickstart.toml next to it
    is an example."""
    out: Unset[Path] = None
    """Folder of the study. Default: runs/<name of the file>."""
    resume: bool = False
    """Continue runs that the folder holds; finished ones too, if train.steps is larger."""
    seeds: Unset[tuple[int, ...]] = None
    """Seeds that each run is made with. Default: those of the file."""
    environments: Unset[tuple[str, ...]] = None
    """Environments of the file to make runs on. Default: all."""
    runs: Unset[tuple[str, ...]] = None
    """Runs of the file to make. Default: all."""
    jobs: Unset[int] = None
    """Runs at the same time, each in a process of its own. Default: that of the file."""
    results_only: bool = False
    """Train nothing: write results and report of the runs that are finished."""

    def run(self, words: Sequence[str]) -> int:
        """Make the runs."""
        from atod_train.studies.file import Selection, read_study

        out = self.out or Path("runs") / self.file.stem
        selection = Selection(self.seeds, self.environments, self.runs, self.jobs)
        if not self.results_only:
            return _train(lambda: read_study(self.file, out, selection), out, self.resume)
        from atod_train.studies.study import report_study

        report_study(read_study(self.file, out, selection), out)
        return 0


@dataclass(frozen=True)
class Resume(Command):
    """Continue every run of a folder with the settings kept there, those not begun too."""

    folder: Positional[Path]
    """Folder of a study, such as runs/quickstart, or of one of its runs."""

    def run(self, words: Sequence[str]) -> int:
        """Continue the runs."""
        from atod_train.studies.file import read_kept_study

        study, out = read_kept_study(self.folder)
        return _train(lambda: study, out, True)


# -- other commands --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResultsCommand(Command):
    """Print the tables of a study as Markdown, from the results.json of all its parts."""

    files: Positional[tuple[Path, ...]]
    """results.json of one or more folders; each (file, seed) is one replicate."""
    out: Unset[Path] = None
    """Also write report.html and figures (PNG) to this folder."""
    pair: UseAppendAction[tuple[tuple[str, str], ...]] = ()
    """Labels A B: whether A solves more than B; may be repeated. start and teacher are labels too.
    Default: the first run with each other one."""
    splits: bool = False
    """Print a table for each split too."""

    def run(self, words: Sequence[str]) -> int:
        """Print the tables."""
        from atod_train.reports.report import write_report
        from atod_train.reports.results import read_results
        from atod_train.reports.tables import all_tables, claims_table, describe

        if not self.files:
            raise InvalidSettingError("results needs at least one results.json.")
        environments = read_results(self.files)
        _check_pairs(self.pair, environments)
        for environment in environments:
            print(f"## {environment.name}\n\n{describe(environment)}\n")
            for table in all_tables(environment, self.pair, by_split=self.splits):
                print(f"{table.title}:\n\n{table.markdown}")
        if len(environments) > 1:
            claims = claims_table(environments, self.pair)
            print(f"## All environments\n\n{claims.title}:\n\n{claims.markdown}")
        if self.out:
            print(f"report: {write_report(self.out, environments, pictures=True)}")
        return 0


def _check_pairs(pairs: Iterable[tuple[str, str]], environments: Sequence[Results]) -> None:
    from atod_train.reports.results import REFERENCES

    known = dict.fromkeys(label for environment in environments for label in environment.labels)
    names = (*known, *REFERENCES)
    for name in (name for pair in pairs for name in pair):
        if name not in names:
            raise InvalidSettingError(f"--pair: there is no {name!r}; known: {', '.join(names)}.")


@dataclass(frozen=True)
class Doctor(Command):
    """Print what this machine can run, what is missing, and whether models can be used."""

    student: str = "tiny"
    """The model that would be trained, as model.student."""
    teacher: str = "small"
    """The model that would teach it, as model.teacher; a server is asked."""
    max_context: int = 2048
    """Longest sequence in tokens, as model.max_context."""
    server: UseAppendAction[tuple[str, ...]] = ()
    """URL of an environment's server to ask; may be repeated."""

    def run(self, words: Sequence[str]) -> int:
        """Print the findings."""
        from atod_train import doctor

        return doctor.examine(self.student, self.teacher, self.max_context, self.server)


@dataclass(frozen=True)
class ServeTeacher(Command):
    """Score prompts for students on other machines, which name this server: --model.teacher URL."""

    model: Positional[str]
    """A folder, a hub name or smollm2, as model.teacher."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: all of this machine, which needs a token."""
    port: int = 8000
    """Port to listen on; 0: a free one, which is printed."""
    max_body: int = 8 * 2**20
    """Longest request, in bytes."""
    token_env: Unset[str] = None
    """Environment variable with a token that every request must carry."""
    allowed_host: UseAppendAction[tuple[str, ...]] = ()
    """Further host name under which the server is called without a token; *: every name; may be
    repeated. IP addresses, localhost and the machine's name always work."""
    parent: Unset[int] = None
    """End when the process with this number is gone."""
    device: str = "auto"
    """A torch device; auto: a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the weights; auto: bfloat16 on a GPU, else float32."""
    max_context: int = 0
    """Longest prompt in tokens; 0: that of the model, at most 65536."""
    tokens_per_microbatch: int = 16384
    """Padded tokens that go through the model at once; less needs less memory."""
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] in (["--version"], ["-V"]):
        print(f"atod-train {metadata.version('atod-gym')}")
        return 0
    return _guarded(lambda: _parsed(words).run(words), "")


def _parsed(words: Sequence[str]) -> Command:
    """Return the command of a command line."""
    quickstart = Quickstart(**_bare("houses-tiny"), preset="houses-tiny")
    about = "ATOD and OPD on generated houses, six to nine minutes on a processor"
    commands = [_subcommand("quickstart", about, Quickstart, default=quickstart)]
    for name, preset in PRESETS.items():
        default = Train(**_bare(name), preset=name)
        commands.append(_subcommand(name, preset.summary, Train, default=default))
    commands += [
        _subcommand("study", "the runs of a study file, methods times seeds", StudyCommand),
        _subcommand("resume", "continue every run of a folder", Resume),
        _subcommand("results", "tables and a report of results.json files", ResultsCommand),
        _subcommand("doctor", "what this machine can run, and whether models can be used", Doctor),
        _subcommand("serve-teacher", "score tokens for students on other machines", ServeTeacher),
    ]
    union = reduce(or_, commands)
    return cast(
        Command,
        tyro.cli(
            union,
            prog="atod-train",
            description=_DESCRIPTION,
            args=list(words),
            config=(tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff),
        ),
    )


def _subcommand(name: str, about: str, kind: type[Command], **default: Any) -> Any:
    return Annotated[kind, tyro.conf.subcommand(name, description=about, **default)]


def _bare(preset: str) -> dict[str, Any]:
    """Return a preset's sections without environment options, to which tyro could not add."""
    config = PRESETS[preset].config
    sections = {name: getattr(config, name) for name in SECTIONS}
    return {**sections, "env": replace(config.env, options={})}


def _train(study: Callable[[], Study], out: Path, resume: bool) -> int:
    """Make the runs of a study, and end the process where it trains with others."""
    from atod_train.distributed import end_process

    def work() -> int:
        import transformers

        from atod_train.studies.study import run_study
        from atod_train.training.stopping import StoppedByUser

        transformers.utils.logging.disable_progress_bar()
        try:
            run_study(study(), out, resume)
        except StoppedByUser as stop:
            raise KeyboardInterrupt(str(stop)) from None
        return 0

    return end_process(_guarded(work, f"Continue with: atod-train resume {out}"))


def _guarded(work: Callable[[], int], again: str) -> int:
    """Do something, and report what goes wrong in a line.

    Args:
        work: returns the exit code.
        again: how runs are continued.
    """
    try:
        return work()
    except ModuleNotFoundError as error:
        _report(str(_missing(error)))
        return 2
    except AtodError as error:
        _report(f"error: {error}")
        return 2
    except OSError as error:
        _report(" ".join(filter(None, (f"error: {error}. {_advice(error)}", again))))
        return 2
    except KeyboardInterrupt as stop:
        _report(". ".join(filter(None, (str(stop) or "stopped at once", again))))
        return 130


def _report(text: str) -> None:
    print(f"atod-train: {text}", file=sys.stderr)


def _advice(error: OSError) -> str:
    """Return what a user can do about an error of the system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Free space or choose another folder."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Choose a folder that you may write to."
    if isinstance(error, ConnectionError | TimeoutError):
        return "Check that the server is up and reachable."
    return "Check the file or device that is named."


def _missing(error: ModuleNotFoundError) -> AtodError:
    package = (error.name or "").partition(".")[0]
    extra = "servers" if package in ("starlette", "uvicorn") else "train"
    return MissingExtraError(f"{package} is not installed: pip install 'atod-gym[{extra}]'")


if __name__ == "__main__":
    sys.exit(main())
