"""What finds passages: the interface of all retrievers, and the one by words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from env_servers.search.bm25 import BM25Index


class Found(NamedTuple):
    """One passage found."""

    row: int
    """Its row in the corpus."""
    score: float
    """Larger is better."""


class Retriever(Protocol):
    """Finds passages; safe to call from several threads."""

    @property
    def name(self) -> str:
        """`bm25`, `dense` or `hybrid`."""
        ...

    @property
    def settings(self) -> Mapping[str, object]:
        """What its results depend on, as JSON values."""
        ...

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """The best `topk` passages for each query, best first.

        Queries are any strings with a character that is no space. What is found for one does not
        depend on the others.
        """
        ...


class BM25Retriever:
    """Finds passages by their words, as Lucene does."""

    name = "bm25"

    def __init__(self, index: BM25Index) -> None:
        self._index = index
        self.settings: Mapping[str, object] = {
            "k1": index.description.k1,
            "b": index.description.b,
        }

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """Only passages that have a word of the query are found: there may be fewer, or none."""
        return [
            [Found(hit.row, hit.score) for hit in hits]
            for hits in self._index.search_many(queries, topk)
        ]
