"""The environment against a retrieval server that can be told to misbehave."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from fake_retriever import FOREIGN, OURS, FakeRetriever

from atod_gym.envs.search_qa import settings
from atod_gym.envs.search_qa.env import MAX_QUERY_LENGTH, SearchQAEnv
from atod_gym.errors import DataNotFoundError, InvalidSettingError, ServerError
from atod_gym.serving import http as http_client

Start = Callable[..., FakeRetriever]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[FakeRetriever] = []

    def starting(health: dict[str, Any] = FOREIGN) -> FakeRetriever:
        started.append(FakeRetriever(health))
        return started[-1]

    yield starting
    for fake in started:
        fake.end()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "BACKOFF_SECONDS", 0.005)
    monkeypatch.setattr(settings, "RETRY_DELAYS", (0.0, 0.0))


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Thirty questions and no corpus: the servers here have their own."""
    rows = [{"question": f"Question {n}?", "golden_answers": [f"gold {n}"]} for n in range(30)]
    path = tmp_path / "capitals_test.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return tmp_path


def make(fake: FakeRetriever, folder: Path, **more: Any) -> SearchQAEnv:
    arguments = {"split": "test", "data": folder, "server_url": fake.url, **more}
    env = SearchQAEnv(**arguments)
    fake.searches()
    env.reset(seed=0)
    return env


def test_a_search(start: Start, questions: Path) -> None:
    fake = start()
    env = make(fake, questions, topk=2)
    observation, _, _, _, info = env.step("search[moon]")
    assert fake.searches() == [{"queries": ["moon"], "topk": 2, "return_scores": True}]
    assert observation["text"] == (
        "<information>\nDoc 1 (Title: About moon) Passage 0.\n"
        "Doc 2 (Title: About moon) Passage 1.\n</information>"
    )
    assert (info["retrieved"], info["retriever"]) == (("0", "1"), "unknown")
    assert info["data"] == str(questions)
    text = env.step("search[nothing]")[0]["text"]
    assert text == "<information>\nNo passage matches this query.\n</information>"
    # More passages than asked for are not shown.
    fake.mishaps.append({"result": [[{"contents": "a\nb"}] * 3]})
    assert env.step("search[x]")[0]["text"].count("Doc ") == 2


@pytest.mark.parametrize(
    ("document", "line", "passage_id"),
    [
        ({"id": 7, "contents": "Brenn\nA town."}, "(Title: Brenn) A town.", "7"),
        ({"_id": "MED-1", "title": "Brenn", "text": "A town."}, "(Title: Brenn) A town.", "MED-1"),
        ({"docid": "d", "title": None, "text": "A town."}, "(Title: ) A town.", "d"),
        ({"text": "A town."}, "(Title: ) A town.", ""),
        ({"id": None, "contents": "A town."}, "(Title: ) A town.", ""),
        ({"title": "Brenn", "contents": "A town."}, "(Title: Brenn) A town.", ""),
        ({"title": "Brenn", "contents": "A\ntown."}, "(Title: Brenn) A town.", ""),
        ({"title": "Brenn", "contents": '"Brenn"\nA town.'}, "(Title: Brenn) A town.", ""),
    ],
)
def test_passages_of_other_servers(
    start: Start, questions: Path, document: dict[str, Any], line: str, passage_id: str
) -> None:
    fake = start()
    env = make(fake, questions)
    for hit in (document, {"document": document, "score": 1.5}):
        fake.mishaps.append({"result": [[hit]]})
        observation, *_, info = env.step("search[x]")
        assert observation["text"] == f"<information>\nDoc 1 {line}\n</information>"
        assert info["retrieved"] == (passage_id,)


@pytest.mark.parametrize("end", ["", "/", "/retrieve", "/retrieve/"])
@pytest.mark.parametrize("path", ["", "/api"])
def test_the_path_that_other_settings_have_is_understood(
    start: Start, questions: Path, path: str, end: str
) -> None:
    fake = start({**OURS, "data": "generated", "entities": 50, "world_seed": 0, "splits": ["dev"]})
    fake.questions = {"questions": [ROW]}
    fake.prefix = path
    url = f"{fake.url}{path}{end}"
    env = SearchQAEnv(split="dev", server_url=url, entities=50)
    env.reset(seed=0)
    assert "About moon" in env.step("search[moon]")[0]["text"]
    assert env.server_url == f"{fake.url}{path}"
    assert {one for _, one in fake.requests} == {
        f"{path}/{name}" for name in ("health", "questions/dev", "retrieve")}  # fmt: skip


