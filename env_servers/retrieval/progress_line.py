"""One line that says how far a long piece of work is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_TERMINAL_SECONDS = 0.5
_STEPS = 10


@contextmanager
def progress_line(
    work: str, total: int, done: int = 0, stream: TextIO | None = None
) -> Iterator[Callable[[int], None]]:
    """Shows a line that is renewed on a terminal; elsewhere a new one after each tenth.

    Args:
        work: what is done, such as `Encoding passages`.
        total: units in all, at least 1.
        done: units that were done before.
        stream: where to show it; the standard error stream if None.

    Yields:
        A function that counts units as done.
    """
    shown_on = sys.stderr if stream is None else stream
    is_terminal = shown_on.isatty()
    begun = last = time.monotonic()
    before = done

    def count(number: int) -> None:
        nonlocal done, last
        step = done * _STEPS // total
        done += number
        now = time.monotonic()
        if is_terminal:
            is_due = now - last >= _TERMINAL_SECONDS or done == total
        else:
            is_due = done * _STEPS // total > step
        if is_due:
            last = now
            pace = (done - before) / max(now - begun, 1e-9)
            text = f"{work}: {done:,} of {total:,}, {pace:,.0f}/s, {_left(total - done, pace)} left"
            # Blanks over what was longer before.
            print(f"\r{text:<79}" if is_terminal else text, end="", file=shown_on)
            print("" if is_terminal and done < total else "\n", end="", file=shown_on, flush=True)

    yield count


def _left(units: int, pace: float) -> str:
    seconds = round(units / pace)
    return f"{seconds} s" if seconds < 120 else f"{round(seconds / 60):,} min"
