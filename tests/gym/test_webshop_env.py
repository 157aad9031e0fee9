from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import atod_gym
from atod_gym import tasks as atod_data
from atod_gym.envs.webshop.env import WebShopEnv
from atod_gym.errors import (
    DataNotFoundError,
    InvalidSettingError,
    ServerError,
)
from atod_gym.types import RewardDetails, WebShopInfo
from atod_gym.wrappers import ParseAction, agent_env
from env_servers.webshop.generator import generate_shop

TASK = "webshop/generated/200"
REPOSITORY = Path(atod_gym.__file__).resolve().parent.parent


def make(**changes: Any) -> WebShopEnv:
    settings = {"data": "generated", **changes}
    if "max_turns" in changes:
        return WebShopEnv(**settings)
    env = gymnasium.make("atod/WebShop-v0", **settings).unwrapped
    assert isinstance(env, WebShopEnv)
    return env


def expert_actions(env: WebShopEnv, task_id: str) -> tuple[list[str], float]:
    """Return the actions of the scripted shopper, and its score."""
    observation, info = env.reset(options={"task_id": task_id})
    expert = env.expert()
    expert.reset(observation["instruction"], observation["text"])
    actions: list[str] = []
    over = False
    while not over and len(actions) < 15:
        last = actions[-1] if actions else None
        actions.append(expert.act(observation["text"], observation["admissible_actions"], last))
        observation, _, terminated, truncated, info = env.step(actions[-1])
        over = terminated or truncated
    return actions, info["score"]


@pytest.fixture(scope="module")
def solved() -> tuple[str, list[str]]:
    """A task that the scripted shopper buys the right thing for, and how."""
    env = make()
    for task_id in env.task_ids[:20]:
        actions, score = expert_actions(env, task_id)
        if score == 1.0:
            return task_id, actions
    pytest.fail("the scripted shopper solved none of 20 tasks")


def test_every_check_passes_with_rich_text() -> None:
    check_env(make(text_style="text_rich", split="test"))


def test_the_right_purchase_wins_on_its_last_turn(solved: tuple[str, list[str]]) -> None:
    task_id, actions = solved
    env = make()
    observation, info = env.reset(options={"task_id": task_id})
    assert observation["text"].startswith("WebShop [SEP] Instruction: [SEP] ")
    assert observation["instruction"] in observation["text"]
    assert (info["task_id"], info["split"], info["data"]) == (task_id, "train", "generated")
    assert (info["is_action_valid"], info["action"]) == (True, "")
    assert observation["admissible_actions"] == ("search[<query>]",)
    for number, action in enumerate(actions, 1):
        assert info.keys() == WebShopInfo.__annotations__.keys() - {"reward_details"}
        listed = observation["admissible_actions"]
        assert list(listed) == sorted(set(listed))
        assert action in listed or number == 1
        observation, reward, terminated, truncated, info = env.step(action)
        is_last = number == len(actions)
        assert (reward, terminated, truncated) == (float(is_last), is_last, False)
        assert (info["success"], info["score"]) == (is_last, float(is_last))
        assert (info["turn_index"], info["is_action_valid"]) == (number, True)
    assert action == info["action"] == "click[buy now]"
    assert info.keys() == WebShopInfo.__annotations__.keys()
    assert info["reward_details"].keys() <= RewardDetails.__annotations__.keys()
    info["reward_details"]["reward"] = 5.0
    assert env._own_info()["reward_details"]["reward"] == 1.0
    assert info["noun_tagger"] in ("words", "spacy")
    assert "Your score (min 0.0, max 1.0) [SEP] 1.0" in observation["text"]
    with pytest.raises(ResetNeeded, match="over"):
        env.step("search[x]")


