"""Find and read the files of a shop in the official format."""

from __future__ import annotations

import gzip
import hashlib
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from json import JSONDecoder
from pathlib import Path
from typing import Any, TextIO, cast

from env_servers.webshop.products import Instruction, ShopDataError, parse_human_instruction

_FORMAT = "2"
"""Raise it when the stored catalogue changes, so that old ones are not opened."""

_CHUNK = 1 << 20
"""Number of characters, or bytes, read at a time."""
_LARGEST_ENTRY = 64 << 20
"""Maximum length of an entry; a longer incomplete one is an error."""
_READ_ERRORS = (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError)
_SPACES = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True, slots=True)
class DataFiles:
    """The files of one shop."""

    items: Path
    """The products: a JSON array of objects."""
    attributes: Path
    """asin -> attributes and synthetic instruction: a JSON object."""
    human: Path | None
    """asin -> list of human instructions: a JSON object."""

    @classmethod
    def find(cls, folder: str) -> DataFiles:
        """Find the files by their official names, `.json`, `.json.gz` or `.json.xz`.

        Raises:
            ShopDataError: if the folder or a file is missing.
        """
        path = folder_of(folder)
        if not path.is_dir():
            raise ShopDataError(
                f"There is no folder {folder}. Give a folder with the official files "
                "items_shuffle_1000.json and items_ins_v2_1000.json (or items_shuffle.json and "
                'items_ins_v2.json), or use data="generated".'
            )
        # The small set is preferred, as by the original.
        items = _first(path, "items_shuffle_1000", "items_shuffle")
        number = "_1000" if items is not None and "items_shuffle_1000" in items.name else ""
        attributes = _first(path, f"items_ins_v2{number}", "items_ins_v2")
        if items is None or attributes is None:
            missing = "items_shuffle_1000" if items is None else f"items_ins_v2{number}"
            raise ShopDataError(
                f"{folder} has no {missing}.json (.gz and .xz are fine too). The original's "
                'setup.sh downloads it; data="generated" needs no files.'
            )
        # The subset has the instructions for products of the small set.
        human = _first(path, "items_human_ins", "items_human_ins_subset13")
        return cls(items, attributes, human)

    def read_items(self) -> Iterator[Mapping[str, Any]]:
        """Read the entries of the product file.

        Raises:
            ShopDataError: if the file is damaged or has another form.
        """
        for place, item in enumerate(read_array(self.items)):
            if not isinstance(item, dict):
                raise ShopDataError(
                    f"{self.items}: entry {place} is not an object. The file must be a list of "
                    "products as in items_shuffle_1000.json."
                )
            yield item

    def read_attributes(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Read the entries of the attribute file by asin; errors as in `read_items`."""
        for asin, entry in read_object(self.attributes):
            if not isinstance(entry, dict):
                raise ShopDataError(
                    f"{self.attributes}: the entry of {asin!r} is not an object. The file must be "
                    "as items_ins_v2_1000.json."
                )
            yield asin, entry

    def read_human(self) -> dict[str, tuple[Instruction, ...]]:
        """Read the human instructions by asin.

        Raises:
            ShopDataError: if the file is missing or damaged.
        """
        if self.human is None:
            raise ShopDataError(
                f"{self.items.parent} has no items_human_ins.json, which human_goals=True needs. "
                "The original's setup.sh downloads it."
            )
        found = {}
        for asin, entries in read_object(self.human):
            try:
                found[asin] = tuple(parse_human_instruction(entry) for entry in entries)
            except (TypeError, AttributeError, ValueError) as error:
                raise ShopDataError(
                    f"{self.human}: the entry of {asin!r} is not as in the official file: {error}. "
                    "Download the file again."
                ) from error
        return found

    def cache_key(self) -> str:
        """Return a key that changes with the size or modification time of a catalogue file."""
        stats = [path.stat() for path in (self.items, self.attributes)]
        text = ":".join([_FORMAT, *(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def hashes(self) -> tuple[str, ...]:
        """Return `content_sha256` of the product and the attribute file."""
        return content_sha256(self.items), content_sha256(self.attributes)


def folder_of(data: str) -> Path:
    """Return the folder of a setting; `~user` stays if there is no such home folder."""
    return Path(os.path.expanduser(data))


def _first(folder: Path, *names: str) -> Path | None:
    paths = (folder / f"{name}.json{suffix}" for name in names for suffix in ("", ".gz", ".xz"))
    return next(filter(Path.is_file, paths), None)


def content_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, of a compressed file that of its content.

    Raises:
        ShopDataError: if the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with _opener(path)(path, "rb") as file:
            while block := file.read(_CHUNK):
                digest.update(block)
    except _READ_ERRORS as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def read_array(path: Path) -> Iterator[Any]:
    """Read the entries of a file in UTF-8 that is one JSON array of any size.

    The standard library's decoder works on a window of the file that grows only when an entry does
    not fit. An event parser (ijson with its C backend) took 1.2 times as long, refuses NaN, which
    Python writes, and needs memory quadratic in the depth of the data.

    Raises:
        ShopDataError: if the file cannot be read, ends early or has another form.
    """
    return _entries(path, "[]", _Window.value)


def read_object(path: Path) -> Iterator[tuple[str, Any]]:
    """Read the keys and values of a file that is one JSON object, as `read_array` does."""
    return _entries(path, "{}", _Window.pair)


def _entries(path: Path, marks: str, read: Any) -> Iterator[Any]:
    with open_text(path) as file:
        window = _Window(path, file)
        window.take(marks[0])
        if window.peek() != marks[1]:
            yield read(window)
            while window.peek() == ",":
                window.take(",")
                yield read(window)
        window.take(marks[1])
        if window.peek():
            raise window.broken("the file should end there")


def open_text(path: Path) -> TextIO:
    """Open a file, packed or not, as text; raises `ShopDataError` if it cannot be opened."""
    try:
        return cast("TextIO", _opener(path)(path, "rt", encoding="utf-8"))
    except OSError as error:
        raise ShopDataError(f"Cannot open {path}: {error.strerror or error}.") from error


def _opener(path: Path) -> Any:
    openers: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(path.suffix, open)


def _unreadable(path: Path, error: Exception) -> ShopDataError:
    return ShopDataError(f"Cannot read {path}: {error}. Download or copy the file again.")


class _Window:
    """The part of the file that is being parsed."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path = path
        self._file = file
        self._text = ""
        # Of the current entry: its position in the text, and the characters before the text.
        self._start = self._passed = 0
        self._at_end = False
        self._decode = JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not white space; empty at the end of the file."""
        while True:
            self._start = cast("re.Match[str]", _SPACES.match(self._text, self._start)).end()
            if self._start < len(self._text):
                return self._text[self._start]
            if not self._more():
                return ""

    def take(self, mark: str) -> None:
        found = self.peek()
        if found != mark:
            raise self.broken(f"expected {mark!r}, found {found!r}" if found else "it ends there")
        self._start += 1

    def pair(self) -> tuple[str, Any]:
        key = self.value()
        if not isinstance(key, str):
            raise self.broken("expected a key")
        self.take(":")
        return key, self.value()

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._start)
            except (ValueError, RecursionError) as error:
                if len(self._text) - self._start > _LARGEST_ENTRY or not self._more():
                    raise self.broken("this entry is not complete JSON") from error
                continue
            # A number at the end of the window may continue after it.
            if end < len(self._text) or not self._more():
                self._start = end
                return value

    def _more(self) -> bool:
        """Move the window to the current entry, and read the same amount again."""
        if self._at_end:
            return False
        pending = self._text[self._start :]
        self._passed += self._start
        self._start = 0
        try:
            chunk = self._file.read(max(_CHUNK, len(pending)))
        except _READ_ERRORS as error:
            raise _unreadable(self._path, error) from error
        self._text = pending + chunk
        self._at_end = not chunk
        return bool(chunk)

    def broken(self, what: str) -> ShopDataError:
        place = self._passed + self._start
        return ShopDataError(
            f"{self._path} is not in the official format: at character {place:,}, {what}. "
            "Download or copy the file again."
        )
