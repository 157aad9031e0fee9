"""Store the arrays of a search index, in memory or as a folder of mapped .npy files.

The folder has one file per array and `index.json` with all other values.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT = "atod-bm25"
VERSION = 1
DESCRIPTION_FILE = "index.json"


class SearchIndexError(Exception):
    """A folder that is not a usable search index; the message has reason and remedy."""


class StringTable:
    """Strings as one run of UTF-8 bytes with offsets: a few bytes of overhead each.

    Args:
        content: uint8 [bytes], all strings one after the other.
        offsets: int64 [strings + 1], the start of each; the last is the number of bytes.
    """

    def __init__(self, content: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self._content = content.data
        self._offsets = offsets.data

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> bytes:
        """Return the UTF-8 bytes of one string."""
        return bytes(self._content[self._offsets[row] : self._offsets[row + 1]])

    def texts(self, rows: Sequence[int]) -> list[str]:
        """Return the strings of some rows."""
        content, offsets = self._content, self._offsets
        return [
            str(content[offsets[row] : offsets[row + 1]], "utf-8", "surrogatepass") for row in rows
        ]

    def find(self, text: str) -> int | None:
        """Find the row of a string by binary search; the table must be sorted by bytes."""
        wanted = text.encode("utf-8", "surrogatepass")
        row = bisect_left(self, wanted)
        return row if row < len(self) and self[row] == wanted else None


@dataclass(frozen=True)
class IndexDescription:
    """The content of `index.json`, without the arrays."""

    k1: float
    b: float
    documents: int
    documents_with_terms: int
    tokens: int
    """Sum of the documents' lengths in terms."""
    content_hash: str
    """SHA-256 over ids and texts in order, see `IndexBuilder`."""


@dataclass(frozen=True)
class IndexArrays:
    """Postings by term: those of term t are at `starts[t]:starts[t + 1]`, documents ascending."""

    docs: NDArray[np.int32]
    """[postings], the document's row."""
    codes: NDArray[np.uint16] | NDArray[np.uint32]
    """[postings], index into `factors`: frequency and document length in one number."""
    starts: NDArray[np.int64]
    """[terms + 1]"""
    factors: NDArray[np.float32]
    """[codes], see `lucene.factors`."""
    best: NDArray[np.float32]
    """[terms], the largest factor among the term's postings."""
    term_bytes: NDArray[np.uint8]
    term_offsets: NDArray[np.int64]
    """Both as in `StringTable`; terms are sorted by their bytes."""
    id_bytes: NDArray[np.uint8]
    id_offsets: NDArray[np.int64]
    """Both as in `StringTable`; ids in document order."""
    ranks: NDArray[np.int32]
    """[documents], the rank of the document's id among all ids sorted by their bytes."""


ARRAY_TYPES = {
    field.name: re.findall(r"np\.(\w+)", str(field.type)) for field in fields(IndexArrays)
}
"""The possible number formats of each array, from its annotation."""


class ArrayStore:
    """Makes new arrays: in memory, or as .npy files in a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def new(self, name: str, length: int, dtype: str) -> NDArray[Any]:
        """Make an array [length] to be filled.

        Raises:
            OSError: the disk is full.
        """
        array: NDArray[Any]
        if self._folder is None or length == 0:
            array = np.empty(length, dtype)
            if self._folder is not None:
                np.save(self._folder / f"{name}.npy", array, allow_pickle=False)
            return array
        path = self._folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(length,))
        # With a full disk, writing to mapped memory would end the process with a signal.
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def filled(self, name: str, content: NDArray[Any]) -> NDArray[Any]:
        """Make an array with this content."""
        array = self.new(name, len(content), content.dtype.name)
        array[:] = content
        return array


def write_description(folder: Path, description: IndexDescription, arrays: IndexArrays) -> None:
    """Write `index.json`; the arrays' files exist already."""
    shapes = {
        name: {"dtype": array.dtype.name, "length": len(array)}
        for name, array in vars(arrays).items()
    }
    content = {"format": FORMAT, "version": VERSION, **asdict(description), "arrays": shapes}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def open_folder(folder: Path) -> tuple[IndexDescription, IndexArrays]:
    """Map the arrays of a folder; only `index.json` is read.

    Raises:
        SearchIndexError: the folder is missing, damaged, or of another program or version.
    """
    content = _read_description(folder)
    try:
        description = IndexDescription(
            **{field.name: content[field.name] for field in fields(IndexDescription)}
        )
        arrays = IndexArrays(
            **{name: _mapped(folder, name, **content["arrays"][name]) for name in ARRAY_TYPES}
        )
        _check(folder, description, arrays)
    except (KeyError, TypeError) as error:
        raise _damaged(folder, f"{DESCRIPTION_FILE}: {error!r}") from error
    return description, arrays


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SearchIndexError(
            f"{folder} is not a search index, it has no {DESCRIPTION_FILE}: build one with"
            " BM25Index.build(documents, folder=...)"
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(folder, f"{DESCRIPTION_FILE}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SearchIndexError(f"{folder} is not a search index of this program; give another one")
    if content.get("version") != VERSION:
        raise SearchIndexError(
            f"{folder} has version {content.get('version')!r} of the index format, this program"
            f" reads {VERSION}: delete the folder and build the index again"
        )
    return content


def _mapped(folder: Path, name: str, dtype: str, length: int) -> NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        array: NDArray[Any]
        if length:
            array = np.lib.format.open_memmap(path, mode="r")
        else:
            # An empty array cannot be mapped.
            with path.open("rb") as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(folder, f"{path.name}: {error}") from error
    if dtype not in ARRAY_TYPES[name] or (array.dtype.name, array.shape) != (dtype, (length,)):
        raise _damaged(folder, f"{path.name} is not an array of {length!r} {dtype!r}")
    return np.asarray(array)


def _check(folder: Path, description: IndexDescription, arrays: IndexArrays) -> None:
    """Check everything that does not require reading the arrays."""
    terms, documents = len(arrays.best), description.documents
    ends = (
        (arrays.starts, terms, len(arrays.docs)),
        (arrays.term_offsets, terms, len(arrays.term_bytes)),
        (arrays.id_offsets, documents, len(arrays.id_bytes)),
    )
    if (
        any(len(o) != count + 1 or o[0] != 0 or o[-1] != end for o, count, end in ends)
        or len(arrays.codes) != len(arrays.docs)
        or len(arrays.ranks) != documents
    ):
        raise _damaged(folder, "its arrays do not fit each other")


def _damaged(folder: Path, reason: str) -> SearchIndexError:
    return SearchIndexError(
        f"the search index {folder} is damaged ({reason}): delete it and build it again"
    )