def test_a_vector_step_is_one_request(start: Start, questions: Path) -> None:
    fake = start()
    envs = gymnasium.make_vec(
        "atod/SearchQA-v0", num_envs=5, split="test", data=questions, server_url=fake.url,
        task_types="capitals",
    )  # fmt: skip
    observations, _ = envs.reset(seed=3)
    assert len(set(observations["instruction"])) > 1
    fake.searches()
    actions = ("search[a]", "SEARCH[ b ]", "answer[x]", "nonsense", "search[a]")
    observations, _, terminated, _, infos = envs.step(actions)
    assert [body["queries"] for body in fake.searches()] == [["a", "b"]]
    assert ["About a" in text for text in observations["text"]] == [
        True, False, False, False, True]  # fmt: skip
    assert (terminated.tolist(), infos["searches"].tolist()) == (
        [False, False, True, False, False], [1, 1, 0, 0, 1])  # fmt: skip
    # A request that fails spends no turn of any environment.
    fake.mishaps.extend([500] * 3)
    with pytest.raises(ServerError, match="HTTP 500"):
        envs.step(("search[c]",) * 5)
    assert "About c" in envs.step(("search[c]",) * 5)[0]["text"][3]
    envs.close()


MISHAPS: list[Any] = [
    *("hang up", 500, 502, 503),
    *(b"{", b"", b"[]", {"result": []}, {"result": [[], []]}, {"result": "x"}, {"results": [[]]}),
    *({"result": [None]}, {"result": [[None]]}, {"result": [["x"]]}, {"result": [[{"id": 1}]]}),
    *({"result": [[{"document": {"contents": 5}}]]}, {"result": [[{"document": []}]]}),
]


@pytest.mark.parametrize("mishap", MISHAPS, ids=repr)
def test_a_failed_search_is_repeated_and_then_reported(
    start: Start, questions: Path, mishap: Any
) -> None:
    fake = start()
    env = make(fake, questions)
    fake.mishaps.extend([mishap] * 2)
    observation, *_, info = env.step("search[moon]")
    assert "About moon" in observation["text"]
    assert (info["turn_index"], info["searches"]) == (1, 1)
    assert len(fake.searches()) == 3
    fake.mishaps.extend([mishap] * 100)
    with pytest.raises(ServerError) as caught:
        env.step("search[sun]")
    assert fake.url in str(caught.value)
    assert "atod-serve retrieval" in str(caught.value)
    assert str(caught.value).count("atod-serve") == 1
    assert len(fake.searches()) in (3, 5)
    # The turn is not spent, and the same step may be taken again.
    assert env.observation == observation
    fake.mishaps.clear()
    observation, *_, info = env.step("search[sun]")
    assert "About sun" in observation["text"]
    assert (info["turn_index"], info["searches"]) == (2, 2)


@pytest.mark.slow
def test_a_slow_server_is_reported(start: Start, questions: Path) -> None:
    fake = start()
    env = make(fake, questions, timeout=0.1)
    fake.mishaps.extend(["slow"] * 100)
    with pytest.raises(ServerError, match=r"no answer within 0.1 s.*atod-serve retrieval"):
        env.step("search[x]")
    fake.mishaps.clear()
    time.sleep(0.4)
    assert env.step("search[x]")[4]["turn_index"] == 1


@pytest.mark.parametrize("answer", [404, {"results": []}, 500])
def test_a_server_that_does_not_search_is_reported_at_once(
    start: Start, questions: Path, answer: Any
) -> None:
    fake = start()
    fake.mishaps.extend([answer] * 3)
    with pytest.raises(ServerError, match=f"{fake.url}/retrieve.*atod-serve retrieval"):
        SearchQAEnv(split="test", data=questions, server_url=fake.url)
    fake.mishaps.clear()
    fake.searches()
    for _ in range(3):
        SearchQAEnv(split="test", data=questions, server_url=fake.url)
    assert [body["topk"] for body in fake.searches()] == [1]


def test_a_refused_request_is_not_repeated(start: Start, questions: Path) -> None:
    fake = start()
    env = make(fake, questions)
    for status in (422, 504, 401):
        fake.mishaps.append(status)
        with pytest.raises(ServerError) as caught:
            env.step("search[x]")
        assert caught.value.status == status
        assert len(fake.searches()) == 1
    assert "ATOD_SERVER_TOKEN" in str(caught.value)


def test_a_server_that_is_down_is_reported(questions: Path, start: Start) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ServerError, match=f"{url}/health.*atod-serve retrieval"):
            SearchQAEnv(split="test", data=questions, server_url=url)
    fake = FakeRetriever(FOREIGN)
    env = make(fake, questions)
    fake.end()
    with pytest.raises(ServerError, match=f"{fake.url}/retrieve.*atod-serve retrieval"):
        env.step("search[x]")
    # A server that answers there later must identify itself.
    with pytest.raises(ServerError, match=f"{fake.url}/health"):
        env.step("search[x]")
    assert env.step("answer[gold 1]")[4]["turn_index"] == 1


