"""The retrieval server: both dialects of /retrieve, limits, errors, and the command."""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from asgi_calls import Answer, AppCaller
from served_shop import StartServer

from env_servers import cli, process
from env_servers.retrieval import app as app_module
from env_servers.retrieval.app import create_app
from env_servers.retrieval.collection import Collection
from env_servers.retrieval.corpus import Corpus, CorpusError, Found
from env_servers.retrieval.dense import DenseRetriever
from env_servers.retrieval.encoder import Encoder
from env_servers.retrieval.settings import CollectionSettings, EncoderSettings, Limits

LIMITS = Limits(topk=2, max_topk=5, max_queries=4, max_query=30)
LINES = [
    {"id": "m", "contents": '"Mill"\nA mill at the river Arn.'},
    {"id": 11, "title": "Arn", "text": "The Arn is a river."},
    {
        "id": "b",
        "contents": '"Bridge"\nThe bridge \u00fcber den Flu\u00df \U0001f309 crosses the Arn.',
    },
    {"id": "s", "contents": '""\n\ud800 lone arn'},
]
HEALTH = {
    "status", "service", "version", "pid", "data", "corpus_hash", "passages", "retriever",
    "max_topk", "settings", "world_seed", "entities", "splits", "left_out",
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture(scope="module")
def collection(corpus_file: Path) -> Collection:
    folder = corpus_file.parent / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOD_CACHE", str(corpus_file.parent / "cache"))
        return Collection.open(CollectionSettings(corpus=corpus_file, index=folder))


@pytest.fixture
def call(collection: Collection) -> Iterator[AppCaller]:
    caller = AppCaller(create_app(collection, LIMITS, max_body=2000))
    yield caller
    caller.close()


@pytest.fixture(scope="module")
def generated() -> Iterator[AppCaller]:
    caller = AppCaller(create_app(Collection.open(CollectionSettings(entities=60)), Limits()))
    yield caller
    caller.close()


def found_ids(answer: Answer) -> list[list[str]]:
    assert answer.status == 200, answer
    return [[item["document"]["id"] for item in found] for found in answer.json()["result"]]


def test_results_come_with_scores(call: AppCaller) -> None:
    answer = call.post("/retrieve", {"queries": ["mill bridge"], "topk": 5, "return_scores": True})
    assert answer.json().keys() == {"result"}
    (found,) = answer.json()["result"]
    assert [item["document"] for item in found] == [
        {"id": "m", "contents": LINES[0]["contents"]},
        {"id": "b", "contents": LINES[2]["contents"]},
    ]
    assert all(item.keys() == {"document", "score"} for item in found)
    # Both have one of the words, twice; no other passage has. Lengths are 4, 3, 8 and 2.
    for item, length in zip(found, (4, 8), strict=True):
        norm = 0.9 * (1 - 0.4 + 0.4 * length / 4.25)
        idf = math.log(1 + (4 - 1 + 0.5) / (1 + 0.5))
        assert item["score"] == pytest.approx(idf * 2 / (2 + norm), rel=1e-6)


def test_titles_surrogates_and_other_scripts_arrive_whole(call: AppCaller) -> None:
    queries = ["river", "fluss FLU\u00df", "lone"]
    answer = call.post("/retrieve", {"queries": queries, "topk": 1, "return_scores": True})
    contents = [found[0]["document"]["contents"] for found in answer.json()["result"]]
    assert contents == ['"Arn"\nThe Arn is a river.', LINES[2]["contents"], '""\n\ud800 lone arn']
    assert "\U0001f309".encode() in answer.body


def test_without_scores_the_answer_is_a_list_of_documents(call: AppCaller) -> None:
    asked: dict[str, object] = {"queries": ["bridge", "mill", "nothing"]}
    plain = [[{"id": "b", "contents": LINES[2]["contents"]}], [LINES[0]], []]
    for fields in ({}, {"return_scores": False}, {"return_scores": None}):
        answer = call.post("/retrieve", {**asked, **fields})
        assert answer.json() == {"result": plain}
    scored = call.post("/retrieve", {**asked, "return_scores": True}).json()["result"]
    assert [[item["document"] for item in found] for found in scored] == plain


def test_both_dialects_give_the_same(call: AppCaller) -> None:
    for single, several in (("mill", ["mill"]), (["mill", "arn"], ["mill", "arn"]), ([], [])):
        one = call.post("/retrieve", {"query": single, "return_scores": True})
        assert one.body == call.post("/retrieve", {"queries": several, "return_scores": True}).body
        assert len(one.json()["result"]) == len(several)


def test_how_many_are_found(call: AppCaller) -> None:
    def count(**fields: object) -> int:
        answer = call.post("/retrieve", {"query": "arn", "return_scores": True, **fields})
        return len(found_ids(answer)[0])

    assert count() == count(topk=None) == count(topk=0) == 2
    assert (count(topk=1), count(topk=5)) == (1, 4)


def test_queries_without_a_word_find_nothing(call: AppCaller) -> None:
    queries = ["", "arn", " \t\n\u3000"]
    answer = call.post("/retrieve", {"queries": queries, "topk": 1, "return_scores": True})
    assert [len(found) for found in found_ids(answer)] == [0, 1, 0]
    for query in ("the", "?!", "\x00", "\ud800", "zzz"):
        assert call.post("/retrieve", {"query": query}).json() == {"result": [[]]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "Expected `object`, got `array`"),
        ("x", "Expected `object`"),
        (None, "Expected `object`"),
        ({}, "Send an object with 'query' or 'queries'"),
        ({"topk": 3}, "Send an object with 'query' or 'queries'"),
        ({"queries": ["a"], "query": "a"}, "unknown field `queries`"),
        ({"queries": "a"}, "Expected `array`, got `str` - at `$.queries`"),
        ({"queries": {"a": 1}}, "Expected `array`"),
        ({"queries": None}, "Expected `array`"),
        ({"queries": ["a", 1]}, "got `int` - at `$.queries[1]`"),
        ({"query": None}, "Expected `str | array`"),
        ({"query": [["a"]]}, "Expected `str`"),
        ({"queries": ["a"] * 5}, "of length <= 4 - at `$.queries`"),
        ({"query": ["a"] * 5}, "of length <= 4 - at `$.query`"),
        ({"query": "a" * 31}, "of length <= 30 - at `$.query`"),
        ({"queries": ["a", "\U0001f309" * 31]}, "of length <= 30 - at `$.queries[1]`"),
        *(({"query": "a", "topk": topk}, "at `$.topk`")
          for topk in (6, 10_000, -1, 10**100, 1.0, "3", True, False, [3], {})),
        *(({"query": "a", "return_scores": value}, "at `$.return_scores`")
          for value in (1, 0, "true", [], {})),
        # What is not known could change the result.
        *(({"query": "a", name: value}, f"unknown field `{name}`")
          for name, value in (("top_k", 3), ("k", 3), ("filter", {}), ("user", "x"))),
    ],
)  # fmt: skip
def test_wrong_requests_are_explained(call: AppCaller, body: object, message: str) -> None:
    answer = call.post("/retrieve", body)
    assert (answer.status, answer.code) == (422, "invalid_body")
    assert message in answer.json()["error"]["message"]