@pytest.mark.parametrize("max_turns", [6, 15])
def test_the_expert_shops_alike_in_both_text_styles(max_turns: int) -> None:
    envs = [make(text_style=style, max_turns=max_turns) for style in ("text", "text_rich")]
    for task_id in envs[0].task_ids[20:35]:
        actions, score = expert_actions(envs[0], task_id)
        assert expert_actions(envs[1], task_id) == (actions, score)
        assert actions[-1] == "click[buy now]"


def test_a_wrong_purchase_has_a_score_and_no_reward(solved: tuple[str, list[str]]) -> None:
    env = make()
    tasks = [task_id for task_id in env.task_ids if task_id != solved[0]][:5]
    scores = []
    for task_id in tasks:
        env.reset(options={"task_id": task_id})
        for action in solved[1][:-1]:
            env.step(action)
        _, reward, terminated, _, info = env.step(solved[1][-1])
        assert terminated
        assert (reward, info["success"]) == (0.0, False)
        scores.append(info["score"])
    assert all(0 <= score < 1 for score in scores)
    assert any(score > 0 for score in scores)


def test_buying_on_the_last_turn_is_no_truncation(solved: tuple[str, list[str]]) -> None:
    task_id, actions = solved
    for spare, end in ((0, (True, False)), (-1, (False, True))):
        turns = len(actions) + spare
        env = make(max_turns=turns)
        env.reset(options={"task_id": task_id})
        ends = [env.step(action)[2:4] for action in actions[:turns]]
        assert ends == [(False, False)] * (turns - 1) + [end]


def test_splits_are_disjoint_and_follow_the_rule() -> None:
    rules = {"original": ("train", "dev", "test"), "verl-agent": ("train", "val")}
    alls = []
    for rule, splits in rules.items():
        manifests = [make(split=split, split_rule=rule).manifest for split in splits]
        ids = [task_id for manifest in manifests for task_id in manifest.task_ids]
        assert len(set(ids)) == len(ids)
        assert len({manifest.content_hash for manifest in manifests}) == len(splits)
        assert all(manifest.task_ids for manifest in manifests)
        alls.append(set(ids))
    assert alls[0] == alls[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"split": "valid_seen"}, DataNotFoundError, "known: .*train"),
        ({"data": "nowhere"}, DataNotFoundError, "official, generated, or a folder"),
        ({"data": 3.5}, InvalidSettingError, "data must be auto"),
        ({"data": 3.5, "server_url": "http://x"}, InvalidSettingError, "data must be auto"),
        ({"data": ""}, InvalidSettingError, "data must be auto"),
        ({"split_rule": "mine"}, InvalidSettingError, "original, verl-agent"),
        ({"text_style": "html"}, InvalidSettingError, "text, text_rich"),
        ({"goal_seed": "x"}, InvalidSettingError, "goal_seed"),
        *(({"expert_turns": n}, InvalidSettingError, "expert_turns") for n in ("6", 2.5, True, 0)),
        ({"human_goals": 1}, InvalidSettingError, "human_goals"),
        ({"timeout": -1}, InvalidSettingError, "timeout"),
        ({"token": 5}, InvalidSettingError, "token"),
        ({"task_types": "shoes, hats"}, InvalidSettingError, "'hats'"),
        ({"server_url": "shop"}, InvalidSettingError, "http://127.0.0.1:3000"),
        ({"server_url": "http://127.0.0.1:9"}, ServerError, "http://127.0.0.1:9.*atod-serve webs"),
    ],
)
def test_wrong_settings_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        WebShopEnv(**{"data": "generated", **changes})


ABUSE = [
    *("", " ", "search", "search[]", "search[a\nb]", "click[search]", "click[buy now]"),
    *("Search[x]", "🙂", "\ud800", "\x00", "{}", "a" * 100_000, "click[" * 1000, "<r>[x]"),
]


