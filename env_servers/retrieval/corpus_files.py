"""Read passages from corpus files in common formats.

A file contains JSON lines, a JSON array, or tab-separated lines under a header (DPR's `id text
title`), plain or in gzip, xz or tar. The format is detected from its bytes, never from its name.

A row has its text in `contents`, or in `text`; its title, if any, in `title` or in the first line
of `contents`; its id in `id`, `_id` or `docid`. The id of a row without one is its number in the
file, from 0. Other fields are ignored. Rows that cannot be used are left out and counted.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from copy import copy
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path, PurePosixPath
from typing import IO, Any

import ijson

from env_servers.retrieval.corpus import CorpusError, Passage

LONGEST_LINE = 64 << 20
"""A file with a longer line, in bytes, is not JSON lines."""
HEAD_BYTES = 1 << 20
"""Number of bytes of content from which format and encoding are detected."""
MOST_BAD_ROWS = 1000
"""If a file begins with this many rows without a passage, reading stops."""

_ID_NAMES = ("id", "_id", "docid")
_TEXT_NAMES = ("contents", "text")
_BOM = b"\xef\xbb\xbf"
_LAYERS = 3
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open}
_TAR_MARK = slice(257, 262)
_TAR_MEMBERS = (".jsonl", ".json", ".tsv")
_NO_UTF8 = re.compile("[\udc80-\udcff]")
_AS_LINES = "write its rows as JSON lines, such as {'id': .., 'title': .., 'text': ..}"
_IN_IT = "unpack it and give the corpus file inside"
_HTML = "an HTML page, perhaps the error page of a download: download the file again"
_UTF16 = "text in UTF-16: convert it with `iconv -f UTF-16 -t UTF-8`"
_FOREIGN = {
    b"PK\3\4": f"a zip archive: {_IN_IT}",
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive: {_IN_IT}",
    b"BZh": "compressed by bzip2: unpack it with bunzip2",
    b"\x28\xb5\x2f\xfd": "compressed by zstandard: unpack it with `zstd -d`",
    b"PAR1": "a parquet file: write it as JSON lines, with pandas.read_parquet(..).to_json(..,"
    " orient='records', lines=True)",
    b"ARROW1": f"an Arrow file: {_AS_LINES}",
    b"\xff\xff\xff\xff": f"an Arrow file: {_AS_LINES}",
    b"\x80": f"a pickle file or other binary data: {_AS_LINES}",
    b"\x93NUMPY": "a NumPy array; vectors of passages are given with --vectors",
    b"SQLite format 3": f"an SQLite database: {_AS_LINES}",
    b"%PDF": f"a PDF document: {_AS_LINES}",
    b"version https://git-lfs": "a git-lfs pointer in place of the file: run `git lfs pull`, or"
    " download the file itself",
    b"\xff\xfe": _UTF16,
    b"\xfe\xff": _UTF16,
    b"<!doctype html": _HTML,
    b"<html": _HTML,
    b"<": f"XML or TREC text: {_AS_LINES}",
}
"""Kind of a file that begins with these bytes (in lower case, perhaps after spaces)."""


@dataclass
class LeftOut:
    """Rows of a corpus file that are not used, counted by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    first: str = ""
    """Place of the first one, and its problem."""

    def add(self, place: str, reason: str, detail: str = "") -> None:
        """Count a row; `detail` is shown for the first one only."""
        self.first = self.first or f"{place}{detail}"
        self.counts[reason] += 1

    def __str__(self) -> str:
        """Return the counts and the first row as one phrase."""
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        return f"{reasons} (the first: {self.first})"


class _RowError(Exception):
    """Why a row cannot be used, and details for the first such row."""