def test_bodies_that_are_no_json_or_too_large(call: AppCaller) -> None:
    nested = b"[" * 1990
    for chunks in ([b""], [b"{"], [b"\xff"], [nested], [b'{"query": "a", "topk": 1e999}']):
        answer = call.request("POST", "/retrieve", chunks)
        assert (answer.status, answer.code) == (422, "invalid_body")
    body = json.dumps({"query": "arn " * 600}).encode()
    for chunks in ([body], [body[:1000], body[1000:]]):
        answer = call.request("POST", "/retrieve", chunks)
        assert (answer.status, answer.code) == (413, "body_too_large")
    assert call.request("POST", "/retrieve", [body[:14], body[-2:]]).status == 200


def test_queries_have_at_most_10000_characters(generated: AppCaller) -> None:
    assert generated.post("/retrieve", {"query": "mill " * 2000}).json()["result"]
    for body in ({"query": "x" * 10_001}, {"queries": ["mill", "\u00e9" * 10_001]}):
        answer = generated.post("/retrieve", body)
        assert (answer.status, answer.code) == (422, "invalid_body")
        assert "of length <= 10000" in answer.json()["error"]["message"]


def test_other_addresses_and_methods(call: AppCaller) -> None:
    for path in ("/retrieve/", "/questions", "/questions/a/b", "/search"):
        assert (call.get(path).status, call.get(path).code) == (404, "not_found")
    answer = call.get("/retrieve")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_health_describes_the_service(
    call: AppCaller, generated: AppCaller, corpus_file: Path
) -> None:
    health = call.get("/health").json()
    assert health.keys() == HEALTH
    assert len(health["corpus_hash"]) == 64
    assert int(health["corpus_hash"], 16)
    assert {name: health[name] for name in HEALTH - {"corpus_hash", "version"}} == {
        "status": "ok", "service": "retrieval", "pid": os.getpid(), "data": str(corpus_file),
        "passages": 4, "retriever": "bm25", "settings": {"k1": 0.9, "b": 0.4},
        "max_topk": 5, "world_seed": None, "entities": None, "splits": [], "left_out": {},
    }  # fmt: skip
    health = generated.get("/health").json()
    assert health.keys() == HEALTH
    wanted = {"data": "generated", "world_seed": 0, "entities": 60}
    assert wanted.items() <= health.items()
    assert health["splits"] == ["dev", "test", "train"]


