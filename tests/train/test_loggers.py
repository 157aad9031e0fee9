"""Loggers: events of TensorBoard, loggers that are missing, and loggers that fail."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from atod_gym.errors import InvalidSettingError, MissingExtraError
from atod_train.config import RunConfig
from atod_train.studies.file import study_of
from atod_train.studies.study import run_study
from atod_train.training import loggers
from atod_train.training.loggers import Loggers, LogTo, check_loggers


@pytest.mark.slow
def test_events_are_written_without_warnings_and_resumed(tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from atod_train.training.loggers import Loggers, LogTo
        for resume, steps in ((None, (1, 2, 3)), (1, (2, 3))):
            with Loggers(LogTo(), Path(sys.argv[1]), "ab12", {}, resume) as loggers:
                for step in steps:
                    loggers.log(step, {"loss": float(step + (resume or 0) * 10)})
    """
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 12.0),
        (3, 13.0),
    ]


@pytest.mark.slow
def test_a_full_disk_costs_the_events_alone(tmp_path: Path) -> None:
    # A limit on the size of files fails as a full disk does.
    program = """
        import resource, sys
        from pathlib import Path
        from atod_train.training.loggers import Loggers, LogTo
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        with Loggers(LogTo(), Path(sys.argv[1]), "ab12", {}) as loggers:
            for step in range(10_000):
                loggers.log(step, {"loss": 0.5})
        print("done")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stdout) == (0, "done\n")
    assert result.stderr.startswith("tensorboard failed and gets no more numbers: ")
    assert result.stderr.count("\n") == 1


def test_a_logger_that_fails_costs_a_warning_and_the_others_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[Any] = []

    class Fake:
        def __init__(self, run: Any) -> None:
            heard.append((run.project, run.name, run.key))

        def log(self, step: int, numbers: Any) -> None:
            heard.append((step, numbers))

        def close(self, *, has_failed: bool) -> None:
            heard.append(has_failed)

    class Broken(Fake):
        def __init__(self, run: Any) -> None:
            raise ConnectionError

    class Failing(Fake):
        def log(self, step: int, numbers: Any) -> None:
            raise TimeoutError("the network is gone")

    kinds = {"tensorboard": Fake, "wandb": Broken, "trackio": Failing}
    monkeypatch.setattr(loggers, "_LOGGERS", kinds)
    log = LogTo(("trackio", "wandb", "tensorboard"), tmp_path / "a study")
    opened = Loggers(log, tmp_path / "a study" / "x" / "opd-seed1", "ab12", {})
    opened.log(1, {"loss": 0.5})
    opened.log(2, {"loss": 0.25})
    opened.__exit__(KeyError, None, None)
    name = ("a-study", "x/opd-seed1", "x-opd-seed1-ab12")
    assert heard == [name, name, (1, {"loss": 0.5}), (2, {"loss": 0.25}), True]
    assert [line.partition(". ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "wandb failed and gets no more numbers: ConnectionError",
        "trackio failed and gets no more numbers: the network is gone",
    ]


def test_missing_packages_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    study = study_of(RunConfig(), tmp_path / "out", log=("trackio",))
    with pytest.raises(MissingExtraError, match=r"pip install 'atod-gym\[trackio\]'"):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        InvalidSettingError, match="unknown logger 'csv'; known: tensorboard, wandb"
    ):
        check_loggers(("csv",))
