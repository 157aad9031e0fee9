"""Progress of long work: a bar on a terminal, plain lines elsewhere; seconds per phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol, TextIO


class Advance(Protocol):
    """What `progress` yields."""

    def __call__(self, amount: int = 1, note: str = "") -> None:
        """Counts `amount` more units as done; `note` is shown beside the bar."""


_plain = False
_silent = False
_shown: Any = None
"""The bars on the terminal; a bar that begins inside of another is a line below it."""


def plain_lines() -> None:
    """From now on this process shows plain lines even on a terminal."""
    global _plain
    _plain = True


def no_lines() -> None:
    """From now on this process shows nothing; for all but one of those that work together."""
    global _silent
    _silent = True


@contextmanager
def progress(
    total: int,
    description: str,
    *,
    every_seconds: float = 30.0,
    stream: TextIO | None = None,
) -> Iterator[Advance]:
    """Shows how far a long piece of work is.

    Args:
        total: units of work in all.
        description: what is being done, such as `training`.
        every_seconds: away from a terminal: shortest time between two lines.
        stream: where to show it; default: the standard error stream.

    Yields:
        A function to call after each unit.
    """
    if _silent:
        yield lambda amount=1, note="": None
        return
    stream = sys.stderr if stream is None else stream
    if stream.isatty() and not _plain:
        with _bar(total, description, stream) as advance:
            yield advance
        return
    began = last = time.monotonic()
    done = 0

    def count(amount: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += amount
        now = time.monotonic()
        if now - last < every_seconds and done < total:
            return
        last = now
        print(f"{description}: {done}/{total}, {now - began:.0f} s {note}".rstrip(), file=stream)
        stream.flush()

    yield count


@contextmanager
def _bar(total: int, description: str, stream: TextIO) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    global _shown
    outer = _shown
    bar = outer or Progress(*columns, console=Console(file=stream))
    with nullcontext() if outer else bar:
        task = bar.add_task(description, total=total, note="")

        def advance(amount: int = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        _shown = bar
        try:
            yield advance
        finally:
            _shown = outer
            if outer is not None:
                bar.remove_task(task)


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
        """Return the seconds since the last take as `seconds/<phase>`, and begin anew.

        `seconds/other` is the wall time spent in no phase.
        """
        self._book()
        taken = {f"seconds/{name}": seconds for name, seconds in self._seconds.items()}
        taken["seconds/other"] = max(0.0, self._since - self._began - sum(taken.values()))
        self._seconds, self._began = {}, self._since
        return taken