def test_other_servers_are_refused(start: Start, questions: Path) -> None:
    with pytest.raises(ServerError, match=r"not a retrieval server.*webshop"):
        make(start({"service": "webshop"}), questions)
    # Health in words of its own tells nothing.
    assert make(start({"status": "fine"}), questions).step("x")[4]["retriever"] == "unknown"
    assert make(start(OURS), questions).step("x")[4]["retriever"] == "bm25"


def test_queries_are_made_sendable(start: Start, questions: Path) -> None:
    fake = start()
    env = make(fake, questions, max_turns=9)
    for query, sent in [("a\ud800b", "a?b"), ("ü 🙂\x00", "ü 🙂\x00"), ("a\n b", "a\n b")]:
        *_, info = env.step(f"search[{query}]")
        assert [body["queries"] for body in fake.searches()] == [[sent]]
        assert info["query"] == query
    assert env.step(f"search[{'x' * MAX_QUERY_LENGTH}]")[4]["is_action_valid"]
    assert fake.searches()
    assert not env.step(f"search[{'x' * (MAX_QUERY_LENGTH + 1)}]")[4]["is_action_valid"]
    assert not fake.searches()


def test_the_token_is_sent(start: Start, questions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = start()
    make(fake, questions, token="secret").step("search[x]")
    monkeypatch.setenv("ATOD_SERVER_TOKEN", "other")
    make(fake, questions).step("search[x]")
    assert {*fake.tokens} == {"Bearer secret", "Bearer other"}


def test_a_turn_is_one_request_per_server_and_topk(
    start: Start, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "BATCH_LIMIT", 2)
    fake, elsewhere = start(), start()
    envs = [make(fake, questions) for _ in range(4)]
    envs += [make(fake, questions, topk=1), make(elsewhere, questions)]
    fake.searches()
    elsewhere.searches()
    results = SearchQAEnv._play_many(envs, [f"search[{query}]" for query in "abacac"])
    assert [(body["queries"], body["topk"]) for body in fake.searches()] == [
        (["a", "b"], 3), (["c"], 3), (["a"], 1)]  # fmt: skip
    assert [body["queries"] for body in elsewhere.searches()] == [["c"]]
    for query, result in zip("abacac", results, strict=True):
        assert f"About {query}" in result.text


WORLD = {**OURS, "data": "generated", "entities": 50, "world_seed": 7, "splits": ["dev", "train"]}
ROW = {"id": "q1", "question": "Who?", "golden_answers": ["A", "B"], "data_source": "one_hop"}


def test_the_questions_of_a_generated_world(start: Start) -> None:
    fake = start(WORLD)
    fake.questions = {"split": "dev", "questions": [{**ROW, "id": "q2"}, ROW]}
    arguments = {"split": "dev", "server_url": fake.url, "entities": 50, "world_seed": 7}
    for data in ("auto", "generated"):
        env = SearchQAEnv(data=data, **arguments)
        assert env.task_ids == ("generated-50-seed7/q1", "generated-50-seed7/q2")
        assert env.reset(seed=0)[1]["data"] == "generated"
        assert env.manifest.name == "searchqa/generated-50-seed7"
    assert env.step("answer[b]")[4]["golden_answers"] == ("A", "B")
    assert fake.requests.count(("GET", "/questions/dev")) == 1
    with pytest.raises(DataNotFoundError, match=r"No split 'test' .* known: dev, train"):
        SearchQAEnv(**{**arguments, "split": "test"})
    for name in ("entities", "world_seed"):
        with pytest.raises(InvalidSettingError, match=rf"{name}=\d+, but {name}=9 was requested"):
            SearchQAEnv(**{**arguments, name: 9})


@pytest.mark.parametrize(
    "rows",
    [None, [5], [{}], [{**ROW, "golden_answers": []}], [{**ROW, "golden_answers": "A"}],
     [{**ROW, "id": 5}]],
)  # fmt: skip
def test_questions_that_make_no_sense_are_reported(start: Start, rows: Any) -> None:
    fake = start(WORLD)
    fake.questions = {"questions": rows}
    with pytest.raises(ServerError, match=f"{fake.url}/questions/train: unexpected answer"):
        SearchQAEnv(data="generated", server_url=fake.url, entities=50, world_seed=7)


@pytest.mark.usefixtures("no_user_data")
def test_questions_and_server_must_fit(start: Start, questions: Path) -> None:
    world, foreign = start(WORLD), start()
    with pytest.raises(InvalidSettingError, match="generated world, which has no answers"):
        make(world, questions)
    for data in ("generated", "auto"):
        with pytest.raises(DataNotFoundError, match="has no generated questions"):
            SearchQAEnv(data=data, server_url=foreign.url)
