"""Runs at the same time, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from atod_gym.errors import AtodError
from atod_train.studies.study import _workers
from atod_train.training.stopping import StoppedByUser, interruptible


@pytest.mark.slow
def test_a_worker_that_the_system_kills_is_no_traceback() -> None:
    with (
        pytest.raises(AtodError, match=r"One of 2 processes was killed.*atod-train resume"),
        _workers(2) as call_all,
    ):
        call_all(signal.raise_signal, [(signal.SIGKILL,)])


@pytest.mark.slow
def test_results_come_in_the_order_of_the_calls() -> None:
    with _workers(2) as call_all:
        assert call_all(pow, [(2, 3), (3, 2), (5, 1)]) == [8, 9, 5]
        [pid] = call_all(os.getpid, [()])
    assert pid != os.getpid()


@pytest.mark.slow
def test_ctrl_c_interrupts_a_call_but_no_worker_without_work() -> None:
    with _workers(2) as call_all:
        [pid] = call_all(os.getpid, [()])
        os.kill(pid, signal.SIGINT)
        assert call_all(pow, [(2, 3)]) == [8]
        with pytest.raises(KeyboardInterrupt):
            call_all(signal.raise_signal, [(signal.SIGINT,)])


def _fail_unless_first(path: Path) -> None:
    path.touch()
    time.sleep(2 if path.name == "0" else 0.1)
    if path.name != "0":
        raise AtodError(path.name)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_ends_the_calls_at_once(jobs: int, tmp_path: Path) -> None:
    with pytest.raises(AtodError, match="1"), _workers(jobs) as call_all:
        call_all(_fail_unless_first, [(tmp_path / str(i),) for i in range(6)])
    assert len(list(tmp_path.iterdir())) < 6


def _work_until_stopped(begun: Path) -> None:
    begun.touch()
    with interruptible(announce=False) as interrupted:
        while not interrupted:
            time.sleep(0.01)
    raise StoppedByUser("stopped")


def _both_processes(number: int) -> None:
    """Send a signal as a terminal does, or as `kill`."""
    os.kill(os.getpid(), number)
    if number == signal.SIGINT:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid or 0, number)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.1, 0.5])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_workers_import_is_no_traceback(
    number: int, seconds: float, capfd: pytest.CaptureFixture[str]
) -> None:
    def send() -> None:
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        time.sleep(seconds)
        _both_processes(number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(StoppedByUser), _workers(2) as call_all:
        call_all(time.sleep, [(20,), (20,)])
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_no_call_begins_after_a_signal(number: int, tmp_path: Path) -> None:
    begun = [tmp_path / str(i) for i in range(6)]

    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        time.sleep(0.5)  # until the handlers of the calls are there
        _both_processes(number)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(StoppedByUser), _workers(2) as call_all:
        call_all(_work_until_stopped, [(path,) for path in begun])
    assert len(list(tmp_path.iterdir())) == 2