def read_corpus(path: Path, left_out: LeftOut, repeated: Collection[int] = ()) -> Iterator[Passage]:
    """Yield the passages of a file.

    Args:
        path: the file.
        left_out: counts the rows that are not used.
        repeated: numbers of passages, from 0, whose ids occurred before; ids are not compared here.

    Raises:
        CorpusError: the file cannot be read, or its format is none of this module's.
    """
    place = "the start"
    number = 0
    try:
        with _opened(path) as file:
            for row, (place, value) in enumerate(_rows(path, file)):
                try:
                    passage = _passage(value, row)
                    number += 1
                    if number - 1 in repeated:
                        raise _RowError("with the id of an earlier row", f" ({passage.id!r})")
                except _RowError as error:
                    left_out.add(place, *error.args)
                    if not number and left_out.counts.total() >= MOST_BAD_ROWS:
                        raise no_passage(path, left_out) from None
                else:
                    yield passage
    except (OSError, EOFError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
        raise unreadable(path, error, f" after {place}") from error


def unreadable(path: Path, error: Exception, place: str = "") -> CorpusError:
    """Return the error for a file that cannot be opened or read."""
    if isinstance(error, FileNotFoundError):
        return CorpusError(f"There is no corpus file {path}.")
    if isinstance(error, IsADirectoryError):
        return CorpusError(f"{path} is a folder; give the corpus file inside.")
    return CorpusError(f"Cannot read {path}{place}: {getattr(error, 'strerror', None) or error}.")


def no_passage(path: Path, left_out: LeftOut) -> CorpusError:
    """Return the error for a file without a passage."""
    found = f": {left_out}" if left_out.counts else ""
    return CorpusError(
        f"{path} contains no passage{found}. A row needs a text in 'contents', or in 'text' with or"
        " without 'title'."
    )


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file; it is unpacked while it is read."""
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        for _ in range(_LAYERS):
            head = file.read(512)
            file.seek(0)
            opener = next((open for mark, open in _OPENERS.items() if head.startswith(mark)), None)
            if opener is not None:
                file = stack.enter_context(opener(file, "rb"))
            elif head[_TAR_MARK] == b"ustar":
                archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
                file = stack.enter_context(_member(archive, path))
            else:
                break
        yield file


def _member(archive: tarfile.TarFile, path: Path) -> IO[bytes]:
    for member in archive:
        file = archive.extractfile(member) if member.isfile() else None
        # macOS adds a file of attributes before each file, named like it after a prefix `._`.
        is_hidden = PurePosixPath(member.name).name.startswith(".")
        if file is not None and member.name.endswith(_TAR_MEMBERS) and not is_hidden:
            return file
    names = " or ".join(_TAR_MEMBERS)
    raise CorpusError(f"{path} is a tar archive without a {names} file.")


def _rows(path: Path, file: IO[bytes]) -> Iterator[tuple[str, object]]:
    """Yield place and value of every row; a value may be a `_RowError`."""
    head = file.read(HEAD_BYTES)
    _check_kind(path, head)
    start = len(_BOM) if head.startswith(_BOM) else 0
    file.seek(start)
    first_line = head[start:].lstrip().partition(b"\n")[0].rstrip()
    columns = [name.strip('"') for name in first_line.decode("utf-8", "replace").split("\t")]
    if first_line.startswith(b"["):
        return _json_values(path, ijson.items(file, "item"))
    if first_line == b"{":
        # Indented objects, one after the other.
        return _json_values(path, ijson.items(file, "", multiple_values=True))
    if len(columns) > 1 and not {"contents", "text"}.isdisjoint(columns):
        return _table_rows(file, columns)
    return _json_lines(path, file)


def _check_kind(path: Path, head: bytes) -> None:
    """Refuse a file that is not text in UTF-8, with its kind."""
    begin = head[:2000].removeprefix(_BOM).lstrip().lower()
    for mark, kind in _FOREIGN.items():
        if head.startswith(mark) or begin.startswith(mark):
            raise CorpusError(f"{path} is {kind}.")
    if b"\0" in head:
        raise CorpusError(f"{path} is a binary file of unknown kind: {_AS_LINES}.")
    if _is_latin(head):
        raise CorpusError(
            f"{path} is not in UTF-8, perhaps in Latin-1: convert it with"
            " `iconv -f LATIN1 -t UTF-8`."
        )


def _is_latin(head: bytes) -> bool:
    """Return whether more lines are invalid UTF-8 than valid beyond ASCII, and at least 1 %."""
    if head.isascii():
        return False
    lines = head.split(b"\n")
    if len(head) >= HEAD_BYTES:
        # The last line may be cut within a letter.
        lines[-1] = lines[-1].rstrip(bytes(range(0x80, 0x100)))
    wrong = right = 0
    for line in lines:
        try:
            right += not line.isascii() and bool(line.decode())
        except UnicodeDecodeError:
            wrong += 1
    return wrong > right and wrong * 100 >= len(lines)


def _json_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[str, object]]:
    lines = iter(partial(file.readline, LONGEST_LINE), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) == LONGEST_LINE:
            raise CorpusError(
                f"{path}, line {number} is longer than {LONGEST_LINE} bytes. Is this a file of JSON"
                " lines, one passage a line?"
            )
        if line.isspace():
            continue
        value: object
        try:
            value = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            value = _RowError("not JSON in UTF-8", f" ({error})")
        yield f"line {number}", value


def _json_values(path: Path, values: Iterator[object]) -> Iterator[tuple[str, object]]:
    number = 0
    try:
        for number, value in enumerate(values, start=1):
            yield f"row {number}", value
    except (ijson.JSONError, ValueError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CorpusError(
            f"{path} is damaged after row {number}: it is not JSON in UTF-8 ({reason})."
        ) from None


def _table_rows(file: IO[bytes], columns: list[str]) -> Iterator[tuple[str, object]]:
    number = 1
    while not file.readline().strip():
        number += 1
    with io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="\n") as text:
        for lines, cells in _records(text, len(columns) - 1):
            number += lines
            value: object
            if cells == [""]:
                continue
            if len(cells) != len(columns):
                value = _RowError("with another number of columns than the header")
            elif any(map(_NO_UTF8.search, cells)):
                value = _RowError("not in UTF-8")
            else:
                value = dict(zip(columns, cells, strict=True))
            yield f"line {number}", value


def _records(text: Iterator[str], tabs: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of lines and the cells of each row: a line, or several in quotation marks.

    A quotation mark that is never closed must not swallow the rows after it. So a line is taken as
    it stands unless the csv module reads it, or it and the next ones with as many tabs together.
    """
    lines = tee(text, 1)[0]
    for line in lines:
        number, cells = 1, line.rstrip("\r\n").split("\t")
        if any(cell.startswith('"') for cell in cells):
            reader = csv.reader(chain([line], copy(lines)), delimiter="\t", strict=True)
            with suppress(csv.Error):
                quoted = next(reader)
                more = "".join(islice(copy(lines), reader.line_num - 1)).count("\t")
                if len(quoted) == tabs + 1 and (not more or line.count("\t") + more == tabs):
                    number, cells = reader.line_num, quoted
        yield number, cells
        for _ in range(number - 1):
            next(lines)


def _passage(fields: object, row: int) -> Passage:
    if isinstance(fields, _RowError):
        raise fields
    if not isinstance(fields, dict):
        raise _RowError("that is no JSON object")
    given = [name for name in _TEXT_NAMES if fields.get(name) is not None]
    if not given:
        names = ", ".join(map(repr, list(fields)[:10]))[:200] or "none"
        raise _RowError("without 'contents' and 'text'", f" (its fields: {names})")
    name = next((name for name in given if not _is_missing(fields[name])), given[0])
    text = fields[name]
    if not isinstance(text, str):
        raise _RowError(f"with {name!r} that is no text")
    title = _text(fields, "title")
    if "\n" in title:
        # Only the line break after the title may end it.
        title = " ".join(title.split())
    passage_id = next(filter(None, (_text(fields, name) for name in _ID_NAMES)), str(row))
    if name == "contents":
        first, line_break, rest = text.partition("\n")
        own_title = first.strip()
        is_quoted = len(own_title) > 1 and own_title[0] == own_title[-1] == '"'
        if is_quoted:
            own_title = own_title[1:-1]
        has_title = bool(line_break) and (is_quoted or bool(rest.strip()))
        if has_title and title in ("", own_title):
            return Passage(passage_id, text)
    return Passage(passage_id, f'"{title}"\n{text}')


def _text(fields: dict[str, object], name: str) -> str:
    """Return a title or an id; empty if it is missing."""
    value = fields.get(name)
    if _is_missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise _RowError(f"with {name!r} that is no text and no number")
    if "\0" in str(value) and name in _ID_NAMES:
        raise _RowError(f"with a NUL character in {name!r}")
    return str(value)


def _is_missing(value: object) -> bool:
    """Return whether a field is null, blank, or NaN, which marks missing values in tables."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())
