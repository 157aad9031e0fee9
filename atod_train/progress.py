"""Show progress of long work: a bar on a terminal, plain lines elsewhere; seconds per phase."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from tqdm import tqdm

_FIRST_LINE, _OTHER_LINES = 5.0, 30.0
"""Without a terminal: seconds until the first line, and between two lines. Work without any unit
or token has a line after twice the first."""

_style: Literal["bars", "lines", "nothing"] = "bars"
_open: list[str] = []
"""Descriptions of the current work, outermost first."""

_Show = Callable[[int, str], None]
"""Count units as done, and show a note."""


class Advance(Protocol):
    """The function that `progress` yields."""

    def __call__(self, amount: int = 1, note: str = "", tokens: int = 0) -> None:
        """Count `amount` more units as done, and `tokens` more as sampled; show `note`."""


def show_progress(style: Literal["bars", "lines", "nothing"]) -> None:
    """Set how this process shows progress; the default is bars, which are lines in a pipe."""
    global _style
    _style = style


@contextmanager
def progress(
    total: int, description: str, *, initial: int = 0, is_part: bool = False
) -> Iterator[Advance]:
    """Show the progress of long work on standard error: done, time left, tokens per second.

    Args:
        total: units of work in all.
        description: the work, such as `training`. Lines of work inside other work
            begin with both descriptions.
        initial: units that were done before.
        is_part: the work is one unit of the outer work: without a terminal it has lines only
            if it takes long.

    Yields:
        A function to call after each unit.
    """
    if _style == "nothing":
        yield lambda amount=1, note="", tokens=0: None
        return
    began, sampled = time.monotonic(), 0

    def advance(amount: int = 1, note: str = "", tokens: int = 0) -> None:
        nonlocal sampled
        sampled += tokens
        rate = sampled / max(time.monotonic() - began, 1e-6)
        show(amount, ", ".join(filter(None, (f"{rate:,.0f} tokens/s" if sampled else "", note))))

    _open.append(description)
    shown = _bar if _style == "bars" and sys.stderr.isatty() else _lines
    try:
        with shown(total, initial, is_part) as show:
            yield advance
    finally:
        _open.pop()


@contextmanager
def _lines(total: int, initial: int, is_part: bool) -> Iterator[_Show]:
    name, began, done = ": ".join(_open), time.monotonic(), initial
    due = began + (_OTHER_LINES if is_part else _FIRST_LINE)

    def line(*parts: str) -> None:
        print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    def show(amount: int, note: str) -> None:
        nonlocal done, due
        done += amount
        now = time.monotonic()
        if now < due and (is_part or done < total):
            return
        first.cancel()
        due, seconds, left = now + _OTHER_LINES, now - began, ""
        if initial < done < total:
            time_left = (total - done) * seconds / (done - initial)
            left = f"{tqdm.format_interval(time_left)} left"
        line(f"{name}: {done}/{total}", f"{tqdm.format_interval(seconds)} gone", left, note)

    # A first unit that takes long is not without a line; units and tokens come first.
    first = threading.Timer(2 * _FIRST_LINE, line, [f"{name}: {initial}/{total}"])
    first.daemon = True
    if not is_part:
        first.start()
    try:
        yield show
    finally:
        first.cancel()


def _has_size() -> bool:
    """Return whether the terminal of standard error reports its size."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return True


@contextmanager
def _bar(total: int, initial: int, is_part: bool) -> Iterator[_Show]:
    # Some pseudo-terminals report a size of 0, with which tqdm would show nothing.
    size: dict[str, Any] = {"dynamic_ncols": True} if _has_size() else {"ncols": 80, "nrows": 24}
    bar = tqdm(
        total=total,
        desc=_open[-1],
        initial=initial,
        leave=not _open[1:],
        bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed} gone, {remaining} left{postfix}",
        **size,
    )

    def show(amount: int, note: str) -> None:
        bar.set_postfix_str(note, refresh=not amount)
        bar.update(amount)

    with bar:
        yield show


class PhaseTimes:
    """Measure the seconds per phase of a step.

    Phases may nest: the time of an inner phase counts for the inner one only, so that the
    phases add up to the wall time.

    Args:
        wait: Called between phases: waits for the pending work of an asynchronous device.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait or (lambda: None)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = self._began = time.perf_counter()

    def _book(self) -> None:
        self._wait()
        now = time.perf_counter()
        if self._open:
            self._seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`: environment, generation, teacher, update, ..."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def take(self) -> dict[str, float]:
        """Return the seconds since the last take as `seconds/<phase>`, and reset them.

        `seconds/other` is the wall time spent in no phase.
        """
        self._book()
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        taken["seconds/other"] = max(0.0, self._since - self._began - sum(taken.values()))
        self._seconds.clear()
        self._began = self._since
        return taken
