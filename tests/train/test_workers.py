"""Runs at the same time, each in a process of its own."""

from __future__ import annotations

import os
import signal

import pytest

from atod_gym.errors import AtodError
from atod_train.studies.study import _workers


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
