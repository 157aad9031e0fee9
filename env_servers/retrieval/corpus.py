"""Passages: read from the files that search agents use, and kept ready to be sent."""

from __future__ import annotations

import gzip
import json
import lzma
import tarfile
import zlib
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from env_servers.search.storage import StringTable

LONGEST_LINE = 64 << 20
"""Bytes of a line above which a file is not taken for JSON lines."""

_TAR_MARK = slice(257, 262)
_FIELDS = "Each line must be an object with 'contents', or with 'title' and 'text'"


class CorpusError(Exception):
    """A corpus that cannot be used; the message is one line that says what to do."""


class Passage(NamedTuple):
    """A row of a corpus."""

    id: str
    contents: str
    """The title in quotation marks, a line break, and the text."""


class Corpus:
    """Passages by row; safe to use from several threads.

    Args:
        ids: the passages' ids.
        encoded: their contents as JSON strings in UTF-8, so that answers need not encode them.
        content_hash: 64 hexadecimal digits that name ids and contents, in order.
    """

    def __init__(self, ids: StringTable, encoded: StringTable, content_hash: str) -> None:
        self._ids = ids
        self._encoded = encoded
        self.hash = content_hash

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self, rows: Sequence[int]) -> list[str]:
        """The ids of some rows."""
        return self._ids.texts(rows)

    def contents(self, rows: Sequence[int]) -> list[str]:
        """The contents of some rows."""
        return [json.loads(self._encoded[row]) for row in rows]

    def encoded_contents(self, row: int) -> bytes:
        """The contents of a row as a JSON string."""
        return self._encoded[row]


class ContentsWriter:
    """Collects contents as `Corpus` keeps them, in a file or in memory."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file
        self._bytes = bytearray()
        self._offsets = array("q", [0])

    def add(self, contents: str) -> None:
        """Appends one passage's contents."""
        encoded = encoded_string(contents)
        self._offsets.append(self._offsets[-1] + len(encoded))
        if self._file is None:
            self._bytes += encoded
        else:
            self._file.write(encoded)

    def offsets(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """int64 [passages + 1], where each begins."""
        return np.array(self._offsets, dtype=np.int64)

    def table(self) -> StringTable:
        """What was collected in memory."""
        return StringTable(np.frombuffer(self._bytes, dtype=np.uint8), self.offsets())


def encoded_string(text: str) -> bytes:
    """A text as JSON in UTF-8; in ASCII if it has lone surrogates, which UTF-8 cannot carry."""
    try:
        return json.dumps(text, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(text).encode()


def read_corpus(path: Path) -> Iterator[Passage]:
    """The passages of a file of JSON lines, one after the other.

    A line is `{"id", "contents"}` or `{"id", "title", "text"}`; the id is a text or a whole number,
    and where there is none the number of the passage in the file, from 0. Other fields and empty
    lines do not count. That ids are different is not looked at here.

    Args:
        path: a .jsonl file, as it is or compressed as .gz or .xz; a .gz that holds a tar archive,
            as the published wiki-18.jsonl.gz is said to, gives its first .jsonl file.

    Raises:
        CorpusError: if there is no such file, or a line is wrong; names the line.
    """
    for _, passage in _numbered(path):
        yield passage


def lines_with_id(path: Path, passage_id: str) -> list[int]:
    """The numbers of the lines that have an id; errors as of `read_corpus`."""
    return [number for number, passage in _numbered(path) if passage.id == passage_id]


def _numbered(path: Path) -> Iterator[tuple[int, Passage]]:
    rows = 0
    for number, line in _lines(path):
        if line.isspace():
            continue
        try:
            passage = _parsed(line, rows)
        except CorpusError as error:
            raise CorpusError(f"{path}, line {number}: {error}") from None
        yield number, passage
        rows += 1


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if len(line) == LONGEST_LINE:
                    raise CorpusError(
                        f"{path}, line {number} is longer than {LONGEST_LINE} bytes. Is this a file"
                        " of JSON lines, one passage a line?"
                    )
                yield number, line
    except FileNotFoundError:
        raise CorpusError(f"There is no corpus file {path}.") from None
    except IsADirectoryError:
        raise CorpusError(f"{path} is a folder; give the corpus file in it.") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(f"Cannot read {path} after line {number}: {reason}.") from error


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        with gzip.open(path, "rb") as unpacked:
            is_tar = unpacked.read(512)[_TAR_MARK] == b"ustar"
        if is_tar:
            # Not "r|gz", which does not notice where a compressed file was cut.
            with (
                gzip.open(path, "rb") as unpacked,
                tarfile.open(fileobj=unpacked, mode="r|") as archive,
            ):
                yield _member(archive, path)
            return
    opened: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, Path.open)
    with opened(path, "rb") as file:
        yield file


def _member(archive: tarfile.TarFile, path: Path) -> IO[bytes]:
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        if file is not None and member.name.endswith(".jsonl"):
            return file
    raise CorpusError(f"{path} is a tar archive without a .jsonl file.")


def _parsed(line: bytes, row: int) -> Passage:
    try:
        # A byte order mark can stand at the beginning of a file.
        fields = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"This is not JSON in UTF-8 ({error}). {_FIELDS}.") from None
    if not isinstance(fields, dict):
        raise CorpusError(f"This is no JSON object. {_FIELDS}.")
    passage_id = fields.get("id", row)
    if isinstance(passage_id, bool) or not isinstance(passage_id, str | int):
        raise CorpusError("'id' must be a text or a whole number.")
    if isinstance(passage_id, str) and "\0" in passage_id:
        raise CorpusError("'id' has a NUL character; remove it.")
    if "contents" in fields:
        contents = _text(fields, "contents")
    else:
        contents = f'"{_text(fields, "title")}"\n{_text(fields, "text")}'
    return Passage(str(passage_id), contents)


def _text(fields: dict[str, object], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        problem = f"{name!r} must be a text" if name in fields else f"There is no {name!r}"
        raise CorpusError(f"{problem}. {_FIELDS}.")
    return value