@pytest.mark.parametrize("action", ABUSE)
def test_any_text_is_an_action(action: str) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation == {**before, "turn_index": 1}
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["is_action_valid"], info["turn_index"], info["action"]) == (False, 1, action)
    assert env.action_space.contains(action)
    assert observation in env.observation_space


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=()), max_size=30).map("search[{}]".format)
        | st.text("abc[]<>searchlik ", max_size=30)
        | st.integers(0, 60),
        max_size=12,
    ),
    st.integers(0, 2**32 - 1),
)
def test_random_play_keeps_every_promise(moves: list[str | int], seed: int) -> None:
    env = make(max_turns=10)
    observation, _ = env.reset(seed=seed)
    for move in moves:
        admissible = observation["admissible_actions"]
        action = move if isinstance(move, str) else admissible[move % len(admissible)]
        observation, reward, terminated, truncated, info = env.step(action)
        assert observation in env.observation_space
        if action in admissible:
            assert info["is_action_valid"] == (action != "search[<query>]")
        assert reward == float(info["success"])
        assert terminated == ("reward_details" in info)
        assert info["score"] == (info["reward_details"]["reward"] if terminated else 0.0)
        assert truncated == (not terminated and observation["turn_index"] == 10)
        if terminated or truncated:
            break
    env.close()


ODD_NAMES = ("wipes [ 20 pieces ] + bag", "a]b", "[x]", "[", "x [1", "\ud800 lone", "one\ntwo", "É")


