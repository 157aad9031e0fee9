"""Progress of long work: a bar on a terminal, plain lines elsewhere; seconds per phase."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from tqdm import tqdm

_FIRST_LINE = 5.0
"""Seconds until the first line away from a terminal."""


class Advance(Protocol):
    """The function that `progress` yields."""

    def __call__(self, amount: int = 1, note: str = "", tokens: int = 0) -> None:
        """Count `amount` more units as done, and `tokens` more as sampled; show `note`."""


_plain = False
_silent = False
_open: list[str] = []
"""Descriptions of what is under way, outermost first."""


def plain_lines() -> None:
    """From now on show plain lines in this process even on a terminal."""
    global _plain
    _plain = True


def no_lines() -> None:
    """From now on show nothing in this process; for all ranks but one."""
    global _silent
    _silent = True


@contextmanager
def progress(
    total: int,
    description: str,
    *,
    initial: int = 0,
    is_part: bool = False,
    every_seconds: float = 30.0,
    stream: TextIO | None = None,
) -> Iterator[Advance]:
    """Show how far a long piece of work is: done, time left, and tokens per second.

    Args:
        total: units of work in all.
        description: what is being done, such as `training`. Lines of work inside of other work
            begin with both descriptions.
        initial: units that were done before.
        is_part: the work is one unit of the work around it: away from a terminal it has lines only
            where it takes long.
        every_seconds: away from a terminal: shortest time between two lines.
        stream: where to show it; default: the standard error stream.

    Yields:
        A function to call after each unit.
    """
    if _silent:
        yield lambda amount=1, note="", tokens=0: None
        return
    stream = sys.stderr if stream is None else stream
    _open.append(description)
    try:
        if stream.isatty() and not _plain:
            with _bar(total, description, initial, stream) as advance:
                yield advance
        else:
            with _lines(total, initial, is_part, every_seconds, stream) as advance:
                yield advance
    finally:
        _open.pop()


@contextmanager
def _lines(
    total: int, initial: int, is_part: bool, every_seconds: float, stream: TextIO
) -> Iterator[Advance]:
    """Yield a function that prints a line now and then."""
    name = ": ".join(_open)
    began = time.monotonic()
    due = began + (every_seconds if is_part else min(every_seconds, _FIRST_LINE))
    done, sampled, has_line = initial, 0, False

    def begin() -> None:  # a first unit that takes long is not without a line
        if not has_line:
            print(f"{name}: {done}/{total}", file=stream, flush=True)

    timer = threading.Timer(_FIRST_LINE, begin)
    timer.daemon = True
    if not is_part:
        timer.start()

    def advance(amount: int = 1, note: str = "", tokens: int = 0) -> None:
        nonlocal done, sampled, due, has_line
        done += amount
        sampled += tokens
        now = time.monotonic()
        if now < due and (is_part or done < total):
            return
        due, has_line = now + every_seconds, True
        seconds = max(now - began, 1e-6)
        parts = [f"{name}: {done}/{total}", f"{tqdm.format_interval(seconds)} gone"]
        if initial < done < total:
            left = (total - done) * seconds / (done - initial)
            parts.append(f"{tqdm.format_interval(left)} left")
        parts += _notes(note, sampled, seconds)
        print(", ".join(parts), file=stream, flush=True)

    try:
        yield advance
    finally:
        timer.cancel()


def _notes(note: str, tokens: int, seconds: float) -> list[str]:
    return [*([f"{tokens / seconds:,.0f} tokens/s"] if tokens else []), *([note] if note else [])]


@contextmanager
def _bar(total: int, description: str, initial: int, stream: TextIO) -> Iterator[Advance]:
    began = time.monotonic()
    sampled = 0
    is_inner = len(_open) > 1
    with tqdm(
        total=total,
        desc=description,
        initial=initial,
        file=stream,
        leave=not is_inner,
        dynamic_ncols=True,
    ) as bar:

        def advance(amount: int = 1, note: str = "", tokens: int = 0) -> None:
            nonlocal sampled
            sampled += tokens
            notes = _notes(note, sampled, max(time.monotonic() - began, 1e-6))
            bar.set_postfix_str(", ".join(notes), refresh=False)
            bar.update(amount)

        yield advance


class PhaseTimes:
    """Measure the seconds per phase of a step.

    Phases may nest: the time of an inner phase counts for the inner one alone, so that the
    phases add up to the wall time. Asynchronous devices: synchronise before a phase ends if its
    time matters.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._began = time.perf_counter()

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
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
        self._seconds, self._began = {}, self._since
        return taken
