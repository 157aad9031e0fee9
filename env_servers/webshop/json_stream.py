"""Reads a JSON file entry by entry, however large it is.

The standard library's decoder is used on a window of the file that grows only when an entry does
not fit: several times faster than an event parser, and no more than one entry is held.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Iterator
from json.decoder import WHITESPACE, JSONDecoder  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, TextIO

from env_servers.webshop.products import ShopDataError

_CHUNK = 1 << 20
"""Characters read at once."""
_LARGEST_ENTRY = 64 << 20
"""More characters than that without a complete entry cannot be right."""
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError)


def read_array(path: Path) -> Iterator[Any]:
    """The entries of a file that is one JSON array.

    Args:
        path: `.json`, `.json.gz` or `.json.xz`, in UTF-8.

    Raises:
        ShopDataError: if the file cannot be read, ends early or is something else.
    """
    with _open(path) as file:
        window = _Window(path, file)
        window.take("[")
        if window.peek() != "]":
            yield window.value()
            while window.peek() == ",":
                window.take(",")
                yield window.value()
        window.take("]")
        window.end()


def read_object(path: Path) -> Iterator[tuple[str, Any]]:
    """The keys and values of a file that is one JSON object, as `read_array` does."""
    with _open(path) as file:
        window = _Window(path, file)
        window.take("{")
        if window.peek() != "}":
            yield window.pair()
            while window.peek() == ",":
                window.take(",")
                yield window.pair()
        window.take("}")
        window.end()


def _open(path: Path) -> TextIO:
    try:
        if path.suffix == ".gz":
            return gzip.open(path, "rt", encoding="utf-8")
        if path.suffix == ".xz":
            return lzma.open(path, "rt", encoding="utf-8")
        return path.open(encoding="utf-8")
    except OSError as error:
        raise ShopDataError(f"Cannot open {path}: {error.strerror or error}.") from error


class _Window:
    """The part of the file that is being looked at."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        self._start = 0
        self._passed = 0
        self._at_end = False
        self._decode = JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            self._start = WHITESPACE.match(self._text, self._start).end()
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._more():
                return ""

    def take(self, mark: str) -> None:
        found = self.peek()
        if found != mark:
            raise self._broken(f"expected {mark!r}, found {found!r}" if found else "it ends there")
        self._start += 1

    def pair(self) -> tuple[str, Any]:
        key = self.value()
        if not isinstance(key, str):
            raise self._broken("expected a key")
        self.take(":")
        return key, self.value()

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._start)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._start > _LARGEST_ENTRY or not self._more():
                    raise self._broken("this entry is not complete JSON") from error
                continue
            # A number at the end of the window may go on.
            if end < len(self._text) or not self._more():
                self._start = end
                return value

    def end(self) -> None:
        if self.peek():
            raise self._broken("the file should end there")

    def _more(self) -> bool:
        """Moves the window on to the entry that was begun, and reads as much again."""
        if self._at_end:
            return False
        pending = self._text[self._start :]
        self._passed += self._start
        self._start = 0
        try:
            chunk = self._file.read(max(_CHUNK, len(pending)))
        except _READ_ERRORS as error:
            raise ShopDataError(
                f"Cannot read {self._path}: {error}. Download or copy the file again."
            ) from error
        self._text = pending + chunk
        self._at_end = not chunk
        return bool(chunk)

    def _broken(self, what: str) -> ShopDataError:
        place = self._passed + self._start
        return ShopDataError(
            f"{self._path} is not in the official format: at character {place:,}, {what}. "
            "Download or copy the file again."
        )
