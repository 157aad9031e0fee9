"""Stop a run at the first Ctrl-C or SIGTERM, so that no finished step is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_ECHO_SECONDS = 1.0
"""Launchers repeat a signal to processes that have already received it."""


class StoppedByUser(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: the last finished step is saved; the message says which."""


@contextmanager
def handling(handler: Any) -> Iterator[None]:
    """Handle SIGINT and SIGTERM with `handler`, as `signal.signal`; only in the main thread."""
    previous: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # only the main thread can change handlers
        for caught in (signal.SIGINT, signal.SIGTERM):
            previous[caught] = signal.signal(caught, handler)
    try:
        yield
    finally:
        for caught, before in previous.items():
            signal.signal(caught, before)


@contextmanager
def interruptible(
    announce: bool = True, on_signal: Callable[[int], None] | None = None
) -> Iterator[list[float]]:
    """Catch the first SIGINT or SIGTERM, to stop after the step; a second one stops at once.

    Args:
        announce: print that the run will stop.
        on_signal: called with the number of the first signal; it may raise StoppedByUser.

    Yields:
        A list that is empty until a signal has arrived.
    """
    noted: list[float] = []

    def note(number: int, frame: object) -> None:
        now = time.monotonic()
        if noted:
            if now - noted[0] > _ECHO_SECONDS:
                raise KeyboardInterrupt
            return
        noted.append(now)
        if on_signal is not None:
            on_signal(number)
        if announce:
            print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)

    with handling(note):
        yield noted
