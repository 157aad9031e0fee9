"""Log the numbers of a run while it trains, in TensorBoard, Weights & Biases or trackio.

Each logger receives the numbers of metrics.jsonl and of the evaluations under the same names;
Weights & Biases and trackio receive the settings, too. The runs of a study are the runs of one
project, named after the study's folder. A resumed run continues in its loggers: repeated steps
occur twice in Weights & Biases and trackio, with equal numbers.

The files of a run contain everything as well: a failed logger causes a warning, not a stop.
"""

from __future__ import annotations

import functools
import io
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError

LoggerName = Literal["tensorboard", "wandb", "trackio"]

_EXTRAS = {"tensorboard": "train", "wandb": "wandb", "trackio": "trackio"}
_WITHOUT_ACCOUNT = ("offline", "disabled", "dryrun")
"""Values of WANDB_MODE that need no account."""
_SECONDS_TO_SEND = 60.0
"""Maximum time that the end of a run waits for a slow network."""


@dataclass(frozen=True)
class LogTo:
    """The loggers of a study's runs, besides their folders."""

    loggers: tuple[LoggerName, ...] = ("tensorboard",)
    study: Path | None = None
    """Folder of the study, which names the project; None: the folder above the run's."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that cannot be used; ask for the account of Weights & Biases on a terminal.

    Raises:
        InvalidSettingError: the logger is unknown.
        MissingExtraError: its package is not installed.
        AtodError: Weights & Biases does not accept the account, or there is none.
    """
    for name in names:
        if name not in _EXTRAS:
            known = ", ".join(get_args(LoggerName))
            raise InvalidSettingError(f"log: unknown logger {name!r}; known: {known}.")
        try:
            metadata.version(name)  # a folder of that name can be imported, too
        except metadata.PackageNotFoundError as error:
            raise MissingExtraError(
                f"--log {name} needs the package {name}: pip install 'atod-gym[{_EXTRAS[name]}]'"
            ) from error
    if "wandb" in names and os.environ.get("WANDB_MODE") not in _WITHOUT_ACCOUNT:
        import wandb

        try:
            wandb.login()
        except wandb.errors.Error as error:
            raise AtodError(
                f"--log wandb: {error} Without an account or a network set WANDB_MODE=offline; "
                "`wandb sync` sends the runs later."
            ) from error


@dataclass(frozen=True)
class _LoggedRun:
    """The description of a run for its loggers."""

    folder: Path
    project: str
    name: str
    """Its folder in the study's folder."""
    key: str
    """Its name, unique among all runs."""
    config: Mapping[str, Any]
    resume_step: int | None
    """Last step of the resumed checkpoint; None: a new run."""


class Loggers(AbstractContextManager["Loggers"]):
    """The loggers of one run, which end with it.

    Args:
        log: the loggers.
        run_dir: the run folder.
        run_id: distinguishes the run from those of the same name; kept when it is resumed.
        config: settings, by section and name.
        resume_step: the last step of the resumed checkpoint; None: a new run.
    """

    def __init__(
        self,
        log: LogTo,
        run_dir: Path,
        run_id: str,
        config: Mapping[str, Any],
        resume_step: int | None = None,
    ) -> None:
        self._open: dict[str, _Logger] = {}
        folder = run_dir.resolve()
        study = folder.parent if log.study is None else log.study.resolve()
        name = folder.relative_to(study).as_posix()
        project, key = (re.sub(r"[^\w.-]", "-", text) for text in (study.name, f"{name}-{run_id}"))
        run = _LoggedRun(folder, project, name, key, config, resume_step)
        for logger in log.loggers:
            with self._surviving(logger):
                self._open[logger] = _LOGGERS[logger](run)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send numbers of a step."""
        for name, logger in list(self._open.items()):
            with self._surviving(name):
                logger.log(step, numbers)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the loggers, which show whether the run failed."""
        for name, logger in list(self._open.items()):
            with self._surviving(name):
                logger.close(has_failed=kind is not None)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Report the error of a logger, and continue without it."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            reason = str(error) or type(error).__name__
            print(
                f"{name} failed and gets no more numbers: {reason}. The run continues; its folder "
                "has all of them.",
                file=sys.stderr,
            )


# -- the loggers -----------------------------------------------------------------------------------


class _Logger(Protocol):
    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self, *, has_failed: bool) -> None: ...


class _TensorBoard:
    def __init__(self, run: _LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _silence_event_threads()
        # Events of repeated steps are hidden.
        purge_step = None if run.resume_step is None else run.resume_step + 1
        self._events = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)

    def close(self, *, has_failed: bool) -> None:
        self._events.close()


class _WandB:
    def __init__(self, run: _LoggedRun) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run.project,
            id=run.key,
            name=run.name,
            config=dict(run.config),
            dir=str(run.folder),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, finish_timeout=_SECONDS_TO_SEND),
        )
        # Its own step counter cannot go back, as a resumed run does.
        self._run.define_metric("*", step_metric="step")
        where = f"wandb sync {self._run.settings.sync_dir}" if self._run.offline else self._run.url
        print(f"wandb: {run.name}: {where}", file=sys.stderr)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log({"step": step, **numbers})

    def close(self, *, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class _Trackio:
    def __init__(self, run: _LoggedRun) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            self._run = trackio.init(
                project=run.project,
                name=run.key,
                config=dict(run.config),
                resume="allow",
                embed=False,
            )
        print(f"trackio: {run.name}: trackio show --project {run.project}", file=sys.stderr)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self, *, has_failed: bool) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()


_LOGGERS: dict[str, type[_TensorBoard] | type[_WandB] | type[_Trackio]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


@functools.cache
def _silence_event_threads() -> None:
    """Keep TensorBoard's writer threads from printing tracebacks of OSErrors.

    TensorBoard raises the error again in the next call of the writer, where it is handled.
    """
    others = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        is_writer = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (is_writer and isinstance(arguments.exc_value, OSError)):
            others(arguments)

    threading.excepthook = hook
