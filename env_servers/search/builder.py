"""Build the arrays of a search index from a stream of documents, with bounded memory.

Terms are collected in memory up to a number of tokens, sorted, and stored as a segment (in a
temporary folder if there is more than one); at the end the segments are merged. Memory
permanently holds the id and the length of every document, and the bytes of every term.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from env_servers.search import lucene
from env_servers.search.storage import ArrayStore, IndexArrays, IndexDescription, StringTable

SEGMENT_TOKENS = 1 << 22
"""Tokens per segment; each takes about 40 bytes of memory while a segment is sorted."""

MAX_SORTED_ID_BYTES = 64
"""Ids up to this length are sorted as an array; longer ones as Python strings."""


class DuplicateIdError(ValueError):
    """Two documents have the same id; `repeated` numbers those whose id occurred before."""

    def __init__(self, document_id: str, first: int, repeated: list[int]) -> None:
        super().__init__(
            f"documents {first} and {repeated[0]} have the same id {document_id!r}: ids must be"
            " different"
        )
        self.repeated = repeated


@dataclass(frozen=True)
class _Segment:
    """Postings of consecutive documents, in memory or on disk.

    The arrays: `terms` and `offsets` as in `StringTable`, `starts` and `docs` as in `IndexArrays`,
    and `keys` [postings], frequency * 256 + length byte.
    """

    arrays: Mapping[str, NDArray[Any]]
    """Empty if they are on disk."""
    folder: Path

    def load(self, name: str) -> NDArray[Any]:
        """Return one array; on disk it is mapped each time, so that memory is freed after use."""
        if self.arrays:
            return self.arrays[name]
        path = self.folder / f"{name}.npy"
        return np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None))

    def spilled(self) -> _Segment:
        """Write the segment to disk; return it."""
        self.folder.mkdir()
        for name, content in self.arrays.items():
            np.save(self.folder / f"{name}.npy", content, allow_pickle=False)
        return _Segment({}, self.folder)


class IndexBuilder:
    """Collects documents one by one; `finish` returns the index.

    The content hash is SHA-256 over, for each document in order, the byte lengths of id and text
    (8 bytes each, little-endian) and then both in UTF-8.

    Args:
        workspace: an empty folder for temporary files.
    """

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._analyzer = lucene.Analyzer()
        self._hash = hashlib.sha256()
        self._id_bytes = bytearray()
        self._id_offsets = array("q", [0])
        self._lengths = array("q")
        self._segments: list[_Segment] = []
        self._start_segment()

    def _start_segment(self) -> None:
        # A new term gets the next number.
        self._numbers: defaultdict[str, int] = defaultdict(count().__next__)
        self._tokens = array("i")
        self._first = len(self._lengths)

    def add(self, document_id: str, text: str) -> None:
        """Add the next document.

        Raises:
            ValueError: the id contains a NUL character.
        """
        id_bytes = document_id.encode("utf-8", "surrogatepass")
        if b"\0" in id_bytes:
            raise ValueError(f"a document id may not contain NUL characters: {document_id!r}")
        text_bytes = text.encode("utf-8", "surrogatepass")
        for part in (id_bytes, text_bytes):
            self._hash.update(len(part).to_bytes(8, "little"))
        self._hash.update(id_bytes)
        self._hash.update(text_bytes)
        self._id_bytes += id_bytes
        self._id_offsets.append(len(self._id_bytes))
        terms = self._analyzer(text)
        self._tokens.extend(map(self._numbers.__getitem__, terms))
        self._lengths.append(len(terms))
        if len(self._tokens) >= SEGMENT_TOKENS:
            self._segments.append(self._sorted_segment().spilled())
            self._start_segment()

    def finish(
        self, k1: float, b: float, store: ArrayStore
    ) -> tuple[IndexDescription, IndexArrays]:
        """Merge everything into arrays made by `store`.

        Raises:
            DuplicateIdError: two documents have the same id.
        """
        id_bytes = np.frombuffer(self._id_bytes, dtype=np.uint8)
        id_offsets = np.array(self._id_offsets, dtype=np.int64)
        ranks = _ranks(StringTable(id_bytes, id_offsets))
        if self._tokens or not self._segments:
            self._segments.append(self._sorted_segment())
        self._start_segment()
        lengths = np.array(self._lengths, dtype=np.int64)
        description = IndexDescription(
            k1=k1,
            b=b,
            documents=len(lengths),
            documents_with_terms=int(np.count_nonzero(lengths)),
            tokens=int(lengths.sum()),
            content_hash=self._hash.hexdigest(),
        )
        average = description.tokens / max(1, description.documents_with_terms)
        norms = lucene.inverse_norms(k1, b, max(average, 1.0))
        term_bytes, term_offsets, rows = _merged_terms(self._segments)
        starts = np.zeros(len(term_offsets), dtype=np.int64)
        for segment, own_rows in zip(self._segments, rows, strict=True):
            starts[own_rows + 1] += np.diff(segment.load("starts"))
        starts = np.cumsum(starts)
        docs, codes, factors = _merged_postings(self._segments, rows, starts, norms, store)
        arrays = IndexArrays(
            docs=docs,
            codes=codes,
            starts=store.filled("starts", starts),
            factors=store.filled("factors", factors),
            best=store.filled("best", _best_factors(starts, codes, factors)),
            term_bytes=store.filled("term_bytes", term_bytes),
            term_offsets=store.filled("term_offsets", term_offsets),
            id_bytes=store.filled("id_bytes", id_bytes),
            id_offsets=store.filled("id_offsets", id_offsets),
            ranks=store.filled("ranks", ranks),
        )
        return description, arrays

    def _sorted_segment(self) -> _Segment:
        """Return the postings of the documents since the last segment."""
        ordered = sorted(self._numbers)
        place = np.empty(len(ordered), dtype=np.int64)
        place[[self._numbers[term] for term in ordered]] = np.arange(len(ordered))
        lengths = np.array(self._lengths[self._first :], dtype=np.int64)
        # One number per token: the position of the term, then the document.
        tokens = place[np.frombuffer(self._tokens, dtype=np.int32)] << 32
        tokens |= np.repeat(np.arange(len(lengths)), lengths)
        tokens.sort()
        begins = np.flatnonzero(np.diff(tokens, prepend=-1))
        frequencies = np.diff(begins, append=len(tokens))
        tokens = tokens[begins]
        local_docs = tokens & 0xFFFFFFFF
        keys = np.minimum(frequencies, lucene.MAX_FREQUENCY) << 8
        keys |= lucene.encoded_lengths(lengths)[local_docs]
        encoded = [term.encode() for term in ordered]
        offsets = np.zeros(len(encoded) + 1, dtype=np.int64)
        np.cumsum([len(term) for term in encoded], out=offsets[1:])
        segment_arrays: dict[str, NDArray[Any]] = {
            "terms": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "offsets": offsets,
            "starts": np.searchsorted(tokens >> 32, np.arange(len(ordered) + 1)),
            "docs": (local_docs + self._first).astype(np.int32),
            "keys": keys.astype(np.uint32),
        }
        return _Segment(segment_arrays, self._workspace / str(len(self._segments)))


def _ranks(ids: StringTable) -> NDArray[np.int32]:
    """Return the rank of each id in byte order [documents]; no two may be equal."""
    longest = max((len(ids[row]) for row in range(len(ids))), default=0)
    if longest <= MAX_SORTED_ID_BYTES:
        keys = np.zeros(len(ids), dtype=f"S{max(1, longest)}")
        for begin in range(0, len(ids), 65536):
            end = min(len(ids), begin + 65536)
            keys[begin:end] = [ids[row] for row in range(begin, end)]
        order = np.argsort(keys, kind="stable")
        equal = np.flatnonzero(keys[order[1:]] == keys[order[:-1]])
    else:
        order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)
        pairs = pairwise(ids[row] for row in order)
        equal = np.array([place for place, (first, second) in enumerate(pairs) if first == second])
    if len(equal):
        first = int(order[equal[0]])
        raise DuplicateIdError(ids.texts([first])[0], first, order[equal + 1].tolist())
    ranks = np.empty(len(ids), dtype=np.int32)
    ranks[order] = np.arange(len(ids), dtype=np.int32)
    return ranks


def _merged_terms(
    segments: list[_Segment],
) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[NDArray[np.int32]]]:
    """Return all terms as in `StringTable`, and the rows in it of the terms of each segment."""
    content = bytearray()
    offsets = array("q", [0])
    rows = [array("i") for _ in segments]
    last: bytes | None = None
    tables = [StringTable(part.load("terms"), part.load("offsets")) for part in segments]
    streams = (
        zip(map(table.__getitem__, range(len(table))), repeat(number))
        for number, table in enumerate(tables)
    )
    for term, number in heapq.merge(*streams):
        if term != last:
            content += term
            offsets.append(len(content))
            last = term
        rows[number].append(len(offsets) - 2)
    return (
        np.frombuffer(content, dtype=np.uint8),
        np.array(offsets, dtype=np.int64),
        [np.array(row, dtype=np.int32) for row in rows],
    )


def _merged_postings(
    segments: list[_Segment],
    rows: list[NDArray[np.int32]],
    starts: NDArray[np.int64],
    norms: NDArray[np.float32],
    store: ArrayStore,
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.float32]]:
    """Return `docs` and `codes` of the index, and the factors of the codes."""
    keys = np.zeros(0, dtype=np.uint32)
    for segment in segments:
        keys = np.union1d(keys, segment.load("keys"))
    docs = store.new("docs", int(starts[-1]), "int32")
    codes = store.new("codes", int(starts[-1]), "uint16" if len(keys) <= 1 << 16 else "uint32")
    free = starts[:-1].copy()
    for segment, own_rows in zip(segments, rows, strict=True):
        local_starts = segment.load("starts")
        counts = np.diff(local_starts)
        places = np.repeat(free[own_rows] - local_starts[:-1], counts)
        places += np.arange(len(places))
        docs[places] = segment.load("docs")
        codes[places] = np.searchsorted(keys, segment.load("keys"))
        free[own_rows] += counts
    return docs, codes, lucene.factors((keys >> 8).astype(np.int64), norms[keys & 255])


def _best_factors(
    starts: NDArray[np.int64], codes: NDArray[np.uint16], factors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the largest factor of each term [terms], some million postings at a time."""
    best = np.zeros(len(starts) - 1, dtype=np.float32)
    begin = 0
    while begin < len(best):
        end = int(np.searchsorted(starts, starts[begin] + SEGMENT_TOKENS, side="right")) - 1
        end = max(end, begin + 1)
        first, last = int(starts[begin]), int(starts[end])
        best[begin:end] = np.maximum.reduceat(factors[codes[first:last]], starts[begin:end] - first)
        begin = end
    return best