def test_questions_of_the_generated_world(call: AppCaller, generated: AppCaller) -> None:
    seen: set[str] = set()
    for split in ("dev", "test", "train"):
        answer = generated.get(f"/questions/{split}").json()
        assert answer.keys() == {"split", "questions"}
        assert answer["split"] == split
        ids = [question["id"] for question in answer["questions"]]
        assert ids == sorted(set(ids))
        assert ids
        assert not seen & set(ids)
        seen |= set(ids)
        for question in answer["questions"]:
            assert question.keys() == {"id", "question", "golden_answers", "data_source"}
            assert question["data_source"] in {"one_hop", "bridge", "comparison"}
            assert all(isinstance(text, str) for text in question["golden_answers"])
    assert generated.get("/questions/train").body == generated.get("/questions/train").body
    for caller, split in ((generated, "valid"), (call, "train")):
        answer = caller.get(f"/questions/{split}")
        assert (answer.status, answer.code) == (404, "no_questions")


def test_metrics_count(call: AppCaller) -> None:
    call.post("/retrieve", {"queries": ["arn", "", "mill"]})
    call.post("/retrieve", {"query": "arn"})
    call.post("/retrieve", {"query": "arn", "topk": 99})
    lines = call.get("/metrics").body.decode().splitlines()
    figures = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert figures["retrieval_requests_total"] == "2.0"
    assert figures["retrieval_queries_total"] == "4.0"
    assert figures['retrieval_errors_total{code="invalid_body"}'] == "1.0"
    assert 0 < float(figures["retrieval_search_seconds_total"]) < 5
    assert float(figures["process_resident_memory_bytes"]) > 1e7


def test_a_token_is_required(collection: Collection) -> None:
    caller = AppCaller(create_app(collection, LIMITS, token="secret"))
    assert caller.post("/retrieve", {"query": "arn"}).status == 401
    assert caller.get("/health", authorization="Bearer secret").status == 200
    caller.close()


class SlowRetriever:
    """Finds the first passage as soon as it is let."""

    name = "slow"
    settings: Mapping[str, object] = {}

    def __init__(self) -> None:
        self.efficient_queries = 4
        self.proceed = threading.Event()
        self.threads: list[str] = []
        self.asked: list[Sequence[str]] = []

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        self.threads.append(threading.current_thread().name)
        self.asked.append(queries)
        assert self.proceed.wait(10)
        return [[Found(0, 1.0)] for _ in queries]


