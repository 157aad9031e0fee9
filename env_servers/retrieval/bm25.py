"""Index a corpus for BM25, in memory or in a folder that later starts map without reading.

A corpus file is read once; its passages and the index of their words are written together. The
folder is `retrieval/<key>` in the cache folder (`env_servers.caches`) unless another one is given.
The key depends on the file's bytes and the index's settings: a renamed file is not indexed again,
a changed one is.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from env_servers.caches import cache_folder
from env_servers.new_folder import new_folder
from env_servers.retrieval.corpus import Corpus, CorpusError, Found, Passage, encoded_string
from env_servers.retrieval.corpus_files import LeftOut, no_passage, read_corpus, unreadable
from env_servers.search.bm25 import BM25Index
from env_servers.search.builder import DuplicateIdError
from env_servers.search.storage import SearchIndexError, StringTable

_FORMAT = 3
"""Raise it when the files change, so that old folders are not opened."""
_DESCRIPTION, _CONTENTS, _OFFSETS, _BM25 = "corpus.json", "contents.bin", "offsets.npy", "bm25"
_REPORT_EVERY = 200_000
_HASH_BLOCK = 1 << 20

_LOG = logging.getLogger("env_servers")


class IndexedCorpus(NamedTuple):
    """Passages, and the index over their words."""

    corpus: Corpus
    bm25: BM25Index
    """Row numbers of its hits are rows of the corpus."""
    left_out: LeftOut
    """Rows of the file that are not used."""


class BM25Retriever:
    """Find passages by their words, as Lucene does."""

    name = "bm25"
    efficient_queries = 1

    def __init__(self, index: BM25Index) -> None:
        self._index = index
        about = index.description
        self.settings: Mapping[str, object] = {"k1": about.k1, "b": about.b}

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """Return the best passages that contain a word of the query: maybe fewer than `topk`."""
        return [
            [Found(hit.row, hit.score) for hit in hits]
            for hits in self._index.search_many(queries, topk)
        ]


def index_cache() -> Path:
    """Return the default folder for the indexes of corpus files."""
    return cache_folder() / "retrieval"


def index_passages(passages: Iterable[Passage], k1: float, b: float) -> IndexedCorpus:
    """Index a small corpus in memory.

    Raises:
        ValueError: k1 or b is out of range, or two ids are equal.
    """
    file = io.BytesIO()
    index, offsets = _index(passages, file, k1, b, None)
    table = StringTable(np.frombuffer(file.getbuffer(), dtype=np.uint8), offsets)
    return IndexedCorpus(Corpus(index.ids, table, index.description.content_hash), index, LeftOut())


def index_file(path: Path, k1: float, b: float, folder: Path | None = None) -> IndexedCorpus:
    """Open the index of a corpus file; build it first if there is none.

    Args:
        path: as in `read_corpus`.
        k1: as in `BM25Index.build`.
        b: as in `BM25Index.build`.
        folder: folder of the index; None: its place in the cache folder.

    Raises:
        CorpusError: the file cannot be read or has no passage, the folder cannot be used, or it
            contains the index of another corpus.
        ValueError: k1 or b is out of range.
    """
    description: dict[str, object] = {
        "format": _FORMAT, "file_hash": file_hash(path, index_cache() / "hashes"), "k1": k1, "b": b
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    folder = folder or index_cache() / key
    if folder.exists() and not folder.is_dir():
        raise CorpusError(f"{folder} is a file; give a folder as --index.")
    try:
        with new_folder(folder) as partial:
            if partial is not None:
                _build(path, description, partial)
        opened = _opened(folder, description)
    except (OSError, SearchIndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorpusError(
            f"Cannot use {folder}, the folder of the corpus' index: {reason}. Delete this"
            " folder if it exists (it is made again); it needs about twice the size of the"
            " unpacked corpus, and --index sets another folder."
        ) from error
    if opened.left_out.counts:
        number = opened.left_out.counts.total()
        rows = len(opened.corpus) + number
        _LOG.warning("%s: %d of %d rows are left out: %s.", path, number, rows, opened.left_out)
    return opened


def file_hash(path: Path, notes: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits.

    Args:
        path: the file.
        notes: folder with one note per file: its size, time of change, and hash. The hash is read
            from the note if size and time are unchanged, so that large files are not read at every
            start.

    Raises:
        CorpusError: the file cannot be read.
    """
    try:
        place = path.resolve()
        stat = place.stat()
        state = {"path": str(place), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        note = notes / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.json"
        with suppress(OSError, ValueError, TypeError, LookupError):
            known = json.loads(note.read_text(encoding="utf-8"))
            if known == {**state, "sha256": known["sha256"]}:
                return str(known["sha256"])
        digest = hashlib.sha256()
        with place.open("rb") as file:
            while block := file.read(_HASH_BLOCK):
                digest.update(block)
    except OSError as error:
        raise unreadable(path, error) from error
    # Without the note the file is only read again next time.
    with suppress(OSError):
        notes.mkdir(parents=True, exist_ok=True)
        fresh = note.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps({**state, "sha256": digest.hexdigest()}), encoding="utf-8")
        fresh.replace(note)
    return digest.hexdigest()