def write_odd_shop(folder: Path) -> None:
    """Write a shop of products with options that are hard to write in an action."""
    shop = generate_shop(seed=2, products=30)
    for item in shop.items:
        item["customization_options"] = {"Style": [{"value": name} for name in ODD_NAMES]}
    (folder / "items_shuffle_1000.json").write_text(json.dumps(shop.items), encoding="utf-8")
    (folder / "items_ins_v2_1000.json").write_text(json.dumps(shop.instructions), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("data", ["generated", "official", "odd"])
def test_every_admissible_action_is_valid(
    data: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """All actions of the pages of products are played, and random ones elsewhere."""
    if data == "official":
        data = str(request.getfixturevalue("webshop_data"))
    if data == "odd":
        write_odd_shop(tmp_path)
        data = str(tmp_path)
    env = make(data=data, max_turns=1000)
    rng = np.random.default_rng(0)

    def play(action: str) -> tuple[str, ...]:
        observation, *_, info = env.step(action)
        assert info["is_action_valid"], action
        return tuple(a for a in observation["admissible_actions"] if a != "click[buy now]")

    for seed in range(12):
        observation, _ = env.reset(seed=seed)
        words = observation["instruction"].split()
        found = play(f"search[{' '.join(words[3:9])}]")
        products = [action for action in found if action not in PAGE_ACTIONS]
        actions = play(products[int(rng.integers(len(products)))])
        options = [action for action in actions if action not in PAGE_ACTIONS]
        for action in options:
            play(action)
        for action in ("description", "features", "reviews"):
            assert "click[< prev]" in play(f"click[{action}]")
            play("click[< prev]")
        for _ in range(20):
            action = actions[int(rng.integers(len(actions)))]
            actions = play(action) if action != "search[<query>]" else play("search[x]")
        if data == str(tmp_path):
            assert len(options) > 3
    observation, *_, info = env.step("search[<query>]")
    assert not info["is_action_valid"]
    assert "in place of <query>" in info["message"]


PAGE_ACTIONS = {f"click[{name}]" for name in
                ("back to search", "< prev", "next >", "description", "features", "reviews",
                 "attributes")}  # fmt: skip


def test_a_search_works_from_every_page(solved: tuple[str, list[str]]) -> None:
    task_id, actions = solved
    env = make()
    found = set()
    for count in range(len(actions)):
        env.reset(options={"task_id": task_id})
        for action in [*actions[:count], "click[description]"]:
            env.step(action)
        observation, *_, info = env.step("search[red shoes]")
        assert info["is_action_valid"]
        found.add(observation["text"])
    assert len(found) == 1
    assert "Page 1 (Total results: " in found.pop()


def test_the_generated_shop_has_the_requested_size() -> None:
    small = make(products=60)
    assert all(name.startswith("webshop/generated-60/") for name in small.task_ids)
    assert not set(small.task_ids) & set(make().task_ids)
    with pytest.raises(InvalidSettingError, match="products=60"):
        make(products=1000, server_url=small.server_url)
    for wrong in (0, "many", True):
        with pytest.raises(InvalidSettingError, match="products"):
            make(products=wrong)


@pytest.mark.slow
@pytest.mark.parametrize("context", multiprocessing.get_all_start_methods())
def test_worker_processes_play_in_the_server_of_this_one(context: str) -> None:
    # A fork server that runs already knows nothing of servers that start later.
    process = multiprocessing.get_context(context).Process(target=print)
    process.start()
    process.join()
    both = [
        gymnasium.make_vec(
            "atod/WebShop-v0", num_envs=2, vectorization_mode="async", data="generated",
            vector_kwargs={"shared_memory": False, "context": context},
        )
        for _ in range(2)
    ]  # fmt: skip
    try:
        urls = {url for envs in both for url in envs.get_attr("server_url")}
        assert urls == {make().server_url}
        starts = [envs.reset(seed=11)[0]["text"] for envs in both]
        assert starts[0] == starts[1]
    finally:
        for envs in both:
            envs.close()


def _url_of(pickled: bytes) -> str:
    return str(pickle.loads(pickled).server_url)


@pytest.mark.slow
def test_an_unpickled_environment_plays_in_the_same_server_wherever_it_is() -> None:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        # The worker is there before the server.
        pool.submit(print).result()
        env = make(goal_seed=8)
        assert pool.submit(_url_of, pickle.dumps(env)).result() == env.server_url


def test_purchases_in_vector_environments(solved: tuple[str, list[str]]) -> None:
    envs = gymnasium.make_vec("atod/WebShop-v0", num_envs=2, data="generated")
    envs.reset(options={"task_id": solved[0]})
    for action in solved[1]:
        *_, infos = envs.step((action, "search[x]"))
    assert infos["reward_details"]["reward"].tolist() == [1.0, 0.0]
    assert infos["_reward_details"].tolist() == [True, False]
    envs.close()


def test_agents_and_published_parsing() -> None:
    """Without tags, published WebShop runs executed the last 20 characters, lower-cased."""
    env = agent_env(make(), profile="compat", style="window")
    env.reset(seed=0)
    *_, info = env.step("I would say SEARCH[wool coat 123]")
    assert info["action"] == "search[wool coat 123]"[-20:]
    assert not info["is_action_valid"]
    *_, info = env.step("<think>x</think><action>Search[Wool Coat]</action>")
    assert (info["action"], info["parse_error"]) == ("search[wool coat]", "")
    assert info["is_action_valid"]
    spec = EnvSpec.from_json(env.spec.to_json())  # type: ignore[union-attr]
    assert gymnasium.make(spec).get_wrapper_attr("completion_format").last_characters == 20
    assert ParseAction(make(), last_characters=30).completion_format.last_characters == 30
    household = gymnasium.make("atod/ALFWorld-v0", data="generated", house_size="tiny")
    assert ParseAction(household).completion_format.last_characters == 30


@pytest.mark.slow
@pytest.mark.usefixtures("no_user_data")
def test_data_is_looked_for_and_else_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("WEBSHOP_DATA", raising=False)
    monkeypatch.setattr(atod_data, "_announced", set())
    with caplog.at_level(logging.WARNING, logger="atod_gym"):
        assert [make(data="auto").data for _ in range(2)] == ["generated"] * 2
    assert caplog.text.count("WebShop: no official data found") == 1
    with pytest.raises(DataNotFoundError, match=r"looked in .*princeton-nlp/WebShop.*WEBSHOP_DATA"):
        make(data="official")
    with pytest.raises(DataNotFoundError, match="a folder with items_shuffle_1000"):
        make(data=str(tmp_path))
    (tmp_path / "items_shuffle_1000.json").write_text("[]", encoding="utf-8")
    monkeypatch.setenv("WEBSHOP_DATA", str(tmp_path))
    for data in ("auto", "official", tmp_path):
        with pytest.raises(ServerError, match=f"(?s)did not start.*{tmp_path}"):
            make(data=data)


def test_official_data(webshop_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOD_DATA", str(webshop_data.parent))
    env = make(data="official", split="test")
    assert make(data="auto", split="test").server_url == env.server_url
    assert (env.data, len(env.task_ids)) == ("official", 500)
    by_path = make(data=webshop_data, split="test")
    assert by_path.manifest == env.manifest
    assert by_path.reset(seed=1)[1]["data"] == env.data
    train, dev = (make(data="official", split=split) for split in ("train", "dev"))
    assert (len(train.task_ids), len(dev.task_ids)) == (5410, 1000)
    assert "webshop/official-1000/4315" in train.task_ids
    with pytest.raises(InvalidSettingError, match="data='official', but data='generated'"):
        make(data="generated", server_url=env.server_url)
    assert make(data="official", server_url=env.server_url).reset()[1]["data"] == "official"


def kill_server(env: WebShopEnv) -> None:
    running = env._connection.running
    assert running is not None
    os.kill(running.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while running.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.slow
def test_a_server_that_dies_is_named_and_a_reset_starts_another() -> None:
    # A server of its own, so that the other tests keep theirs.
    env, other = (make(products=30, max_turns=5) for _ in range(2))
    assert env.server_url == other.server_url != make().server_url
    first = env.reset(seed=1)
    for at in ("step", "reset", "start", "batch"):
        other.reset(seed=1)
        if at == "start":
            env.close()
        url = env.server_url
        kill_server(env)
        if at == "step":
            with pytest.raises(
                ServerError, match=r"atod-serve webshop.*reset\(\) starts"
            ) as caught:
                env.step("search[x]")
            assert url in str(caught.value)
        if at == "batch":
            WebShopEnv._open_many([env, other], [first[1]["task_id"]] * 2)
        assert env.reset(seed=1) == first
        assert env.server_url != url
        assert other.reset(seed=1) == first
        assert other.server_url == env.server_url
        assert other.step("search[x]")[4]["turn_index"] == 1


def test_the_extra_is_named_where_servers_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "uvicorn.py").write_text("raise ModuleNotFoundError(\"No module named 'uvicorn'\", "
                                         "name='uvicorn')", encoding="utf-8")  # fmt: skip
    code = "import gymnasium; gymnasium.make('atod_gym:atod/WebShop-v0', data='generated')"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False,
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    last = finished.stderr.strip().splitlines()[-1]
    assert "MissingExtraError" in last
    assert "pip install 'atod-gym[servers]'" in last


@pytest.mark.slow
def test_the_shop_can_be_played_in_a_terminal(solved: tuple[str, list[str]]) -> None:
    typed = ["1", "red shoes", "back to search", *solved[1]]
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-m", "atod_gym.play", "atod/WebShop-v0",
         "--data", "generated", "--task-id", solved[0]],
        input="\n".join(typed), capture_output=True, text=True, timeout=60, check=False,
        cwd=REPOSITORY, env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "query> " in finished.stdout
    assert "Page 1 (Total results: " in finished.stdout
    assert "[SEP]" not in finished.stdout
    assert f"Solved after {len(solved[1]) + 2} turns (score 1)." in finished.stdout


def test_making_another_environment_asks_the_server_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make()

    def refuse(*arguments: object) -> None:
        raise AssertionError("a request")

    monkeypatch.setattr("atod_gym.serving.http.JsonClient.request", refuse)
    assert make(split="train").task_ids
    assert isinstance(make().expert, Callable)  # type: ignore[arg-type]