def test_a_slow_search_does_not_delay_others_and_can_be_cancelled(collection: Collection) -> None:
    slow = SlowRetriever()
    caller = AppCaller(create_app(replace(collection, retriever=slow), LIMITS))

    async def search(queries: list[str], *, is_cancelled: bool) -> Answer:
        body = json.dumps({"queries": queries}).encode()
        search = asyncio.create_task(caller.exchange("POST", "/retrieve", [body]))
        while queries[:1] not in [asked[:1] for asked in slow.asked]:
            await asyncio.sleep(0.001)
        assert (await caller.exchange("GET", "/health")).status == 200
        assert not search.done()
        if is_cancelled:
            # As when the server is stopped.
            search.cancel()
        else:
            slow.proceed.set()
        return await search

    answer = caller.run(search(["c"], is_cancelled=True))
    assert (answer.status, answer.code) == (503, "stopping")
    answer = caller.run(search(["a", "", "b", " "], is_cancelled=False))
    assert [len(found) for found in answer.json()["result"]] == [1, 0, 1, 0]
    # What is blank is not searched for.
    assert slow.asked == [["c"], ["a", "b"]]
    assert threading.current_thread().name not in slow.threads
    caller.close()


def test_a_long_search_is_done_in_slices(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowRetriever()
    slow.efficient_queries = 2
    slow.proceed.set()
    monkeypatch.setattr(app_module, "SLICE_SECONDS", 0.0)
    app = create_app(replace(collection, retriever=slow), replace(LIMITS, max_queries=9))
    caller = AppCaller(app)
    queries = ["a", "b", " ", "d", "e"]
    answer = caller.post("/retrieve", {"queries": queries})
    assert [len(found) for found in answer.json()["result"]] == [1, 1, 0, 1, 1]
    assert slow.asked == [["a", "b"], ["d"], ["e"]]
    # Nothing more is searched for a client that has left.
    slow.asked.clear()
    body = json.dumps({"queries": queries}).encode()
    leaving = caller.exchange("POST", "/retrieve", [body], is_gone=True)
    answer = caller.run(leaving)
    assert (answer.status, answer.code) == (400, "disconnected")
    assert slow.asked == [["a", "b"]]
    caller.close()


def test_quick_searches_need_no_thread(
    collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = SlowRetriever()
    quick.proceed.set()
    caller = AppCaller(create_app(replace(collection, retriever=quick), LIMITS))
    monkeypatch.setattr(app_module, "QUICK_SECONDS", 10.0)
    for _ in range(3):
        caller.post("/retrieve", {"query": "a"})
    assert quick.threads[1:] == [threading.current_thread().name] * 2
    assert quick.threads[0] != quick.threads[1]
    caller.close()


def post(url: str, body: object) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_the_command_serves_a_corpus_twice(
    start_server: StartServer, corpus_file: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "ATOD_CACHE": str(tmp_path)}
    answers = []
    for said in (f"First use of {corpus_file}", ""):
        arguments = ("retrieval", "--port", "0", "--corpus", str(corpus_file), "--topk", "1")
        server = start_server(*arguments, environment=environment)
        assert json.loads(server.line) == {
            "ready": True, "url": server.url, "service": "retrieval"
        }  # fmt: skip
        answers.append(post(f"{server.url}/retrieve", {"query": "arn", "return_scores": True}))
        status, errors = server.stop()
        assert status == 0
        assert errors.startswith(said)
        assert bool(errors) == bool(said)
    assert answers[0] == answers[1]
    assert len(answers[0]["result"][0]) == 1


@pytest.mark.slow
def test_the_command_serves_a_generated_world(start_server: StartServer) -> None:
    server = start_server("retrieval", "--port", "0", "--entities", "50", "--world-seed", "3")
    with urllib.request.urlopen(f"{server.url}/health", timeout=10) as answer:
        health = json.load(answer)
    assert (health["entities"], health["world_seed"], health["pid"]) == (
        50, 3, server.process.pid
    )  # fmt: skip
    assert server.stop() == (0, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "missing.jsonl"], "There is no corpus file missing.jsonl"),
        (["--corpus", "."], "is a folder"),
        (
            ["--corpus", "bad.jsonl"],
            "bad.jsonl contains no passage: 2 not JSON in UTF-8",
        ),
        (["--entities", "10"], "entities must be"),
        (["--entities", "0"], "must be at least 1"),
        (["--retriever", "other"], "--retriever must be one of bm25, dense, hybrid"),
        (["--retriever", "dense"], "--retriever dense needs --encoder"),
        (["--encoder", "x"], "need --retriever dense or hybrid"),
        (["--index", "x"], "need --corpus"),
        (["--k1", "-1"], "--k1 must be"),
        (["--k1", "inf", "--corpus", "good.jsonl"], "--k1 must be"),
        (["--k1", "nan", "--corpus", "good.jsonl"], "--k1 must be"),
        (["--b", "2", "--corpus", "good.jsonl"], "--b must be"),
        (["--index", "good.jsonl", "--corpus", "good.jsonl"], "good.jsonl is a file"),
        (["--index", "good.jsonl/x", "--corpus", "good.jsonl"], "Cannot use good.jsonl/x"),
        (["--entities", "10", "--retriever", "dense", "--encoder", "/none"], "entities must be"),
        (["--topk", "5", "--max-topk", "4"], "--topk must be at most --max-topk"),
    ],
)
def test_a_wrong_start_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(process, "exit_on_signals", lambda: None)
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text("{a\n{\n")
    Path("good.jsonl").write_text('{"text": "x"}')
    try:
        status = cli.main(["retrieval", "--port", "0", *arguments])
    except SystemExit as end:
        status = int(end.code or 0)
    output, errors = capfd.readouterr()
    assert (status, output) == (2, "")
    assert errors.startswith("atod-serve")
    assert message in errors
    assert errors.count("\n") == 1
    # Nothing was begun, such as an index.
    assert not caplog.records


