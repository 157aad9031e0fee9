"""The environment against a fake shop that can be told to misbehave and records its requests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fake_server import Answer, FakeServer
from gymnasium.error import ResetNeeded

from atod_gym.envs.webshop import env as webshop
from atod_gym.envs.webshop.env import MAX_ACTION_LENGTH, WebShopEnv
from atod_gym.errors import DataNotFoundError, InvalidSettingError, ServerError
from atod_gym.serving import connection, http


class FakeShop(FakeServer):
    """One page, on which no action does anything but `buy 0.5` and the like."""

    def __init__(self, port: int = 0, tasks: int = 20) -> None:
        self.task_count = tasks
        self.health: dict[str, Any] = {
            "status": "ok", "service": "webshop", "data": "generated", "pid": os.getpid(),
            "splits": {"train": tasks, "empty": 0}, "split_rule": "original", "goal_seed": 233,
            "text_style": "text", "human_goals": False, "noun_tagger": "words", "goals": tasks,
            "products": 1000,
        }  # fmt: skip
        self.sessions: dict[str, dict[str, Any]] = {}
        self.opened = 0
        self.change: dict[str, dict[str, Any]] = {}
        """Part of a path -> fields that answers get in place of their own."""
        self.fail: dict[str, Answer] = {}
        """Part of a path -> answer in place of the right one."""
        self.capacity = 1000
        super().__init__(self.answer, port)
        self.headers = {"atod-served": str(tasks)}

    def answer(self, method: str, path: str, body: Any) -> Answer:
        right = self.right_answer(path, body)
        for part, change in self.change.items():
            if part in path:
                right = change_answer(right, change)
        return next((answer for part, answer in self.fail.items() if part in path), (200, right))

    def right_answer(self, path: str, body: Any) -> dict[str, Any]:
        if path == "/health":
            return self.health
        if path.startswith("/tasks/"):
            count = self.task_count if path == "/tasks/train" else 0
            return {"name": "fake", "task_ids": [f"fake/{n:04d}" for n in range(count)],
                    "task_types": ["toys", "food"] * (count // 2) + ["food"] * (count % 2),
                    "content_hash": f"{count:064x}"}  # fmt: skip
        name, one = {
            "/batch/create": ("sessions", self.open),
            "/batch/step": ("steps", self.step),
            "/batch/close": ("session_ids", self.close),
        }[path]
        return {"results": [one(item) for item in body[name]]}

    def open(self, item: dict[str, Any]) -> dict[str, Any]:
        if len(self.sessions) >= self.capacity:
            return error(503, "at_capacity", f"All {self.capacity} sessions are in use.")
        name = f"s{self.opened}"
        self.opened += 1
        self.sessions[name] = {"turn": 0}
        return {**self.page(name), "task_id": item["task_id"], "instruction": "Find me a toy."}

    def step(self, item: dict[str, Any]) -> dict[str, Any]:
        session, turn, action = self.sessions.get(item["session_id"]), item["turn_index"], item
        if session is None:
            return error(404, "unknown_session")
        if turn == session["turn"] - 1 and action == session["action"]:
            answer: dict[str, Any] = session["answer"]
            return answer
        if turn != session["turn"]:
            return error(409, "wrong_turn_index")
        session["turn"] += 1
        session["action"] = action
        bought = item["action"].startswith("buy ")
        score = float(item["action"][4:]) if bought else 0.0
        details = {
            "reward": score, "r_type": 1.0, "r_att": 1.0, "w_att": 0.5, "r_option": None,
            "w_option": None, "r_price": True, "w_price": 0.5, "query_match": True,
            "category_match": True, "title_score": 1.0, "noun_tagger": "words",
        }  # fmt: skip
        session["answer"] = {
            **self.page(item["session_id"], bought, score), "is_action_valid": bought,
            "message": "" if bought else "Nothing.", "details": details if bought else None,
        }  # fmt: skip
        return dict(session["answer"])

    def page(self, name: str, over: bool = False, score: float = 0.0) -> dict[str, Any]:
        return {"session_id": name, "turn_index": self.sessions[name]["turn"], "text": "A page",
                "over": over, "clickables": ["search", "b", "a", "b"], "has_search_bar": True,
                "score": score}  # fmt: skip

    def close(self, name: str) -> dict[str, Any]:
        if self.sessions.pop(name, None) is None:
            return error(404, "unknown_session")
        return {"closed": True}


def error(status: int, code: str, message: str = "What to do.") -> dict[str, Any]:
    return {"error": {"status": status, "code": code, "message": message}}


def change_answer(answer: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Change the fields of an answer, or of all results of a batch."""
    if "results" in answer and "results" not in change:
        return {"results": [{**result, **change} for result in answer["results"]]}
    return {**answer, **change}


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF_SECONDS", 0.005)
    monkeypatch.setattr(connection, "_connections", {})


