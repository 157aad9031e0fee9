"""Finds passages by two retrievers together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from env_servers.retrieval.retrievers import Found, Retriever

CONSTANT = 60
"""The k of the formula, as in its source."""


class HybridRetriever:
    """Fuses the best lists of two retrievers by reciprocal ranks.

    The score of a passage is the sum of 1 / (60 + rank) over the lists that have it, ranks from 1
    (Cormack, Clarke and Buettcher, SIGIR 2009). Equal scores, which are frequent, keep the order of
    the first list, then that of the second.

    Args:
        first: a retriever, such as the one by words.
        second: another one over the same corpus, such as the one by meaning.
        depth: how many of the best of each are fused, whatever number is asked for: an answer is
            the beginning of every longer one. So there are at most twice as many results.
    """

    name = "hybrid"

    def __init__(self, first: Retriever, second: Retriever, depth: int = 10) -> None:
        if depth < 1:
            raise ValueError(f"depth must be at least 1, not {depth}")
        self._retrievers = (first, second)
        self._depth = depth
        self.settings: Mapping[str, object] = {
            "constant": CONSTANT,
            "depth": depth,
            **{retriever.name: dict(retriever.settings) for retriever in self._retrievers},
        }

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """The best `topk` passages for each query, best first; scores are fused ones."""
        lists = [retriever.search_many(queries, self._depth) for retriever in self._retrievers]
        return [_fused(pair)[:topk] for pair in zip(*lists, strict=True)]


def _fused(lists: Sequence[Sequence[Found]]) -> list[Found]:
    scores: defaultdict[int, float] = defaultdict(float)
    for found in lists:
        for rank, (row, _) in enumerate(found, start=1):
            scores[row] += 1 / (CONSTANT + rank)
    # Sorting keeps the order in which rows came up first.
    return [Found(*item) for item in sorted(scores.items(), key=lambda item: -item[1])]
