"""Holds the WebShop server and its client to one contract, over real HTTP and real processes."""

from __future__ import annotations

import json
import lzma
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from atod_gym.envs.webshop.env import BATCH_LIMIT, WebShopEnv
from atod_gym.errors import DataNotFoundError, InvalidSettingError, ServerError
from atod_gym.types import RewardDetails
from env_servers.webshop.generator import generate_shop

TURN = {"session_id", "turn_index", "text", "page_kind", "clickables", "has_search_bar", "over",
        "score"}  # fmt: skip
STATE = TURN | {"task_id", "task_type", "instruction"}
STEPPED = TURN | {"is_action_valid", "message", "details"}
HEALTH = {"status", "service", "version", "data", "products", "goals", "splits", "sessions",
          "split_rule", "goal_seed", "text_style", "human_goals", "noun_tagger", "capacity",
          "pid", "content_hash", "folder"}  # fmt: skip


class Server:
    """A server in a process of its own, started as a user would."""

    def __init__(self, *arguments: str, port: int = 0, **variables: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "env_servers.cli", "webshop", *arguments,
             "--port", str(port), "--parent", str(os.getpid())],
            stdout=subprocess.PIPE, env={**os.environ, **variables},
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url: str = json.loads(self.line)["url"]
        self.http = requests.Session()

    def call(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, Any]:
        answer = self.http.request(method, f"{self.url}{path}", json=body, timeout=30, **more)
        return answer.status_code, answer.json()

    def error(self, method: str, path: str, body: Any = None, **more: Any) -> tuple[int, str]:
        """Status and code of an error, whose form is checked."""
        status, answer = self.call(method, path, body, **more)
        assert answer.keys() == {"error"}
        assert answer["error"].keys() == {"code", "message"}
        assert answer["error"]["message"]
        return status, answer["error"]["code"]

    def open(self) -> str:
        return str(self.call("POST", "/sessions", {"split": "train", "seed": 1})[1]["session_id"])

    def step(self, session: str, turn_index: int, action: str) -> tuple[int, Any]:
        body = {"turn_index": turn_index, "action": action}
        return self.call("POST", f"/sessions/{session}/step", body)

    def end(self) -> tuple[int, bytes]:
        """Exit status after SIGTERM, and what followed the start-up line."""
        self.http.close()
        if self.process.returncode is None:
            self.process.terminate()
            self.rest, _ = self.process.communicate(timeout=20)
        return self.process.returncode, self.rest


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server("--data", "generated")
    yield running
    running.end()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers, and ends them after the test."""
    started: list[Server] = []

    def start_one(*arguments: str, port: int = 0, **variables: str) -> Server:
        started.append(Server(*arguments, port=port, **variables))
        return started[-1]

    yield start_one
    for running in started:
        running.end()


def buy_something(server: Server, session: str) -> tuple[int, dict[str, Any]]:
    """Buys the first product of a search; the next turn index and the last answer."""
    status, answer = server.step(session, 0, "search[shoes]")
    assert status == 200
    product = next(name for name in answer["clickables"] if re.fullmatch("b0[a-z0-9]{8}", name))
    server.step(session, 1, f"click[{product}]")
    status, answer = server.step(session, 2, "click[buy now]")
    assert (status, answer["over"]) == (200, True)
    return 3, answer


@pytest.mark.slow
def test_one_line_reports_readiness_and_sigterm_ends_it_cleanly(
    start: Callable[..., Server],
) -> None:
    running = start("--data", "generated", "--splits", "verl-agent")
    assert json.loads(running.line) == {"ready": True, "url": running.url, "service": "webshop"}
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", running.url)
    health = running.call("GET", "/health")[1]
    assert (health["pid"], health["split_rule"]) == (running.process.pid, "verl-agent")
    assert health["splits"].keys() == {"train", "val"}
    assert running.end() == (0, b"")


def test_health_and_tasks(server: Server) -> None:
    status, health = server.call("GET", "/health")
    assert status == 200
    assert health.keys() == HEALTH
    assert (health["status"], health["service"], health["data"]) == ("ok", "webshop", "generated")
    assert (len(health["content_hash"]), health["folder"]) == (64, None)
    assert health["noun_tagger"] in ("words", "spacy")
    assert sum(health["splits"].values()) == health["goals"]
    for split, count in health["splits"].items():
        status, tasks = server.call("GET", f"/tasks/{split}")
        assert status == 200
        assert tasks.keys() == {"name", "split", "task_ids", "task_types", "content_hash"}
        assert len(tasks["task_ids"]) == len(tasks["task_types"]) == count
        assert tasks["task_ids"] == sorted(set(tasks["task_ids"]))
        assert all(task_id.startswith(f"{tasks['name']}/") for task_id in tasks["task_ids"])
        assert re.fullmatch("[0-9a-f]{64}", tasks["content_hash"])
    metrics = server.http.get(f"{server.url}/metrics", timeout=30)
    assert metrics.headers["content-type"].startswith("text/plain")


def test_sessions_and_steps(server: Server) -> None:
    task_id = server.call("GET", "/tasks/train")[1]["task_ids"][0]
    status, state = server.call("POST", "/sessions", {"task_id": task_id})
    assert (status, state.keys()) == (201, STATE)
    assert (state["task_id"], state["turn_index"], state["page_kind"]) == (task_id, 0, "search")
    assert (state["over"], state["score"], state["has_search_bar"]) == (False, 0.0, True)
    seeded = [server.call("POST", "/sessions", {"split": "dev", "seed": 7})[1] for _ in range(2)]
    assert seeded[0]["task_id"] == seeded[1]["task_id"]
    assert seeded[0]["session_id"] != seeded[1]["session_id"]
    session = state["session_id"]
    status, first = server.step(session, 0, "search[shoes]")
    assert (status, first.keys()) == (200, STEPPED)
    assert (first["turn_index"], first["is_action_valid"], first["details"]) == (1, True, None)
    assert (first["page_kind"], first["has_search_bar"]) == ("results", False)
    status, second = server.step(session, 1, "click[nothing like that]")
    assert (second["turn_index"], second["is_action_valid"]) == (2, False)
    assert second["text"] == first["text"]
    assert server.call("DELETE", f"/sessions/{session}") == (200, {"closed": True})
    assert server.error("DELETE", f"/sessions/{session}") == (404, "unknown_session")


def test_a_repeated_step_is_answered_and_not_played_twice(server: Server) -> None:
    session = server.open()
    path = f"/sessions/{session}/step"
    answers = [server.step(session, 0, "search[shoes]") for _ in range(3)]
    assert answers[0] == answers[1] == answers[2]
    later = [server.step(session, 1, "click[next >]") for _ in range(3)]
    assert later[0] == later[1] == later[2]
    assert "Page 2 " in later[0][1]["text"]
    for turn_index, action in ((1, "click[< prev]"), (0, "search[shoes]"), (3, "x")):
        body = {"turn_index": turn_index, "action": action}
        assert server.error("POST", path, body) == (409, "wrong_turn_index")
    server.step(session, 2, "click[back to search]")
    server.call("DELETE", f"/sessions/{session}")
    session = server.open()
    turn_index, last = buy_something(server, session)
    assert last["page_kind"] == "done"
    assert last["details"].keys() == {*RewardDetails.__annotations__, "noun_tagger"}
    assert last["details"]["reward"] == last["score"]
    assert server.step(session, turn_index - 1, "click[buy now]") == (200, last)
    body = {"turn_index": turn_index, "action": "search[x]"}
    over = server.error("POST", f"/sessions/{session}/step", body)
    assert over == (409, "episode_over")


def test_batches_answer_in_order_and_item_by_item(server: Server) -> None:
    task_ids = server.call("GET", "/tasks/train")[1]["task_ids"][:3]
    wanted = [{"task_id": task_ids[0]}, {"task_id": "webshop/none/1"}, {"split": "x", "seed": 1},
              {"task_id": task_ids[2]}, {}]  # fmt: skip
    status, answer = server.call("POST", "/batch/create", {"sessions": wanted})
    assert (status, len(answer["results"])) == (200, 5)
    first, no_task, no_split, last, invalid = answer["results"]
    assert (first.keys(), first["task_id"], last["task_id"]) == (STATE, task_ids[0], task_ids[2])
    for item, expected in ((no_task, (404, "unknown_task")), (no_split, (404, "unknown_split")),
                           (invalid, (422, "invalid_body"))):  # fmt: skip
        assert item.keys() == {"error"}
        assert (item["error"]["status"], item["error"]["code"]) == expected
    sessions = [first["session_id"], "none", last["session_id"]]
    steps = [{"session_id": name, "turn_index": 0, "action": "search[lamp]"} for name in sessions]
    for _ in range(2):
        one, two, three = server.call("POST", "/batch/step", {"steps": steps})[1]["results"]
        assert (one.keys(), three.keys()) == (STEPPED, STEPPED)
        assert (two["error"]["code"], two["error"]["status"]) == ("unknown_session", 404)
    assert one == server.step(sessions[0], 0, "search[lamp]")[1]
    closed = server.call("POST", "/batch/close", {"session_ids": sessions})[1]["results"]
    assert [item == {"closed": True} for item in closed] == [True, False, True]
    assert server.call("POST", "/batch/step", {"steps": []}) == (200, {"results": []})
    too_many = {"sessions": [{"task_id": task_ids[0]}] * (BATCH_LIMIT + 1)}
    assert server.error("POST", "/batch/create", too_many) == (422, "invalid_body")


def test_every_error_has_a_status_and_a_code(server: Server) -> None:
    session = server.open()
    path = f"/sessions/{session}/step"
    step = {"turn_index": 0, "action": "x"}
    cases: list[tuple[str, str, Any, tuple[int, str]]] = [
        ("GET", "/nothing", None, (404, "not_found")),
        ("GET", "/tasks/nothing", None, (404, "unknown_split")),
        ("POST", "/sessions", {"task_id": "x"}, (404, "unknown_task")),
        ("POST", "/sessions/none/step", step, (404, "unknown_session")),
        ("DELETE", "/health", None, (405, "method_not_allowed")),
        ("POST", "/sessions", [], (422, "invalid_body")),
        ("POST", path, {"turn_index": 0}, (422, "invalid_body")),
        ("POST", path, {**step, "turn_index": True}, (422, "invalid_body")),
        ("POST", path, {**step, "action": 5}, (422, "invalid_body")),
        ("POST", path, {**step, "action": "x" * 1_100_000}, (413, "body_too_large")),
    ]
    for method, address, body, expected in cases:
        assert server.error(method, address, body) == expected, (method, address)
    assert server.step(session, 0, "search[x]")[1]["turn_index"] == 1


def test_a_token_is_required_and_a_full_server_reports_it(start: Callable[..., Server]) -> None:
    running = start("--data", "generated", "--capacity", "2", "--token-env", "THE_TOKEN",
                    THE_TOKEN="secret")  # fmt: skip
    assert running.error("GET", "/health") == (401, "unauthorized")
    right = {"headers": {"Authorization": "Bearer secret"}}
    body = {"split": "train", "seed": 1}
    assert running.call("POST", "/sessions", body, **right)[0] == 201
    env = WebShopEnv(server_url=running.url, token="secret")
    env.reset(seed=1)
    assert running.error("POST", "/sessions", body, **right) == (503, "at_capacity")
    other = WebShopEnv(server_url=running.url, token="secret")
    with pytest.raises(ServerError, match="sessions are in use") as caught:
        other.reset()
    assert caught.value.code == "at_capacity"
    env.close()
    assert other.reset()[1]["turn_index"] == 0
    other.close()
    assert running.call("GET", "/health", **right)[1]["sessions"] == 1
    with pytest.raises(ServerError, match="ATOD_SERVER_TOKEN"):
        WebShopEnv(server_url=running.url, token="wrong")


def test_the_client_reads_the_servers_answers(server: Server) -> None:
    env = WebShopEnv(server_url=server.url)
    assert env.data == "generated"
    answer = server.call("GET", "/tasks/train")[1]
    assert list(env.task_ids) == answer["task_ids"]
    assert (env.manifest.name, env.manifest.content_hash) == (
        answer["name"], answer["content_hash"],
    )  # fmt: skip
    before = server.call("GET", "/health")[1]["sessions"]
    env.reset(seed=1)
    assert server.call("GET", "/health")[1]["sessions"] == before + 1
    env.close()
    assert server.call("GET", "/health")[1]["sessions"] == before


def test_settings_that_the_server_does_not_have_are_refused(server: Server) -> None:
    cases: list[dict[str, Any]] = [
        {"text_style": "text_rich"}, {"goal_seed": 5}, {"split_rule": "verl-agent"},
        {"human_goals": True}, {"data": "official"},
    ]  # fmt: skip
    for settings in cases:
        with pytest.raises(InvalidSettingError, match=f"has {next(iter(settings))}="):
            WebShopEnv(server_url=server.url, **settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "refusal"),
    [
        ("--capacity 9", ""),
        ("--products 60", "content_hash=.*products=60 instead of 50"),
        ("--goal-seed 5", "goal_seed=5 instead of 233"),
        ("--text-style text_rich", "text_style='text_rich' instead of 'text'"),
        ("--splits verl-agent", "splits=.*split_rule='verl-agent' instead"),
    ],
)
def test_a_server_that_is_restarted_serves_the_same_or_is_refused(
    start: Callable[..., Server], now: str, refusal: str
) -> None:
    shop = ("--data", "generated", "--products", "50")
    first = start(*shop)
    settings: dict[str, Any] = {"server_url": first.url, "products": 50}
    old, idle = WebShopEnv(**settings), WebShopEnv(**settings)
    before = old.reset(seed=0)
    first.end()
    start(*shop, *now.split(), port=int(first.url.rpartition(":")[2]))
    with pytest.raises(ServerError, match=r"(?i)restarted.*Call reset\(\)"):
        old.step("search[shoes]")
    for env in (old, idle):
        if refusal:
            with pytest.raises(ServerError, match=f"restarted with .*{refusal}"):
                env.reset(seed=0)
        else:
            assert env.reset(seed=0) == before
    if refusal:
        with pytest.raises(InvalidSettingError, match="was requested"):
            WebShopEnv(**settings)
    else:
        assert WebShopEnv(**settings).reset(seed=0) == before


@pytest.mark.slow
def test_files_in_the_official_format_are_not_the_official_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shop = generate_shop(seed=3, products=60)
    (tmp_path / "items_shuffle_1000.json").write_text(json.dumps(shop.items))
    (tmp_path / "items_ins_v2_1000.json").write_text(json.dumps(shop.instructions))
    monkeypatch.setenv("ATOD_DATA", str(tmp_path))
    env = WebShopEnv(data="auto")
    assert env.data == env.reset()[1]["data"] == str(tmp_path)
    assert WebShopEnv(data="auto").server_url == env.server_url
    fewer = generate_shop(seed=3, products=50)
    (tmp_path / "items_shuffle_1000.json").write_text(json.dumps(fewer.items))
    (tmp_path / "notes.txt").touch()
    assert WebShopEnv(data="auto").task_ids != env.task_ids
    (tmp_path / "items_shuffle_1000.json").write_text(json.dumps(shop.items))
    with pytest.raises(DataNotFoundError, match=f"The data in {tmp_path} is not the official data"):
        WebShopEnv(data="official")


def test_play_in_batches_equals_single_play(server: Server) -> None:
    settings: dict[str, Any] = {"server_url": server.url, "max_turns": 6}
    batched = [WebShopEnv(**settings) for _ in range(40)]
    single = WebShopEnv(**settings)
    task_ids = single.task_ids[:40]
    actions = ["search[red shoes]", "click[next >]", "nonsense", "click[back to search]"]
    histories: list[list[Any]] = [
        [env._begin(task_id, *opened)]
        for env, task_id, opened in zip(
            batched, task_ids, WebShopEnv._open_many(batched, task_ids), strict=True
        )
    ]
    for action in actions:
        results = WebShopEnv._play_many(batched, [action] * 40)
        for env, history, result in zip(batched, histories, results, strict=True):
            history.append(env._record(action, result))
    for task_id, history in zip(task_ids, histories, strict=True):
        assert history[0] == single.reset(options={"task_id": task_id})
        assert history[1:] == [single.step(action) for action in actions]
    for env in (*batched, single):
        env.close()


KILLED = """
import os, signal, sys
from atod_gym.envs.webshop.env import WebShopEnv
env = WebShopEnv(data="generated")
env.reset(seed=0)
print(env._connection.running.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_a_server_of_our_own_does_not_outlive_a_killed_process() -> None:
    finished = subprocess.run(
        [sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == -signal.SIGKILL
    pid = int(finished.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the server was still there 10 seconds after its parent")


@pytest.fixture(scope="module")
def golden(webshop_data: Path) -> list[dict[str, Any]]:
    """Recorded episodes of the original text environment."""
    with lzma.open(webshop_data / "golden/episodes.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.slow
@pytest.mark.parametrize("style", ["text", "text_rich"])
def test_recorded_episodes_of_the_original_play_alike(
    style: str,
    golden: list[dict[str, Any]],
    webshop_data: Path,
    start: Callable[..., Server],
) -> None:
    """Their scores were recorded with the substitute tagger, so the server is set to use it."""
    running = start("--data", str(webshop_data), "--noun-tagger", "words",
                    "--text-style", style)  # fmt: skip
    settings: dict[str, Any] = {"text_style": style, "max_turns": 1000}
    envs = {
        split: WebShopEnv(split, "official", running.url, **settings)
        for split in ("test", "dev", "train")
    }
    kinds = {"text": {"expert", "random_valid", "edge", "near_miss"}, "text_rich": {"text_rich"}}
    played = 0
    for episode in golden:
        index = episode["session"]
        if episode["kind"] not in kinds[style]:
            continue
        env = envs["test" if index < 500 else "dev" if index < 1500 else "train"]
        observation, _ = env.reset(options={"task_id": f"webshop/official-1000/{index}"})
        assert observation["instruction"] == episode["goal"]["instruction_text"]
        _check_page(observation, episode["reset"])
        for step in episode["steps"]:
            if "error" in step:
                break  # The original raised; what it shows from then on is broken.
            observation, reward, terminated, _, info = env.step(step["action"])
            _check_page(observation, step)
            assert (info["score"], terminated) == (step["reward"], step["done"])
            assert reward == float(step["reward"] == 1.0)
            played += 1
            if terminated:
                parts = {"reward": step["reward"], **step["reward_info"]}
                assert info["reward_details"] == parts
                assert info["noun_tagger"] == "words"
                break
    assert played > 50
    for env in envs.values():
        env.close()


def _check_page(observation: Any, recorded: dict[str, Any]) -> None:
    assert observation["text"] == recorded["obs"]
    actions = {f"click[{name}]" for name in recorded["clickables"] if name != "search"}
    actions |= {"search[<query>]"} if recorded["has_search_bar"] else set()
    assert observation["admissible_actions"] == tuple(sorted(actions))
