"""Shows how far a download is: one line that changes on a terminal, a line now and then elsewhere.

Everything goes to standard error, so that what a command prints stays readable by programs.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

_TERMINAL_EVERY = 0.2
_LINES_EVERY = 10.0
_RATE_OVER = 20.0


class Progress:
    """Tells a person what happens; a quiet one says nothing."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begins to show nothing.

        Args:
            quiet: never write.
            stream: where to write; None: standard error.
            clock: seconds, for tests.
        """
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._clock = clock
        self._is_terminal = self._stream.isatty()
        self._every = _TERMINAL_EVERY if self._is_terminal else _LINES_EVERY
        self._name = ""
        self._total: int | None = None
        self._shown_at = 0.0
        self._line = ""
        self._marks: deque[tuple[float, int]] = deque([(clock(), 0)])

    def begin(self, name: str, done: int, total: int | None) -> None:
        """A piece of work starts or goes on.

        Args:
            name: what the line begins with.
            done: bytes that are there already.
            total: bytes in all; None: not known.
        """
        self._name, self._total = name, total
        self._marks = deque([(self._clock(), done)])
        self._shown_at = self._clock()
        if self._is_terminal:
            self._show(done)

    def advance(self, done: int) -> None:
        """So many bytes are there now."""
        now = self._clock()
        if now - self._shown_at < self._every:
            return
        self._shown_at = now
        self._marks.append((now, done))
        # The rate of the last seconds says more than that since the beginning.
        while now - self._marks[1][0] > _RATE_OVER:
            self._marks.popleft()
        self._show(done)

    def end(self, done: int) -> None:
        """The work is done; the line stays."""
        if self._is_terminal:
            self._show(done)
            self._write("\n")
        self._line = ""

    def note(self, text: str) -> None:
        """Says something in a line of its own."""
        if self._line:
            self._write("\n")
            self._line = ""
        self._write(f"{text}\n")

    def _show(self, done: int) -> None:
        line = self._text(done)
        if not self._is_terminal:
            self._write(f"{line}\n")
            return
        width = max(20, shutil.get_terminal_size().columns - 1)
        line = line[:width]
        self._write(f"\r{line.ljust(len(self._line))}")
        self._line = line

    def _text(self, done: int) -> str:
        parts = [f"{self._name}: {human_bytes(done)}"]
        if self._total:
            parts[0] += f" of {human_bytes(self._total)}"
            parts.append(f"{min(1.0, done / self._total):.0%}")
        started, before = self._marks[0]
        seconds = self._clock() - started
        rate = (done - before) / seconds if seconds > 0 else 0.0
        if rate > 0:
            parts.append(f"{human_bytes(rate)}/s")
            if self._total and self._total > done:
                parts.append(f"{human_seconds((self._total - done) / rate)} left")
        return ", ".join(parts)

    def _write(self, text: str) -> None:
        if self._quiet:
            return
        # A reader that has gone must not stop a download.
        try:
            self._stream.write(text)
            self._stream.flush()
        except (BrokenPipeError, UnicodeEncodeError):
            self._quiet = True


def human_bytes(count: float) -> str:
    """A number of bytes in decimal units, such as `36.5 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def human_seconds(seconds: float) -> str:
    """A duration, such as `3 min 20 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
