"""Reciprocal rank fusion of two retrievers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from env_servers.retrieval.corpus import Found
from env_servers.retrieval.dense import HybridRetriever


class Ranked:
    """Finds the same rows for every query; for an empty one none."""

    def __init__(self, name: str, rows: Sequence[int]) -> None:
        self.name = name
        self.settings: Mapping[str, object] = {"of": name}
        self._rows = rows

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        found = [Found(row, 100.0 - row) for row in self._rows[:topk]]
        return [found if query else [] for query in queries]


def fused(first: Sequence[int], second: Sequence[int], topk: int = 10) -> list:
    retriever = HybridRetriever(Ranked("bm25", first), Ranked("dense", second))
    return retriever.search_many(["query"], topk)[0]


def test_scores_are_sums_of_reciprocal_ranks() -> None:
    assert fused([4, 9, 2], [2, 4]) == [
        Found(4, pytest.approx(1 / 61 + 1 / 62)),
        Found(2, pytest.approx(1 / 63 + 1 / 61)),
        Found(9, pytest.approx(1 / 62)),
    ]


def test_equal_scores_keep_the_order_of_the_first_list() -> None:
    found = fused([7, 3, 8], [3, 7, 1])
    assert [hit.row for hit in found] == [7, 3, 8, 1]
    assert found[0].score == found[1].score
    assert found[2].score == found[3].score
    assert [hit.row for hit in fused([3, 7, 1], [7, 3, 8])] == [3, 7, 1, 8]


def test_only_the_best_of_each_are_fused_and_a_short_answer_begins_a_long_one() -> None:
    first, second = list(range(30)), list(range(29, -1, -1))
    ten = fused(first, second, topk=10)
    assert {hit.row for hit in ten} <= {*range(10), *range(20, 30)}
    assert fused(first, second, topk=3) == ten[:3]
    for topk in (10, 11, 25, 30):
        assert len(fused(first, first, topk)) == topk


def test_queries_without_hits_have_none() -> None:
    retriever = HybridRetriever(Ranked("bm25", [1]), Ranked("dense", [2]))
    assert [len(found) for found in retriever.search_many(["", "query"], 3)] == [0, 2]
    assert fused([], [5]) == [Found(5, pytest.approx(1 / 61))]


def test_settings_name_both_retrievers() -> None:
    assert HybridRetriever(Ranked("bm25", []), Ranked("dense", [])).settings == {
        "constant": 60, "depth": 10, "bm25": {"of": "bm25"}, "dense": {"of": "dense"},
    }  # fmt: skip
