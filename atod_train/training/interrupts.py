"""Ctrl-C in the middle of a step: finish the step first, so that nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

_ECHO_SECONDS = 1.0
"""Launchers pass a Ctrl-C on to processes that the terminal has told already."""


@contextmanager
def interruptible(announce: bool = True) -> Iterator[list[float]]:
    """The first Ctrl-C is noted, to stop after the step; a second one stops at once."""
    noted: list[float] = []

    def note(number: int, frame: object) -> None:
        now = time.monotonic()
        if noted and now - noted[0] > _ECHO_SECONDS:
            raise KeyboardInterrupt
        if noted:
            return
        noted.append(now)
        if announce:
            print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:  # not in the main thread: leave signals alone
        yield noted
        return
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, previous)
