"""Holds the retrieval server and its client to one contract, over real HTTP and processes."""

from __future__ import annotations

import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import requests

from atod_gym.envs.search_qa.env import MAX_QUERY_LENGTH, SearchQAEnv
from atod_gym.envs.search_qa.settings import (
    BATCH_LIMIT,
    RETRY_DELAYS,
    SearchQASettings,
    connect_retriever,
    make_passage,
    open_questions,
    search,
)
from atod_gym.errors import DataNotFoundError, InvalidSettingError, ServerError
from atod_gym.serving.connection import ServedConnection
from atod_gym.serving.http import _BATCH_BYTES
from env_servers.options import ServiceOptions
from env_servers.retrieval.settings import Limits
from env_servers.retrieval.world import SPLITS, World

HEALTH = {"status", "service", "version", "pid", "data", "corpus_hash", "passages", "retriever",
          "max_topk", "settings", "world_seed", "entities", "splits", "left_out"}  # fmt: skip
ENTITIES, SEED = 80, 5
PASSAGES = [
    {"id": "m", "contents": '"Halden Mill"\nHalden Mill was built\nin 1821.'},
    {"id": 7, "title": "Corley", "text": "A town with a mill."},
    {"contents": "Mills\nA mill grinds 中文 grain."},
]


def test_no_server_has_lower_limits_than_environments_send() -> None:
    for kind, name, sent in (
        (Limits, "max_query", MAX_QUERY_LENGTH),
        (Limits, "max_queries", BATCH_LIMIT),
        (ServiceOptions, "max_body", 1.1 * _BATCH_BYTES),
    ):
        (option,) = [one for one in fields(kind) if one.name == name]
        assert option.default >= option.metadata["least"] >= sent