@pytest.fixture
def shop() -> Iterator[FakeShop]:
    fake = FakeShop()
    yield fake
    fake.end()


def make(shop: FakeShop, **settings: Any) -> WebShopEnv:
    return WebShopEnv(server_url=shop.url, **settings)


CREATE, STEP, CLOSE = (("POST", f"/batch/{what}") for what in ("create", "step", "close"))
TASK = "fake/0003"


@pytest.mark.parametrize(
    ("score", "reward", "success"), [("1.0", 1.0, True), ("0.99", 0.0, False), ("0.0", 0.0, False)]
)
def test_only_the_full_score_is_a_reward(
    shop: FakeShop, score: str, reward: float, success: bool
) -> None:
    env = make(shop)
    observation, info = env.reset(options={"task_id": TASK})
    assert observation["admissible_actions"] == ("click[a]", "click[b]", "search[<query>]")
    assert "reward_details" not in info
    _, got, terminated, truncated, info = env.step(f"buy {score}")
    assert (got, terminated, truncated) == (reward, True, False)
    assert (info["success"], info["score"]) == (success, float(score))
    assert info["reward_details"]["reward"] == float(score)
    assert "r_option" not in info["reward_details"]


def test_very_long_actions_do_nothing_and_are_not_sent(shop: FakeShop) -> None:
    env = make(shop)
    env.reset(seed=0)
    for length in (MAX_ACTION_LENGTH, MAX_ACTION_LENGTH + 1, 3_000_000):
        info = env.step("🙂" * length)[4]
        assert (info["is_action_valid"], len(info["action"])) == (False, length)
        assert ("more than 10,000" in info["message"]) == (length > MAX_ACTION_LENGTH)
    assert [len(action) for action in sent_actions(shop)] == [MAX_ACTION_LENGTH, 0, 0]


def sent_actions(shop: FakeShop) -> list[str]:
    steps = [body["steps"] for body in shop.bodies if body and "steps" in body]
    return [step["action"] for batch in steps for step in batch]


def test_the_placeholder_of_a_search_is_no_action(shop: FakeShop) -> None:
    env = make(shop)
    observation, _ = env.reset(seed=0)
    assert "search[<query>]" in observation["admissible_actions"]
    observation, *_, info = env.step("search[<query>]")
    assert (info["is_action_valid"], info["action"]) == (False, "search[<query>]")
    assert observation["turn_index"] == 1
    assert "in place of <query>" in info["message"]
    assert env.step("search[<r>]")[4]["message"] == "Nothing."
    assert sent_actions(shop) == ["", "search[<r>]"]


def reset_many(envs: list[WebShopEnv], tasks: list[str]) -> None:
    """Reset all environments as a vector environment does."""
    for env, task, start in zip(envs, tasks, WebShopEnv._open_many(envs, tasks), strict=True):
        assert env._begin(task, *start)[1]["task_id"] == task


@pytest.mark.parametrize("count", [1, 5])
def test_a_turn_of_all_is_one_request_and_a_later_reset_two(shop: FakeShop, count: int) -> None:
    envs = [make(shop) for _ in range(count)]
    health = ("GET", "/health")
    assert shop.take_requests() == [health, ("GET", "/tasks/train"), *[health] * (count - 1)]
    tasks = [f"fake/{number:04d}" for number in range(count)]
    reset_many(envs, tasks)
    results = WebShopEnv._play_many(envs, [f"action {number}" for number in range(count)])
    assert [result.message for result in results] == ["Nothing."] * count
    reset_many(envs, tasks)
    assert shop.take_requests() == [CREATE, STEP, CLOSE, CREATE]
    assert len(shop.sessions) == count
    for env in (*envs, *envs, make(shop)):
        env.close()
    assert shop.take_requests() == [health, *[CLOSE] * count]
    assert shop.sessions == {}
    assert WebShopEnv._open_many([], []) == WebShopEnv._play_many([], []) == []


def test_large_batches_are_cut(shop: FakeShop, monkeypatch: pytest.MonkeyPatch) -> None:
    envs = [make(shop) for _ in range(7)]
    shop.take_requests()
    monkeypatch.setattr(webshop, "BATCH_LIMIT", 3)
    reset_many(envs, [TASK] * 7)
    assert shop.take_requests() == [CREATE] * 3
    monkeypatch.setattr(webshop, "BATCH_LIMIT", 1024)
    monkeypatch.setattr(http, "_BATCH_BYTES", 150_000)
    WebShopEnv._play_many(envs, ["é" * MAX_ACTION_LENGTH] * 7)
    assert shop.take_requests() == [STEP] * 4


