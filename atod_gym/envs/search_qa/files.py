"""Read the rows of data files: JSON lines or a JSON array, packed or not; name other formats.

The first bytes of a file decide its format, not its name.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

# Endings of files that may hold JSON (group 2), and of others, which are named in messages only.
_NAME: Final = re.compile(
    r"(.+?)\.(?:(jsonl|json|ndjson)(?:\.[gx]z)?|(?:tsv|csv|tar)(?:\.[gx]z)?"
    r"|parquet|arrow|zip|tgz|bz2|zst|7z)",
    re.IGNORECASE | re.DOTALL,
)
_UNPACK: Final[dict[bytes, Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7": lzma.open}
_FORMATS: Final = {
    rb"PK\x03\x04": "is a zip archive: unpack it",
    rb"7z\xbc\xaf\x27\x1c": "is a 7z archive: unpack it",
    rb"(?s).{257}ustar": "is a tar archive: unpack it",
    rb"BZh": "is packed by bzip2: unpack it",
    rb"\x28\xb5\x2f\xfd": "is packed by zstd: unpack it",
    rb"PAR1": "is parquet: write it as JSON lines, for example by pandas.read_parquet(..)"
    ".to_json(.., orient='records', lines=True)",
    rb"ARROW1": "is an Arrow file: write it as JSON lines, for example by "
    "datasets.Dataset.from_file(..).to_json(..)",
    rb"version https://git-lfs": "is a git-lfs pointer, not the data: run git lfs pull",
    rb"\xff\xfe|\xfe\xff": "is UTF-16 text: save it as UTF-8",
    rb"(?i)\s*<(?:!doctype|html)": "is an HTML page, not the data: download the file itself",
}
_CHUNK = 1 << 20
_LONGEST_ROW = 64 << 20
_BETWEEN = re.compile(r"[\s,]*")


class NotJson(str):
    """A line that is not JSON."""

    __slots__ = ()


class UnreadableError(ValueError):
    """A file that cannot be read; its message follows the path: `is a zip archive: unpack it`."""


def split_name(file_name: str) -> tuple[str, bool]:
    """Return a name without endings, and whether it may contain JSON; empty: not a data file."""
    match = _NAME.fullmatch(file_name)
    return (match[1], match[2] is not None) if match else ("", False)


def describe_text(row: object) -> str:
    """Return the reason why a file without JSON objects in its first rows is not read."""
    line = row if isinstance(row, NotJson) else ""
    if line.strip() == "{":
        return "is one JSON object, not rows: write one object per line"
    for mark, what in (("\t", "tabs"), (",", "commas")):
        if mark in line and not line.lstrip().startswith(("{", "[")):
            return f"is a table with {what} between columns: write it as JSON lines, a row each"
    return f"is not JSON lines: it begins with {row!r:.60}"


def read_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Read the rows of a file of JSON lines or of one JSON array, numbered from 1.

    Raises:
        UnreadableError: if the file has another format or is damaged; names it.
    """
    try:
        with path.open("rb") as raw, _as_text(raw) as stream:
            is_array = stream.read(4096).lstrip().startswith("[")
            stream.seek(0)
            if is_array:
                yield from enumerate(_items(stream), 1)
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parsed(line)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UnreadableError(f"is not UTF-8 text (byte 0x{byte:02x}): save it as UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UnreadableError(f"cannot be read: {error}") from error


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return NotJson(line)


def _items(stream: IO[str]) -> Iterator[object]:
    """Read the items of a JSON array one by one, as a file may be larger than the memory."""
    decoder = json.JSONDecoder()
    buffer, at = stream.read(_CHUNK).lstrip(), 1
    while True:
        at = _BETWEEN.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer.startswith("]", at):
            if any(text.strip() for text in chain([buffer[at + 1 :]], stream)):
                raise UnreadableError("has text after its JSON array: join the rows in one array")
            return
        try:
            item, end = decoder.raw_decode(buffer, at)
        except RecursionError as error:
            raise UnreadableError("is nested too deeply") from error
        except ValueError:
            end = len(buffer)
        if end < len(buffer):
            yield item
            at = end
            continue
        # Incomplete so far: a number, too, may continue in the next chunk.
        more = stream.read(max(_CHUNK, len(buffer)))
        if not more or len(buffer) > _LONGEST_ROW:
            raise UnreadableError("is an incomplete JSON array: repair it, or download it again")
        buffer, at = buffer[at:] + more, 0


def _as_text(stream: Any) -> TextIOWrapper:
    """Unpack a stream of bytes by the first ones; raise `UnreadableError` for another format."""
    for _ in range(2):
        unpack = _UNPACK.get(stream.peek(2)[:2])
        stream = unpack(stream) if unpack else stream
    head = stream.peek(512)
    for pattern, what in _FORMATS.items():
        if re.match(pattern, head):
            raise UnreadableError(what)
    return TextIOWrapper(stream, encoding="utf-8-sig")
