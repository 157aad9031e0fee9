"""BM25 search with the ranking of Anserini (pyserini) on Lucene 9, without Java.

A query is a bag of words, without operators and phrases. Equal scores are ordered by document id,
as strings. Order and scores are Lucene's. Two details may differ from pyserini's output: pyserini
rounds the reported scores and separates ties by 0.000001, and a document whose score rounds to
zero is not a hit here.
"""

from __future__ import annotations

import operator
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from env_servers.new_folder import new_folder
from env_servers.search import lucene
from env_servers.search.builder import IndexBuilder
from env_servers.search.storage import (
    ArrayStore,
    IndexArrays,
    IndexDescription,
    SearchIndexError,
    StringTable,
    open_folder,
    write_description,
)

KEPT_TERMS = 50_000
"""Number of terms whose postings are cached; beyond it the cache is cleared. Terms that are not in
the index are never cached: clients could fill the memory with them."""

SMALL_INDEX = 1 << 16
"""Up to this number of documents all of them are scored at once."""

# Bounds are compared with this margin, far above the rounding of float32 sums.
_MARGIN = 1 - 1e-6


class Hit(NamedTuple):
    """One document of a result."""

    row: int
    """The document's position in the input of `build`, from 0."""
    id: str
    score: float
    """Lucene's float32 score; larger is better."""


class _Term(NamedTuple):
    """A term of the index."""

    docs: NDArray[np.int32]
    codes: NDArray[np.uint16] | NDArray[np.uint32]
    idf: np.float32
    best: np.float32


class _QueryTerm(NamedTuple):
    """A term of a query that is in the index."""

    bound: float
    """Upper bound of the term's contribution to a document's score."""
    weight: np.float32
    docs: NDArray[np.int32]
    codes: NDArray[np.uint16] | NDArray[np.uint32]