def test_environments_of_several_servers_play_together(shop: FakeShop) -> None:
    second = FakeShop(tasks=6)
    envs = [make(shop), make(second), make(shop)]
    reset_many(envs, [TASK] * 3)
    results = WebShopEnv._play_many(envs, ["x", "buy 1.0", "buy 0.5"])
    assert [result.score for result in results] == [0.0, 1.0, 0.5]
    assert (len(shop.sessions), len(second.sessions)) == (2, 1)
    second.end()


def test_many_resets_succeed_or_leave_nothing(shop: FakeShop) -> None:
    envs = [make(shop) for _ in range(4)]
    shop.capacity = 3
    with pytest.raises(ServerError, match="All 3 sessions are in use"):
        WebShopEnv._open_many(envs, [TASK] * 4)
    assert shop.sessions == {}
    full = FakeShop()
    full.capacity = 0
    with pytest.raises(ServerError, match="All 0 sessions are in use"):
        WebShopEnv._open_many([make(full), *envs[:2]], [TASK] * 3)
    assert shop.sessions == {}
    broken = make(full)
    full.end()
    with pytest.raises(ServerError, match=r"POST http://.*/batch/create"):
        WebShopEnv._open_many([*envs[:2], broken], [TASK] * 3)
    assert (shop.opened, shop.sessions) == (7, {})
    shop.capacity = 4
    reset_many(envs, [TASK] * 4)


def test_a_session_that_is_gone_needs_a_reset_and_the_others_none(shop: FakeShop) -> None:
    envs = [make(shop) for _ in range(3)]
    reset_many(envs, [TASK] * 3)
    del shop.sessions[envs[1]._session_id]
    gone = r"What to do\..*idle for too long, or .* restarted.*Call reset\(\)"
    with pytest.raises(ServerError, match=gone) as caught:
        WebShopEnv._play_many(envs, ["x"] * 3)
    assert (caught.value.status, caught.value.code) == (404, "unknown_session")
    with pytest.raises(ResetNeeded):
        envs[1].step("x")
    assert envs[1].reset()[1]["turn_index"] == 0
    for env in envs:
        assert env.step("x")[4]["turn_index"] == 1


def test_a_step_whose_answer_was_lost_can_be_called_again(shop: FakeShop) -> None:
    env = make(shop)
    env.reset(options={"task_id": TASK})
    shop.fail = {"step": None}
    with pytest.raises(ServerError, match=f"{shop.url}/batch/step.*atod-serve webshop"):
        env.step("x")
    shop.fail = {}
    assert env.step("x")[4]["turn_index"] == 1
    assert env.step("y")[4]["turn_index"] == 2
    shop.fail = {"step": None}
    with pytest.raises(ServerError):
        env.step("z")
    shop.fail = {}
    with pytest.raises(ServerError, match="lost") as caught:
        env.step("another")
    assert caught.value.code == "wrong_turn_index"
    with pytest.raises(ResetNeeded):
        env.step("z")


def test_a_restarted_server_serves_a_fresh_reset() -> None:
    first = FakeShop()
    env = make(first)
    env.reset(options={"task_id": TASK})
    first.end()
    with pytest.raises(ServerError, match=f"(?s){first.url}.*atod-serve webshop"):
        env.step("x")
    with pytest.raises(ServerError, match="/health"):
        env.reset()
    with pytest.raises(ResetNeeded):
        env.step("x")
    second = FakeShop(first.port)
    assert env.reset(options={"task_id": TASK})[1]["task_id"] == TASK
    second.end()
    third = FakeShop(first.port, tasks=7)
    with pytest.raises(ServerError):
        env.step("x")
    with pytest.raises(ServerError, match=r"restarted with splits=.* instead of"):
        env.reset()
    third.end()
    env.close()


def test_a_failing_close_is_quiet(shop: FakeShop) -> None:
    envs = [make(shop) for _ in range(2)]
    reset_many(envs, [TASK] * 2)
    shop.fail = {"close": None}
    for env in envs:
        env.close()


@pytest.mark.parametrize("count", [1, 3])
def test_sessions_whose_answer_was_late_are_closed_after_the_reset(
    shop: FakeShop, count: int
) -> None:
    envs = [make(shop) for _ in range(count)]
    reset_many(envs, [TASK] * count)
    for _ in range(3):
        shop.fail = {"step": None}
        with pytest.raises(ServerError):
            WebShopEnv._play_many(envs, ["x"] * count)
        shop.fail = {}
        for env in envs:
            env.reset()
        assert len(shop.sessions) == count
    for env in envs:
        env.close()
    assert not shop.sessions