@pytest.mark.parametrize("own_index", [False, True])
def test_encoders_get_their_settings_and_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus_file: Path, own_index: bool
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    loaded: list[object] = []
    encoding = EncoderSettings("q: ", "p: ", "cls", 9)
    encoder = SimpleNamespace(dimension=2)
    given = tmp_path / "v.npy"
    np.save(given, np.zeros((4, 2), np.float32))
    asked: list[tuple[object, ...]] = []

    def load(*arguments: object) -> Any:
        loaded.append(arguments)
        return encoder

    def build(corpus: Corpus, *arguments: object) -> Any:
        asked.append((len(corpus), *arguments))
        if len(asked) == 3:
            raise OSError(28, "No space left on device")
        return SlowRetriever()

    monkeypatch.setattr(Encoder, "load", load)
    monkeypatch.setattr(DenseRetriever, "open", build)
    settings = CollectionSettings(
        corpus=corpus_file, index=tmp_path / "index" if own_index else None, retriever="dense",
        encoder="some", vectors=given,
    )  # fmt: skip
    assert isinstance(Collection.open(settings, encoding).retriever, SlowRetriever)
    assert loaded == [("some", encoding)]
    hybrid = replace(settings, retriever="hybrid", vectors=None)
    assert Collection.open(hybrid).retriever.name == "hybrid"
    folder = tmp_path / "index" if own_index else tmp_path / "cache/retrieval/vectors"
    assert asked == [(4, encoder, folder, given), (4, encoder, folder, None)]
    with pytest.raises(CorpusError, match=f"Cannot store the vectors .* {folder}: No space left"):
        Collection.open(hybrid)
    # Vectors that cannot be used are refused before the corpus is indexed.
    given.unlink()
    with pytest.raises(ValueError, match=f"there is no file {given}"):
        Collection.open(replace(settings, index=tmp_path / "unused"), encoding)
    assert not (tmp_path / "unused").exists()


def test_settings_are_checked_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match="need --corpus"):
        CollectionSettings(retriever="dense", encoder="x", vectors=Path("v.npy"))
