"""Check for any input: no status 500, and answers of the described form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from asgi_calls import AppCaller
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from env_servers.retrieval.app import create_app
from env_servers.retrieval.bm25 import BM25Retriever, index_passages
from env_servers.retrieval.collection import Collection
from env_servers.retrieval.corpus import Passage
from env_servers.retrieval.settings import CollectionSettings, Limits

LIMITS = Limits(topk=2, max_topk=7, max_queries=5)
WORDS = ("river", "mill", "the", "\u6a4b", "stra\u00dfe", "caf\u00e9", "x" * 300, "\ud800", "\x00")

ANY_TEXT = st.text(st.characters(), max_size=12)
QUERIES = st.one_of(
    ANY_TEXT,
    st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=6).map("".join),
    st.sampled_from(["", " ", "\n", "a" * 2900, "AND OR NOT", '"quoted" +a -b', "title:mill^2 ~"]),
)
NUMBERS = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([10_000, 2**31, 2**63, -(2**63), 10**4000, 1.0, 1e308]),
    st.sampled_from([float("nan"), float("inf")]),
)
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, ANY_TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(ANY_TEXT, inner, max_size=3)
    ),
    max_leaves=5,
)
SEVERAL = st.one_of(st.lists(QUERIES, max_size=6), st.lists(JSON_VALUES, max_size=3), JSON_VALUES)
OPTIONS = {
    "topk": st.one_of(st.none(), st.integers(0, 7), JSON_VALUES),
    "return_scores": st.one_of(st.none(), st.booleans(), st.just(True), JSON_VALUES),
    "other": JSON_VALUES,
}
REQUESTS = st.one_of(
    st.fixed_dictionaries({"queries": st.lists(QUERIES, max_size=5)}, optional=OPTIONS),
    st.fixed_dictionaries({"query": QUERIES}, optional=OPTIONS),
    st.fixed_dictionaries({}, optional={"queries": SEVERAL, "query": SEVERAL, **OPTIONS}),
    JSON_VALUES,
).map(lambda body: json.dumps(body).encode())
BODIES = st.one_of(
    REQUESTS, REQUESTS, st.binary(max_size=60), st.just(b"[" * 2990), st.just(b" " * 3001)
)
CUTS = st.lists(st.integers(0, 80), max_size=3).map(sorted)


@pytest.fixture(scope="module")
def collection() -> Collection:
    texts = [
        "The mill at the river", "", "Stra\u00dfe und Caf\u00e9 \U0001f309", "\u6a4b\u6a4b",
        "\ud800 river \udc00", "x" * 300, 'quoted "mill" \\ \x00 \x1f \u2028', "river " * 50,
    ]  # fmt: skip
    passages = [Passage(f"{row}\ud801" if row % 2 else str(row), t) for row, t in enumerate(texts)]
    indexed = index_passages(passages, 0.9, 0.4)
    return Collection(CollectionSettings(), indexed.corpus, BM25Retriever(indexed.bm25), None)


@pytest.fixture(scope="module")
def caller(collection: Collection) -> Iterator[AppCaller]:
    found = AppCaller(create_app(collection, LIMITS, max_body=3000))
    yield found
    found.close()


def fuzz(examples: int) -> Any:
    """Settings of one fuzzing, the same on every run."""
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


@pytest.mark.slow
def test_any_body_is_answered_properly(caller: AppCaller, collection: Collection) -> None:
    seen: dict[int, int] = {}

    @fuzz(1000)
    @given(BODIES, CUTS)
    def send(body: bytes, cuts: list[int]) -> None:
        edges = [0, *(min(cut, len(body)) for cut in cuts), len(body)]
        chunks = [body[start:end] for start, end in pairwise(edges)]
        answer = caller.request("POST", "/retrieve", chunks)
        seen[answer.status] = seen.get(answer.status, 0) + 1
        if answer.status != 200:
            assert (answer.status, answer.code) in {
                (413, "body_too_large"), (422, "invalid_body")
            }  # fmt: skip
            return
        asked = json.loads(body)
        queries = asked.get("queries", asked.get("query"))
        queries = [queries] if isinstance(queries, str) else queries
        result = answer.json()["result"]
        assert len(result) == len(queries)
        for query, found in zip(queries, result, strict=True):
            assert len(found) <= (asked.get("topk") or 2)
            if asked.get("return_scores"):
                scores = [item["score"] for item in found]
                assert scores == sorted(scores, reverse=True)
                assert all(score > 0 for score in scores)
                found = [item["document"] for item in found]
            assert all(document.keys() == {"id", "contents"} for document in found)
            direct = collection.retriever.search_many([query], asked.get("topk") or 2)[0]
            rows = [row for row, _ in direct]
            assert [document["id"] for document in found] == collection.corpus.ids(rows)
            assert [document["contents"] for document in found] == collection.corpus.contents(rows)

    send()
    assert min(seen.get(status, 0) for status in (200, 413, 422)) > 20, seen
    assert caller.get("/health").status == 200


def test_any_address_is_answered_properly(caller: AppCaller) -> None:
    segments = st.lists(st.one_of(ANY_TEXT, st.sampled_from(["questions", "retrieve", "train"])))

    @fuzz(200)
    @given(st.sampled_from(["GET", "POST", "PUT", "HEAD", "X"]), segments, ANY_TEXT)
    def send(method: str, parts: list[str], query: str) -> None:
        path = "/" + "/".join(parts).replace("?", "") + "?" + query
        assert caller.request(method, path).status in {200, 404, 405, 422}

    send()