@pytest.mark.slow
def test_environments_that_are_just_dropped_leave_no_sessions(shop: FakeShop) -> None:
    envs = [make(shop) for _ in range(3)]
    for env in envs:
        env.reset(options={"task_id": TASK})
    del env, envs[1:]
    gc.collect()
    assert len(shop.sessions) == 3
    envs[0].reset()
    assert len(shop.sessions) == 1
    envs[0].close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_leaves_the_sessions_of_its_parent(shop: FakeShop) -> None:
    env = make(shop)
    env.reset(options={"task_id": TASK})
    child = os.fork()
    if child == 0:
        env.reset()
        env.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert env.step("x")[4]["turn_index"] == 1
    assert (shop.opened, list(shop.sessions)) == (2, ["s0"])


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("create", {"text": None}, "text None"),
        ("create", {"turn_index": 5}, "turn_index 5, expected"),
        ("create", {"clickables": None}, "create: unexpected answer"),
        ("create", {"score": "high"}, "score 'high'"),
        ("create", {"score": 7}, "score 7"),
        ("create", {"task_id": "other"}, "task_id 'other'"),
        ("create", {"results": []}, "not 1 results"),
        ("create", {"results": [7]}, "create: unexpected answer"),
        ("step", {"session_id": "other"}, "session_id 'other'"),
        ("step", {"is_action_valid": 1}, "is_action_valid 1"),
        ("step", {"details": {"reward": 1.0}}, "'r_type'"),
        ("step", {"over": None}, "over None"),
        ("health", {"service": "library"}, "not a webshop server"),
        ("health", {"splits": None}, "splits None"),
        ("tasks", {"content_hash": "x"}, "content_hash 'x'"),
        ("tasks", {"task_ids": ["b", "a"], "task_types": ["x", "y"]}, "sorted"),
        ("tasks", {"task_types": []}, "tasks/train: unexpected answer"),
    ],
)
def test_unexpected_answers_are_named(
    shop: FakeShop, path: str, change: dict[str, Any], message: str
) -> None:
    shop.change = {path: change}
    with pytest.raises(ServerError, match=message) as caught:  # noqa: PT012
        env = make(shop)
        env.reset(options={"task_id": TASK})
        env.step("x")
    assert shop.url in str(caught.value)


def test_settings_that_contradict_the_server_are_named(shop: FakeShop) -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": "official"}, InvalidSettingError, "data='generated', but data='official'"),
        ({"data": "/some/folder"}, InvalidSettingError, "data='generated'"),
        ({"split_rule": "verl-agent"}, InvalidSettingError, "split_rule='original', but"),
        ({"goal_seed": 0}, InvalidSettingError, "goal_seed=233, but goal_seed=0"),
        ({"split": "val"}, DataNotFoundError, "known: train, empty"),
        ({"split": "empty"}, InvalidSettingError, r"no task: the shop has 20 goals.*train \(20\)"),
        ({"server_url": "localhost"}, InvalidSettingError, "looks like"),
        ({"timeout": 0}, InvalidSettingError, "timeout"),
    ]
    for settings, error, message in cases:
        with pytest.raises(error, match=message):
            WebShopEnv(**{"server_url": shop.url, **settings})
    assert make(shop, data="generated").data == "generated"


def test_a_path_is_the_data_of_a_server_that_serves_that_folder(
    shop: FakeShop, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "items_shuffle_1000.json").write_text("[]", encoding="utf-8")
    shop.health |= {"data": "official", "folder": str(tmp_path / "data")}
    assert make(shop, data=tmp_path).data == "official"
    with pytest.raises(InvalidSettingError, match=r"data='official', but data='/nowhere'"):
        make(shop, data="/nowhere")
    with pytest.raises(InvalidSettingError, match="but data='~unknown-user/shop' was requested"):
        make(shop, data="~unknown-user/shop")
    shop.health["data"] = str(tmp_path / "data")
    assert make(shop, data=tmp_path, timeout=9.0).data == str(tmp_path / "data")
    with pytest.raises(InvalidSettingError, match="but data='official' was requested"):
        make(shop, data="official", timeout=9.0)


def test_task_types(shop: FakeShop) -> None:
    every = make(shop)
    toys = make(shop, task_types="toys")
    assert toys.manifest == every.manifest
    assert toys.task_ids == every.task_ids[::2]
    assert make(shop, task_types=["toys", "food"]).task_ids == every.task_ids
    assert all(toys.reset()[1]["task_type"] == "toys" for _ in range(9))
    with pytest.raises(InvalidSettingError, match=r"'shoes'.*food, toys"):
        make(shop, task_types="shoes")


def test_threads_play_side_by_side(shop: FakeShop) -> None:
    def play(_: int) -> list[int]:
        env = make(shop, max_turns=10)
        env.reset(options={"task_id": TASK})
        turns = [env.step(f"{number}")[4]["turn_index"] for number in range(10)]
        env.close()
        return turns

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(play, range(8))) == [list(range(1, 11))] * 8
    assert shop.sessions == {}