class Server:
    """A server in a process of its own, started as a user would."""

    def __init__(self, *arguments: str, port: int = 0) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "env_servers.cli", "retrieval", *arguments,
             "--port", str(port), "--parent", str(os.getpid())],
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = json.loads(self.process.stdout.readline())
        self.url: str = self.line["url"]
        self.http = requests.Session()

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        answer = self.http.request(method, f"{self.url}{path}", json=body, timeout=30)
        return answer.status_code, answer.json()

    def end(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    started: list[Server] = []

    def start_one(*arguments: str, port: int = 0) -> Server:
        started.append(Server(*arguments, port=port))
        return started[-1]

    with pytest.MonkeyPatch.context() as patch:
        # Indexes are kept there.
        patch.setenv("ATOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield start_one
    for running in started:
        running.end()


@pytest.fixture(scope="module")
def world(start: Callable[..., Server]) -> Server:
    return start("--entities", str(ENTITIES), "--world-seed", str(SEED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question, and a corpus next to it."""
    folder = tmp_path_factory.mktemp("questions")
    lines = "\n".join(json.dumps(passage) for passage in PASSAGES)
    (folder / "corpus.jsonl.xz").write_bytes(lzma.compress(lines.encode()))
    question = {"question": "When was Halden Mill built?", "golden_answers": ["1821"]}
    (folder / "mills_test.jsonl").write_text(json.dumps(question), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def corpus(start: Callable[..., Server], folder: Path) -> Server:
    return start("--corpus", str(folder / "corpus.jsonl.xz"))


def client(server: Server, **more: Any) -> ServedConnection:
    return connect_retriever(SearchQASettings(server_url=server.url, **more))


@pytest.mark.slow
def test_health(world: Server, corpus: Server, folder: Path) -> None:
    for server in (world, corpus):
        health = server.call("GET", "/health")[1]
        assert health.keys() == HEALTH
        assert client(server).health == health
        assert (health["status"], health["service"]) == ("ok", "retrieval")
        assert (health["pid"], health["retriever"]) == (server.process.pid, "bm25")
        assert server.line == {"ready": True, "url": server.url, "service": "retrieval"}
    health = client(world).health
    assert (health["data"], health["entities"], health["world_seed"]) == (
        "generated", ENTITIES, SEED)  # fmt: skip
    assert (health["splits"], health["passages"]) == (sorted(SPLITS), ENTITIES)
    health = client(corpus).health
    assert health["data"] == str((folder / "corpus.jsonl.xz").resolve())
    assert (health["splits"], health["entities"], health["passages"]) == ([], None, 3)


def test_the_client_reads_both_dialects(corpus: Server) -> None:
    [found] = search(client(corpus), ["mill built"], 2)
    assert (len(found), found[0].passage_id) == (2, "m")
    assert found[0] == make_passage("m", str(PASSAGES[0]["contents"]))
    assert (found[0].title, found[0].text) == ("Halden Mill", "Halden Mill was built in 1821.")
    for asked in ({"queries": ["mill built"]}, {"query": "mill built"}, {"query": ["mill built"]}):
        for with_scores in (True, False):
            body = {**asked, "topk": 2, "return_scores": with_scores}
            status, answer = corpus.call("POST", "/retrieve", body)
            assert (status, answer.keys()) == (200, {"result"})
            [hits] = answer["result"]
            assert all((hit.keys() == {"document", "score"}) == with_scores for hit in hits)
            documents = [hit["document"] for hit in hits] if with_scores else hits
            assert [make_passage(one["id"], one["contents"]) for one in documents] == [*found]


def test_all_forms_of_passages_and_ids_arrive(corpus: Server) -> None:
    [found] = search(client(corpus), ["mill mills corley grain"], 100)
    assert {(one.passage_id, one.title) for one in found} == {
        ("m", "Halden Mill"), ("7", "Corley"), ("2", "Mills")}  # fmt: skip
    assert {one.text for one in found} >= {"A town with a mill.", "A mill grinds 中文 grain."}


def test_batches_keep_their_order(corpus: Server) -> None:
    queries = ["town", "nothing of the kind", "grain", "town", " ", "\ud800", "grain"] * 300
    found = search(client(corpus), queries, 1)
    ids = [tuple(one.passage_id for one in hits) for hits in found]
    assert ids == [("7",), (), ("2",), ("7",), (), (), ("2",)] * 300
    # More different queries than one request takes.
    many = search(client(corpus), [f"town {number}" for number in range(1500)], 1)
    assert {hits[0].passage_id for hits in many} == {"7"}
    assert search(client(corpus), [], 3) == []
    # Too many bytes for one request.
    [*hits] = search(client(corpus), [f"{n} {'中' * 5_000}" for n in range(50)], 1)
    assert len(hits) == 50


@pytest.mark.parametrize("topk", [101, 10_000])
def test_an_environment_with_more_passages_than_the_server_returns_is_refused(
    world: Server, topk: int
) -> None:
    settings: dict[str, Any] = {"server_url": world.url, "entities": ENTITIES, "world_seed": SEED}
    with pytest.raises(InvalidSettingError, match=rf"topk={topk} is more .*\(100\).*--max-topk"):
        SearchQAEnv(topk=topk, **settings)
    assert SearchQAEnv(topk=100, **settings).topk == 100


@pytest.mark.parametrize("topk", [101, 10_000])
def test_a_refused_request_is_reported_once(corpus: Server, topk: int) -> None:
    before = corpus.http.get(f"{corpus.url}/metrics", timeout=30).text
    with pytest.raises(ServerError, match=r"/retrieve: .*topk.* \(HTTP 422\)") as caught:
        search(client(corpus), ["x"], topk)
    assert caught.value.status == 422
    after = corpus.http.get(f"{corpus.url}/metrics", timeout=30).text
    errors = [
        sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines()
            if line.startswith("retrieval_errors_total{")) for text in (before, after)
    ]  # fmt: skip
    assert errors[1] - errors[0] == 1 < 1 + len(RETRY_DELAYS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_questions_are_the_worlds(world: Server, split: str) -> None:
    choice = SearchQASettings(server_url=world.url, entities=ENTITIES, world_seed=SEED)
    questions, label = open_questions(choice, connect_retriever(choice), split)
    expected = World(ENTITIES, SEED).questions(split)
    assert label == "generated"
    assert questions.manifest.task_ids == tuple(
        f"generated-{ENTITIES}-seed{SEED}/{one.id}" for one in expected
    )
    for one, got in zip(expected, questions.questions.values(), strict=True):
        assert (got.question, got.golden_answers) == (one.question, one.golden_answers)
        assert got.task_type == one.kind


def test_other_worlds_and_data_are_refused(world: Server, corpus: Server, folder: Path) -> None:
    for wrong in ({"entities": 50}, {"world_seed": 6}):
        with pytest.raises(InvalidSettingError, match=f"{next(iter(wrong))}=.* was requested"):
            SearchQAEnv(server_url=world.url, **{"entities": ENTITIES, "world_seed": SEED, **wrong})
    with pytest.raises(InvalidSettingError, match="generated world"):
        SearchQAEnv(split="test", data=folder, server_url=world.url)
    with pytest.raises(DataNotFoundError, match="no generated questions"):
        SearchQAEnv(data="generated", server_url=corpus.url)
    assert corpus.call("GET", "/questions/train")[1]["error"]["code"] == "no_questions"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "refusal"),
    [
        ("--k1 0.9 --max-queries 2048 --max-topk 50", ""),
        ("--k1 1.5", "settings={.*1.5.*} instead of {"),
        ("--entities 60", "entities=60 instead of 50"),
        ("--world-seed 7", "world_seed=7 instead of 0"),
    ],
)
def test_a_server_that_is_restarted_serves_the_same_or_is_refused(
    start: Callable[..., Server], now: str, refusal: str
) -> None:
    first = start("--entities", "50")
    settings: dict[str, Any] = {"server_url": first.url, "entities": 50}
    old, idle = SearchQAEnv(**settings), SearchQAEnv(**settings)
    old.reset(seed=0)
    before = old.step("search[mill]")[0]["text"]
    first.end()
    port = int(first.url.rpartition(":")[2])
    start("--entities", "50", *now.split(), port=port)
    idle.reset(seed=0)
    for env in (old, idle):
        if refusal:
            with pytest.raises(ServerError, match=f"restarted with .*{refusal}"):
                env.step("search[mill]")
        else:
            assert env.step("search[mill]")[0]["text"] == before
    name, _, value = refusal.partition(" ")[0].partition("=")
    if name in ("entities", "world_seed"):
        with pytest.raises(InvalidSettingError, match=f"has {name}={value}, but"):
            SearchQAEnv(**settings)
        settings[name] = int(value)
    new = SearchQAEnv(**settings)
    new.reset(seed=0)
    assert new.step("search[mill]")[4]["searches"] == 1


def test_tokens(start: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOD_SERVER_TOKEN", "sesame")
    locked = start("--entities", "50", "--token-env", "ATOD_SERVER_TOKEN")
    monkeypatch.delenv("ATOD_SERVER_TOKEN")
    with pytest.raises(ServerError, match="token="):
        client(locked)
    assert client(locked, token="sesame").health["data"] == "generated"


@pytest.mark.slow
def test_question_files_bring_their_own_corpus(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path))
    env = SearchQAEnv(split="test", data=folder)
    assert (env.data, env.task_ids) == (str(folder), ("mills_test/1",))
    observation, _ = env.reset(seed=0)
    observation, *_, info = env.step(f"search[{observation['instruction']}]")
    assert "Doc 1 (Title: Halden Mill) Halden Mill was built in 1821." in observation["text"]
    assert info["retrieved"][0] == "m"
    assert env.step("answer[1821.]")[1] == 1.0
    elsewhere = tmp_path / "other.jsonl"
    elsewhere.write_text('{"id": 1, "contents": "Only\\nthis mill"}', encoding="utf-8")
    env = SearchQAEnv(split="test", data=folder, corpus=elsewhere)
    env.reset(seed=0)
    assert env.step("search[mill]")[0]["text"].count("Doc ") == 1
    # A passage without a title has an empty one, and a bad row is left out.
    untitled = tmp_path / "untitled.jsonl"
    untitled.write_text('{"_id": "M-7", "text": "this mill"}\n{"title": "x"}\n', encoding="utf-8")
    caplog.clear()
    env = SearchQAEnv(split="test", data=folder, corpus=untitled)
    assert caplog.messages == [
        f"Search-QA: {untitled}: rows of the corpus are left out: 1 without 'contents' and 'text'."
    ]
    env.reset(seed=0)
    observation, *_, info = env.step("search[mill]")
    assert "Doc 1 (Title: ) this mill" in observation["text"]
    assert info["retrieved"] == ("M-7",)
    # A changed corpus is read by a new server; environments of the old one continue.
    untitled.write_text('{"_id": "M-8", "text": "that mill"}\n', encoding="utf-8")
    new = SearchQAEnv(split="test", data=folder, corpus=untitled)
    new.reset(seed=0)
    assert new.step("search[mill]")[4]["retrieved"] == ("M-8",)
    assert env.step("search[mill]")[4]["retrieved"] == ("M-7",)
    (tmp_path / "broken.jsonl").write_text('{"title": "x"}\n{', encoding="utf-8")
    with pytest.raises(ServerError, match=r"(?s)did not start.*broken.jsonl.*line 1"):
        SearchQAEnv(split="test", data=folder, corpus=tmp_path / "broken.jsonl")
