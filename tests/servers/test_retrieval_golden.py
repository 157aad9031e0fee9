"""The server's answers are those recorded from pyserini 0.22 on Lucene 9.5, in every batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgi_calls import AppCaller
from bm25_search import read_lines

from env_servers.retrieval.app import create_app
from env_servers.retrieval.collection import Collection
from env_servers.retrieval.settings import CollectionSettings, Limits

BATCH = 64


@pytest.fixture(scope="module")
def records(data_folder: Path) -> list[dict[str, Any]]:
    return read_lines(data_folder / "searchqa/golden/retrieval.jsonl.xz")


@pytest.fixture(scope="module")
def caller(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppCaller]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        settings = CollectionSettings(corpus=data_folder / "searchqa/corpus.jsonl.xz")
        found = AppCaller(create_app(Collection.open(settings), Limits()))
    yield found
    found.close()


def ask(caller: AppCaller, queries: list[str], topk: int) -> list[list[dict[str, Any]]]:
    answer = caller.post("/retrieve", {"queries": queries, "topk": topk, "return_scores": True})
    assert answer.status == 200
    result: list[list[dict[str, Any]]] = answer.json()["result"]
    return result


@pytest.mark.slow
def test_every_recorded_ranking(caller: AppCaller, records: list[dict[str, Any]]) -> None:
    assert len(records) == 1560
    result = []
    for begin in range(0, len(records), 1000):
        queries = [record["question"] for record in records[begin : begin + 1000]]
        result += ask(caller, queries, 10)
    for record, found in zip(records, result, strict=True):
        ids = [item["document"]["id"] for item in found]
        assert ids == [str(row) for row in record["bm25_top10"]], record["id"]
        scores = [item["score"] for item in found]
        # Recorded scores are rounded to four places and spread where they are equal.
        assert scores == pytest.approx(record["bm25_scores"], abs=2e-4), record["id"]


def test_passages_come_as_they_are_in_the_file(
    caller: AppCaller, records: list[dict[str, Any]], data_folder: Path
) -> None:
    lines = {line["id"]: line for line in read_lines(data_folder / "searchqa/corpus.jsonl.xz")}
    assert caller.get("/health").json()["passages"] == len(lines)
    for found in ask(caller, [record["question"] for record in records[::20]], 3):
        for item in found:
            assert item["document"]["contents"] == lines[item["document"]["id"]]["contents"]


def test_a_batch_equals_single_requests(caller: AppCaller, records: list[dict[str, Any]]) -> None:
    queries = [record["question"] for record in records[:: len(records) // BATCH]][:BATCH]
    assert len(queries) == BATCH
    together = ask(caller, queries, 3)
    assert together == [ask(caller, [query], 3)[0] for query in queries]
    assert ask(caller, queries[::-1], 3) == together[::-1]