class BM25Index:
    """A BM25 index over documents; `build` or `open` make one. Searches are thread-safe."""

    def __init__(self, description: IndexDescription, arrays: IndexArrays) -> None:
        self.description = description
        self._arrays = arrays
        self._vocabulary = StringTable(arrays.term_bytes, arrays.term_offsets)
        self.ids = StringTable(arrays.id_bytes, arrays.id_offsets)
        """The documents' ids by row."""
        self._factors = np.array(arrays.factors)
        self._analyzer = lucene.Analyzer()
        self._terms: dict[str, _Term] = {}
        self._free_sums: list[NDArray[np.float64]] = []

    @classmethod
    def build(
        cls,
        documents: Iterable[tuple[str, str]],
        *,
        k1: float = 0.9,
        b: float = 0.4,
        folder: Path | None = None,
    ) -> BM25Index:
        """Index documents, given as (id, text); they are read once and not kept.

        Args:
            documents: any number of them; ids must be different and without NUL characters.
            k1: saturation of the term frequency, at least 0.
            b: influence of the document's length, 0 to 1.
            folder: where the index is saved and mapped from; None: in memory.

        Raises:
            ValueError: a parameter is out of range, or two documents have the same id
                (`DuplicateIdError`).
            SearchIndexError: `folder` exists and is not an empty folder.
        """
        if not 0 <= k1 < float("inf"):
            raise ValueError(f"k1 must be a number of at least 0, not {k1!r}")
        if not 0 <= b <= 1:
            raise ValueError(f"b must be between 0 and 1, not {b!r}")
        if folder is None:
            return cls(*_built(documents, k1, b, None))
        with new_folder(folder) as partial:
            if partial is None:
                raise SearchIndexError(
                    f"{folder} exists already: open it, or delete it and build again"
                )
            description, arrays = _built(documents, k1, b, partial)
            write_description(partial, description, arrays)
            # The arrays are mapped under the name that is about to change.
            del arrays
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> BM25Index:
        """Open a saved index at once: its arrays are mapped, not read.

        Raises:
            SearchIndexError: the folder is missing, damaged, or not an index of this version.
        """
        return cls(*open_folder(folder))

    def __len__(self) -> int:
        """Return the number of documents."""
        return self.description.documents

    def search(self, query: str, topk: int) -> list[Hit]:
        """Return the best documents for a query, best first.

        Args:
            query: any string; terms that are in no document are ignored.
            topk: maximum number of hits, at least 1.

        Returns:
            At most `topk` hits: documents with none of the query's terms are not hits.

        Raises:
            ValueError: topk is less than 1.
        """
        limit = min(operator.index(topk), len(self))
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        terms = self._query_terms(query)
        if not terms:
            return []
        if len(self) <= SMALL_INDEX:
            docs, sums = _all_sums(terms, self._factors, len(self))
        else:
            docs, sums = self._promising_sums(terms, limit)
        return self._best_hits(docs, sums.astype(np.float32), limit)

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Hit]]:
        """Search for each query, in order."""
        return [self.search(query, topk) for query in queries]

    def _query_terms(self, query: str) -> list[_QueryTerm]:
        """Return the query's terms that are in the index, largest bound first."""
        found = []
        for text, count in Counter(self._analyzer(query)).items():
            term = self._terms.get(text) or self._look_up(text)
            if term is not None:
                weight = term.idf * np.float32(count)
                bound = float(weight - weight / term.best)
                found.append(_QueryTerm(bound, weight, term.docs, term.codes))
        found.sort(key=operator.itemgetter(0), reverse=True)
        return found

    def _look_up(self, text: str) -> _Term | None:
        row = self._vocabulary.find(text)
        if row is None:
            return None
        begin, end = int(self._arrays.starts[row]), int(self._arrays.starts[row + 1])
        term = _Term(
            self._arrays.docs[begin:end],
            self._arrays.codes[begin:end],
            lucene.idf(end - begin, self.description.documents_with_terms),
            self._arrays.best[row],
        )
        if len(self._terms) >= KEPT_TERMS:
            self._terms = {}
        self._terms[text] = term
        return term

    def _promising_sums(
        self, terms: list[_QueryTerm], limit: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Return documents that can be among the best `limit`, and their scores before rounding.

        Terms are added in the order of their bounds, the largest first (the idea of MaxScore:
        Turtle and Flood, 1995). When `limit` documents exceed the sum of the remaining bounds, no
        new document can become a hit: from then on only the documents already seen are updated,
        and of them only those that can still reach the best.
        """
        try:
            sums = self._free_sums.pop()
        except IndexError:
            sums = np.zeros(len(self))
        left = np.cumsum([term.bound for term in reversed(terms)])[::-1].tolist()
        seen: list[NDArray[np.int32]] = []
        number_seen = 0
        position = 0
        threshold = 0.0
        for position, term in enumerate(terms):
            # The sum of the previous terms' bounds is the most that any document has so far.
            if number_seen >= limit and left[0] - left[position] > left[position]:
                threshold = _largest(sums[np.concatenate(seen)], limit)
                if threshold * _MARGIN > left[position]:
                    break
            before = sums[term.docs]
            sums[term.docs] = before + _parts(term, self._factors)
            fresh = term.docs[before == 0.0] if position else term.docs
            seen.append(fresh)
            number_seen += len(fresh)
        else:
            position = len(terms)
        touched = np.concatenate(seen)
        candidates = touched
        for place in range(position, len(terms)):
            partial = sums[candidates]
            threshold = max(threshold, _largest(partial, limit))
            candidates = candidates[partial + left[place] >= threshold * _MARGIN]
            _add_to_seen(sums, candidates, terms[place], self._factors)
        result = sums[candidates]
        # Not reached after an error: the sums are then not used again.
        sums[touched] = 0.0
        self._free_sums.append(sums)
        return candidates, result

    def _best_hits(
        self, docs: NDArray[np.int32], scores: NDArray[np.float32], limit: int
    ) -> list[Hit]:
        """Return the best of the documents [n] with scores [n], as hits."""
        least = _largest(scores, limit) if len(scores) > limit else 0.0
        kept = np.flatnonzero(scores > least)
        if least > 0:
            tied = np.flatnonzero(scores == np.float32(least))
            if len(tied) > limit:
                first = np.argpartition(self._arrays.ranks[docs[tied]], limit)[:limit]
                tied = tied[first]
            kept = np.concatenate([kept, tied])
        docs, scores = docs[kept], scores[kept]
        order = np.lexsort((self._arrays.ranks[docs], -scores))[:limit]
        rows = docs[order].tolist()
        return list(map(Hit, rows, self.ids.texts(rows), scores[order].tolist()))


def _built(
    documents: Iterable[tuple[str, str]], k1: float, b: float, folder: Path | None
) -> tuple[IndexDescription, IndexArrays]:
    with tempfile.TemporaryDirectory(dir=folder, prefix="segments-") as workspace:
        builder = IndexBuilder(Path(workspace))
        for document_id, text in documents:
            builder.add(document_id, text)
        return builder.finish(k1, b, ArrayStore(folder))


def _parts(term: _QueryTerm, factors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a term's contribution to the score of each of its documents: float32 [postings]."""
    is_long = len(term.codes) > len(factors)
    parts: NDArray[np.float32] = factors if is_long else factors[term.codes]
    parts = term.weight - term.weight / parts
    return parts[term.codes] if is_long else parts


def _all_sums(
    terms: list[_QueryTerm], factors: NDArray[np.float32], documents: int
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Return the documents with any of the terms, and their scores before rounding."""
    docs = np.concatenate([term.docs for term in terms])
    weights = np.repeat(
        np.array([term.weight for term in terms]), [len(term.docs) for term in terms]
    )
    parts = weights - weights / factors[np.concatenate([term.codes for term in terms])]
    sums = np.bincount(docs, parts, documents).astype(np.float64, copy=False)
    found = np.flatnonzero(sums > 0.0)
    return found.astype(np.int32), sums[found]


def _add_to_seen(
    sums: NDArray[np.float64],
    candidates: NDArray[np.int32],
    term: _QueryTerm,
    factors: NDArray[np.float32],
) -> None:
    """Add a term to those candidates that contain it (other documents may get it, too)."""
    if len(candidates) * 16 < len(term.docs):
        places = np.searchsorted(term.docs, candidates)
        places[places == len(term.docs)] = 0
        places = places[term.docs[places] == candidates]
    else:
        places = np.flatnonzero(sums[term.docs] > 0.0)
    part = term._replace(docs=term.docs[places], codes=term.codes[places])
    sums[part.docs] += _parts(part, factors)


def _largest(values: NDArray[np.float32] | NDArray[np.float64], count: int) -> float:
    """Return the `count`-th largest of the values; 0 if there are fewer."""
    if len(values) < count:
        return 0.0
    # At least `count` values reach the `count`-th largest of the blocks' maxima. Few more do, and
    # maxima are far cheaper than a partition of everything.
    blocks = 16 * count
    if len(values) >= 8 * blocks:
        even = len(values) - len(values) % blocks
        heads = values[:even].reshape(-1, blocks).max(axis=0)
        values = values[values >= np.partition(heads, blocks - count)[blocks - count]]
    place = len(values) - count
    return float(np.partition(values, place)[place])