def _build(path: Path, description: Mapping[str, Any], folder: Path) -> None:
    """Fill an empty folder."""
    left_out = LeftOut()
    if next(read_corpus(path, left_out), None) is None:
        raise no_passage(path, left_out)
    _LOG.warning("First use of %s: building its index in %s.", path, folder.parent)

    def write(repeated: Collection[int] = ()) -> LeftOut:
        left_out = LeftOut()
        with (folder / _CONTENTS).open("wb") as file:
            passages = read_corpus(path, left_out, repeated)
            k1, b = description["k1"], description["b"]
            _, offsets = _index(passages, file, k1, b, folder / _BM25)
        np.save(folder / _OFFSETS, offsets, allow_pickle=False)
        return left_out

    try:
        left_out = write()
    except DuplicateIdError as error:
        # Rare, so the file is read again instead of keeping all ids in memory.
        left_out = write(frozenset(error.repeated))
    content = {
        "description": description,
        "left_out": left_out.counts,
        "first_left_out": left_out.first,
    }
    (folder / _DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")


def _index(
    passages: Iterable[Passage], contents: IO[bytes], k1: float, b: float, folder: Path | None
) -> tuple[BM25Index, NDArray[np.int64]]:
    """Index passages and write their contents to a file.

    Returns:
        The index, and the offset of each passage's contents: int64 [passages + 1].
    """
    offsets = array("q", [0])

    def written() -> Iterator[Passage]:
        for number, passage in enumerate(passages, start=1):
            offsets.append(offsets[-1] + contents.write(encoded_string(passage.contents)))
            yield passage
            if number % _REPORT_EVERY == 0:
                _LOG.warning("%d passages indexed.", number)

    index = BM25Index.build(written(), k1=k1, b=b, folder=folder)
    return index, np.array(offsets, dtype=np.int64)


def _opened(folder: Path, description: Mapping[str, object]) -> IndexedCorpus:
    try:
        found = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        # It may be the user's folder, so the advice is not to delete it.
        raise CorpusError(
            f"{folder} contains files but no index of a corpus. Give a new or empty folder as"
            " --index."
        ) from None
    except ValueError as error:
        raise SearchIndexError(f"it is damaged ({error})") from error
    if not isinstance(found, dict) or found.get("description") != description:
        raise CorpusError(
            f"{folder} contains the index of another corpus, or one with other settings. Give"
            " another --index, or delete this folder."
        )
    index = BM25Index.open(folder / _BM25)
    try:
        contents = np.memmap(folder / _CONTENTS, dtype=np.uint8, mode="r")
        offsets: NDArray[Any] = np.load(folder / _OFFSETS, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise SearchIndexError(f"it is damaged ({error})") from error
    shape = (len(index) + 1,)
    if offsets.dtype != np.int64 or offsets.shape != shape or offsets[-1] != len(contents):
        raise SearchIndexError(f"it is damaged ({_OFFSETS} and {_CONTENTS} do not fit)")
    table = StringTable(np.asarray(contents), np.asarray(offsets))
    corpus = Corpus(index.ids, table, index.description.content_hash)
    return IndexedCorpus(
        corpus, index, LeftOut(Counter(found["left_out"]), found["first_left_out"])
    )
