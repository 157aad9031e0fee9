"""The environment in the generated world, with a server of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atod_gym
from atod_gym import tasks as atod_tasks
from atod_gym.envs.search_qa.env import SearchQAEnv
from atod_gym.errors import DataNotFoundError, InvalidSettingError, TaskNotFoundError
from atod_gym.serving import http as http_client
from atod_gym.types import SearchQAInfo, TurnObservation
from atod_gym.wrappers import agent_env

REPOSITORY = Path(atod_gym.__file__).resolve().parent.parent
AT_END = {"golden_answers"}
KEYS = SearchQAInfo.__annotations__.keys()


def make(**changes: Any) -> SearchQAEnv:
    settings = {"data": "generated", **changes}
    if "max_turns" in changes:
        return SearchQAEnv(**settings)
    env = gymnasium.make("atod/SearchQA-v0", **settings).unwrapped
    assert isinstance(env, SearchQAEnv)
    return env


@pytest.fixture(scope="module")
def solved() -> tuple[str, str, str]:
    """A task, its question and a right answer to it."""
    env = make(task_types="one_hop")
    observation, info = env.reset(seed=0)
    answers = env.step("answer[?]")[4]["golden_answers"]
    return info["task_id"], observation["instruction"], answers[0]


def test_every_check_passes() -> None:
    check_env(make(split="test", topk=5, task_types="bridge"))


def test_a_right_answer_wins(solved: tuple[str, str, str]) -> None:
    task_id, question, answer = solved
    env = make()
    observation, info = env.reset(options={"task_id": task_id})
    assert observation.keys() == TurnObservation.__annotations__.keys()
    assert info.keys() == KEYS - AT_END
    assert (observation["instruction"], observation["admissible_actions"]) == (question, ())
    assert (info["task_id"], info["split"], info["task_type"]) == (task_id, "train", "one_hop")
    assert (info["query"], info["retrieved"], info["searches"], info["answer"]) == ("", (), 0, "")
    observation, reward, terminated, truncated, info = env.step(f" Search[ {question} ] ")
    assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
    assert (info["query"], info["searches"], info["retriever"]) == (question, 1, "bm25")
    assert len(set(info["retrieved"])) == 3
    assert info["is_action_valid"]
    assert info.keys() == KEYS - AT_END
    lines = observation["text"].splitlines()
    assert (lines[0], lines[-1]) == ("<information>", "</information>")
    assert [line[:5] for line in lines[1:-1]] == ["Doc 1", "Doc 2", "Doc 3"]
    assert answer in observation["text"]
    observation, reward, terminated, truncated, info = env.step(f"ANSWER[the {answer.upper()}!]")
    assert observation["text"] == f"Your answer was taken: the {answer.upper()}!"
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["success"], info["score"], info["f1"]) == (True, 1.0, 1.0)
    assert info["answer"] == f"the {answer.upper()}!"
    assert (info["query"], info["retrieved"], info["searches"]) == ("", (), 1)
    assert answer in info["golden_answers"]
    assert info.keys() == KEYS
    assert info["turn_index"] == 2
    with pytest.raises(ResetNeeded, match="over"):
        env.step("search[x]")


def test_a_wrong_answer_ends_and_may_have_an_f1(solved: tuple[str, str, str]) -> None:
    task_id, _, answer = solved
    env = make()
    env.reset(options={"task_id": task_id})
    words = len(answer.split())
    _, reward, terminated, truncated, info = env.step(f"answer[{answer} perhaps]")
    assert (reward, terminated, truncated, info["score"]) == (0.0, True, False, 0.0)
    assert info["f1"] == pytest.approx(2 * words / (2 * words + 1))
    env.reset(options={"task_id": task_id})
    assert env.step("search[x]")[4]["f1"] == 0.0


def test_the_turn_limit_truncates_and_shows_the_gold_answers() -> None:
    env = make(max_turns=3)
    env.reset(seed=0)
    infos = [env.step("search[mill]")[4] for _ in range(3)]
    assert ["golden_answers" in info for info in infos] == [False, False, True]
    assert infos[-1]["searches"] == 3
    # An answer on the last turn is no truncation.
    env.reset(seed=0)
    assert [env.step(action)[2:4] for action in ("x", "x", "answer[x]")][-1] == (True, False)


@pytest.mark.parametrize(
    "action", ["", " ", "answer[ ]", "\ud800", "\x00", "[" * 100_000, f"search[{'x' * 10_001}]"]
)
def test_malformed_actions_cost_a_turn(action: str) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(action)
    text = "This is no action. Write search[..] or answer[..]."
    assert observation == {**before, "turn_index": 1, "text": text}
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["is_action_valid"], info["turn_index"], info["action"]) == (False, 1, action)
    assert (info["searches"], info["query"], info["retrieved"]) == (0, "", ())
    assert observation in env.observation_space
    assert info["message"]
    assert env.step("search[mill]")[4]["message"] == ""


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=()), max_size=30).map("search[{}]".format)
        | st.text("abc[]<>searchanw ", max_size=30)
        | st.just("answer[x]"),
        max_size=8,
    ),
    st.integers(0, 2**32 - 1),
)
def test_random_play_keeps_every_promise(actions: list[str], seed: int) -> None:
    env = make(max_turns=6)
    env.reset(seed=seed)
    searches = 0
    for number, action in enumerate(actions, 1):
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        assert observation["turn_index"] == number
        assert len(observation["text"]) <= 4000
        assert terminated == bool(info["answer"])
        assert truncated == (not terminated and number == 6)
        assert reward == float(info["success"]) == info["score"]
        searches += bool(info["query"])
        assert info["searches"] == searches
        assert len(info["retrieved"]) <= 3
        if terminated or truncated:
            break


def finish(env: SearchQAEnv, task_id: str, searcher: Any, wasted: int = 0) -> tuple[float, bool]:
    """Play an episode; the return, and whether it was truncated.

    Args:
        wasted: turns at the start in which something else is done.
    """
    observation, _ = env.reset(options={"task_id": task_id})
    searcher.reset(observation["instruction"], observation["text"])
    last, turn = None, 0
    while True:
        action = searcher.act(observation["text"], (), last)
        last = "search[nothing of it]" if turn < wasted else None
        observation, reward, terminated, truncated, _ = env.step(last or action)
        turn += 1
        if terminated or truncated:
            return reward, truncated


@pytest.mark.parametrize("max_turns", [1, 2, 3, 8])
@pytest.mark.parametrize("told", [False, True])
def test_experts_answer_in_the_last_turn_at_the_latest(max_turns: int, told: bool) -> None:
    env = make(max_turns=max_turns, task_types=["bridge", "comparison"])
    results = []
    for task_id in env.task_ids[:15]:
        env.reset(options={"task_id": task_id})
        searcher = env.demonstrator() if told else env.expert()
        results.append(finish(env, task_id, searcher))
    assert not any(truncated for _, truncated in results)
    if max_turns >= 3:
        assert [reward for reward, _ in results] == [1.0] * 15


def test_more_turns_make_up_for_wasted_ones() -> None:
    rewards = {}
    for max_turns in (None, 8):
        env = make(max_turns=max_turns, task_types="bridge")
        results = [finish(env, task_id, env.expert(), wasted=3) for task_id in env.task_ids[:10]]
        assert not any(truncated for _, truncated in results)
        rewards[max_turns] = [reward for reward, _ in results]
    assert sum(rewards[None]) < sum(rewards[8]) == 10


def test_budgets_and_topk(solved: tuple[str, str, str]) -> None:
    def text(**changes: Any) -> str:
        env = make(**changes)
        env.reset(options={"task_id": solved[0]})
        return str(env.step(f"search[{solved[1]}]")[0]["text"])

    assert text(topk=1).count("Doc ") == 1
    assert text(topk=10).count("Doc ") == 10
    assert text(passage_characters=40).count(" [...]\n") == 3
    assert len(text(observation_characters=200)) <= 200
    assert "[...]" in text(observation_characters=200)
    assert "[...]" not in text()
    with pytest.raises(InvalidSettingError, match="topk=1000 is more"):
        make(topk=1000)


def test_splits_and_task_types() -> None:
    splits = [make(split=split).task_ids for split in ("train", "dev", "test")]
    ids = [task_id for split in splits for task_id in split]
    assert len(set(ids)) == len(ids)
    assert all(splits)
    assert all(task_id.startswith("generated/") for task_id in ids)
    kinds = {kind: make(task_types=[kind]) for kind in ("one_hop", "bridge", "comparison")}
    whole = make()
    assert sorted(whole.task_ids) == sorted(t for env in kinds.values() for t in env.task_ids)
    for kind, env in kinds.items():
        assert env.manifest == whole.manifest
        assert env.reset(seed=0)[1]["task_type"] == kind
        with pytest.raises(TaskNotFoundError):
            env.reset(options={"task_id": next(iter(set(whole.task_ids) - set(env.task_ids)))})
    assert make(task_types="one_hop,bridge").task_ids == make(
        task_types=("bridge", "one_hop")).task_ids  # fmt: skip


def test_other_worlds_have_other_tasks() -> None:
    small = make(entities=60, world_seed=3)
    assert all(name.startswith("generated-60-seed3/") for name in small.task_ids)
    assert small.server_url != make().server_url


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"topk": 0}, InvalidSettingError, "topk"),
        ({"topk": True}, InvalidSettingError, "topk"),
        ({"passage_characters": 5}, InvalidSettingError, "passage_characters"),
        ({"observation_characters": 99}, InvalidSettingError, "observation_characters"),
        ({"split": "valid"}, DataNotFoundError, "known: dev, test, train"),
        ({"task_types": "two_hop"}, InvalidSettingError, "bridge, comparison, one_hop"),
        ({"data": "nowhere"}, DataNotFoundError, "official, generated, or a folder"),
        ({"data": ""}, InvalidSettingError, "auto, official"),
        ({"data": 3.5}, InvalidSettingError, "auto, official"),
        ({"entities": "x"}, InvalidSettingError, "entities"),
        ({"world_seed": -1}, InvalidSettingError, "world_seed"),
        ({"timeout": -1}, InvalidSettingError, "timeout"),
        ({"token": 5}, InvalidSettingError, "token"),
        ({"corpus": "x.jsonl"}, InvalidSettingError, "has its own passages"),
        ({"corpus": "x", "server_url": "http://h", "data": "auto"}, InvalidSettingError, "both"),
        ({"server_url": "shop"}, InvalidSettingError, "http://127.0.0.1:3000"),
    ],
)
def test_wrong_settings_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        SearchQAEnv(**{"data": "generated", **changes})


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn", "forkserver"])
def test_worker_processes_search_in_the_server_of_this_one(context: str) -> None:
    envs = gymnasium.make_vec(
        "atod/SearchQA-v0", num_envs=3, vectorization_mode="async", max_turns=2, data="generated",
        vector_kwargs={"shared_memory": False, "context": context},
    )  # fmt: skip
    try:
        assert {*envs.get_attr("server_url")} == {make().server_url}
        _, infos = envs.reset(seed=11)
        singles = [make().reset(seed=11 + number)[1]["task_id"] for number in range(3)]
        assert list(infos["task_id"]) == singles
        *_, infos = envs.step(("search[mill]", "nonsense", "answer[x]"))
        assert list(infos["is_action_valid"]) == [True, False, True]
        assert [len(shown) for shown in infos["retrieved"]] == [3, 0, 0]
        assert infos["_golden_answers"].tolist() == [False, False, True]
        assert isinstance(infos["golden_answers"][2], tuple)
    finally:
        envs.close()


def test_agents_write_tags(solved: tuple[str, str, str]) -> None:
    task_id, question, answer = solved
    env = agent_env(make(), profile="tags", style="chat")
    messages, _ = env.reset(options={"task_id": task_id})
    assert question in messages[-1]["content"]
    assert "<search>..</search> or <answer>..</answer>" in messages[-1]["content"]
    messages, _, _, _, info = env.step(f"<think>hm</think><search>{question}</search>")
    assert (info["action"], info["parse_error"]) == (f"search[{question}]", "")
    assert messages[-1]["content"].startswith("<information>\nDoc 1 ")
    completion = env.get_wrapper_attr("completion_format").format(f"answer[{answer}]")
    assert completion == f"<think></think><answer>{answer}</answer>"
    assert env.step(completion)[1] == 1.0
    spec = EnvSpec.from_json(env.spec.to_json())  # type: ignore[union-attr]
    assert gymnasium.make(spec).get_wrapper_attr("completion_format").tags == ("search", "answer")
    # Published runs searched also where a completion was malformed.
    published = agent_env(make(), profile="compat", style="window")
    published.reset(options={"task_id": task_id})
    *_, info = published.step("<SEARCH>Mill</SEARCH><search>b</search>")
    assert (info["action"], info["is_action_valid"], info["searches"]) == ("search[Mill]", True, 1)
    assert info["parse_error"]


@pytest.mark.usefixtures("no_user_data")
def test_data_is_looked_for_and_else_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(atod_tasks, "_announced", set())
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        assert [make(data="auto").data for _ in range(2)] == ["generated"] * 2
    assert caplog.text.count("no official data found") == 1
    with pytest.raises(
        DataNotFoundError, match=r"looked in .*atod-data get searchqa.*SEARCHQA_DATA"
    ):
        make(data="official")
    with pytest.raises(DataNotFoundError, match="A corpus is given, but no question"):
        make(data="auto", corpus=tmp_path / "corpus.jsonl")
    (tmp_path / "searchqa").mkdir()
    question = '{"question": "q", "golden_answers": ["a"]}'
    (tmp_path / "searchqa" / "x_test.jsonl").write_text(question, encoding="utf-8")
    for variable in ("ATOD_DATA", "SEARCHQA_DATA"):
        monkeypatch.setenv(variable, str(tmp_path))
        with pytest.raises(
            DataNotFoundError, match=r"not all of the official ones: 2wiki.*dev.jsonl is missing"
        ):
            make(data="official", split="test")
        for data in ("auto", tmp_path):
            with pytest.raises(
                DataNotFoundError, match=r"No corpus next to .*corpus=.*server_url="
            ):
                make(data=data, split="test")
        monkeypatch.delenv(variable)
    with pytest.raises(DataNotFoundError, match=r"No corpus '.*gone.jsonl'"):
        make(data=tmp_path, split="test", corpus=tmp_path / "gone.jsonl")


@pytest.mark.slow
def test_a_server_of_our_own_that_died_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "BACKOFF_SECONDS", 0.005)
    # A server that no other test uses.
    env, other = (make(entities=70) for _ in range(2))
    url = env.server_url
    first = [env.reset(seed=1), other.reset(seed=1), env.step("search[mill]")]
    os.kill(env._connection.health["pid"], signal.SIGKILL)
    other.step("search[mill]")
    assert env.reset(seed=1) == first[0]
    again = env.step("search[mill]")
    assert again == first[2]
    assert env.server_url == other.server_url != url


@pytest.mark.slow
def test_it_can_be_played_in_a_terminal(solved: tuple[str, str, str]) -> None:
    task_id, question, answer = solved
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "atod_gym.play", "atod/SearchQA-v0",
         "--data", "generated", "--task-id", task_id],
        input=f"search[{question}]\nnonsense\nanswer[{answer}]\n", capture_output=True, text=True,
        timeout=60, check=False, cwd=REPOSITORY, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "Actions: search[..], answer[..]" in finished.stdout
    assert "Doc 1 (Title: " in finished.stdout
    assert "Solved after 2 turns (score 1)." in finished.stdout  # "nonsense" costs none
    assert f"Right answers: {answer}" in finished.stdout
