"""Ctrl-C in the middle of a step: finish the step first, so that nothing is lost."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(announce: bool = True) -> Iterator[list[int]]:
    """The first Ctrl-C is noted, to stop after the step; a second one stops at once."""
    noted: list[int] = []

    def note(number: int, frame: object) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)
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
