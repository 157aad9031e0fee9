"""Snapshots of ALFWorld episodes, and, with their help, that every listed action is valid."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from gymnasium.error import ResetNeeded
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_gym.envs.alfworld.env import ALFWorldEnv
from atod_gym.errors import InvalidSettingError, TaskNotFoundError

SIZES = {size: [ALFWorldEnv(data="generated", house_size=size, max_turns=30) for _ in range(2)]
         for size in ("tiny", "small", "official")}  # fmt: skip


def choose(env: ALFWorldEnv, move: int) -> str:
    """An action: a listed one, `help` or one that does nothing."""
    return ("help", "nonsense", *env.observation["admissible_actions"])[
        move % (2 + len(env.observation["admissible_actions"]))
    ]


def play(env: ALFWorldEnv, actions: list[str]) -> list[Any]:
    return [env.step(action) for action in actions]


def check_restoring(env: ALFWorldEnv, other: ALFWorldEnv, task_id: str, moves: list[int]) -> None:
    """A snapshot in the middle of an episode continues it, like playing it from its start."""
    options = {"task_id": task_id}
    env.reset(options=options)
    half = len(moves) // 2
    actions: list[str] = []
    snapshot, kept = env.snapshot(), env.snapshot()
    for number, move in enumerate(moves):
        if env._over:
            break
        if number == half:
            snapshot = env.snapshot()
            kept = copy.deepcopy(snapshot)
            actions = []
        actions.append(choose(env, move))
        env.step(actions[-1])
    last = env.observation
    assert snapshot == kept, "later steps change no snapshot"

    before = json.loads(json.dumps(snapshot))
    assert before == pickle.loads(pickle.dumps(snapshot)) == snapshot
    other.reset(seed=0)
    found = other.restore(before)
    assert other.snapshot() == snapshot
    results = play(other, actions)
    assert other.observation == last
    # The other environment leaves its episode, comes back, and plays the same once more.
    other.reset(seed=1)
    assert other.restore(snapshot) == found
    assert play(other, actions) == results


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(SIZES)), st.integers(0, 2999), st.lists(st.integers(0, 99), max_size=24)
)
def test_a_restored_generated_game_continues_like_the_first(
    size: str, number: int, moves: list[int]
) -> None:
    env, other = SIZES[size]
    check_restoring(env, other, env.task_ids[number], moves)


def test_a_restored_official_game_continues_like_the_first(alfworld_data: Path) -> None:
    env, other = (ALFWorldEnv(data=alfworld_data, split="valid_unseen") for _ in range(2))
    rng = random.Random(0)
    for task_id in env.task_ids[::3]:
        check_restoring(env, other, task_id, [rng.randrange(99) for _ in range(20)])


def check_admissible(env: ALFWorldEnv, task_id: str, rng: random.Random) -> None:
    """Along the walkthrough and a few detours, every listed action can be played."""
    env.reset(options={"task_id": task_id})
    for command in env.walkthrough:
        state = env.snapshot()
        listed = env.observation["admissible_actions"]
        for action in listed:
            env.restore(state)
            observation, *_, info = env.step(action)
            assert info["is_action_valid"], (task_id, action)
            assert observation["text"] != "Nothing happens.", (task_id, action)
        if not env._over:
            for action in rng.sample(observation["admissible_actions"], 3):
                detour = env.snapshot()
                assert env.step(action)[4]["is_action_valid"], (task_id, action)
                env.restore(detour)
        env.restore(state)
        env.step(command)


def test_every_admissible_action_of_generated_games_is_valid() -> None:
    for envs in SIZES.values():
        for task_id in envs[0].task_ids[:2400:240]:
            check_admissible(envs[0], task_id, random.Random(task_id))


@pytest.mark.slow
def test_every_admissible_action_of_official_games_is_valid(alfworld_data: Path) -> None:
    env = ALFWorldEnv(data=alfworld_data, split="valid_seen")
    for task_id in env.task_ids[::4]:
        check_admissible(env, task_id, random.Random(task_id))


def test_a_won_episode_stays_over_and_the_limit_is_that_of_the_environment() -> None:
    env = ALFWorldEnv(data="generated", house_size="tiny")
    env.reset(seed=0)
    play(env, list(env.walkthrough))
    won = env.snapshot()
    env.reset(seed=1)
    _, info = env.restore(won)
    assert info["success"]
    with pytest.raises(ResetNeeded, match="over"):
        env.step("look")
    env.reset(seed=1)
    play(env, ["look"] * 3)
    third = env.snapshot()
    short = ALFWorldEnv(data="generated", house_size="tiny", max_turns=2)
    assert short.restore(third)[1]["turn_index"] == 3
    with pytest.raises(ResetNeeded, match="over"):
        short.step("look")
    longer = ALFWorldEnv(data="generated", house_size="tiny", max_turns=4)
    longer.restore(third)
    assert longer.step("look")[3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turn_index": "1"}, "'1' as turn_index"),
        ({"turn_index": -1}, "'-1' as turn_index"),
        ({"turn_index": True}, "'True' as turn_index"),
        ({"text": None}, "'None' as text"),
        ({"added": [["atlocation", 1]]}, "as added"),
        ({"added": "atlocation"}, "as added"),
        ({"removed": [[]]}, "as removed"),
        ({"added": [["flies", "agent1"]]}, r"\(flies agent1\) is not of this game"),
        ({"added": [["atlocation", "agent1"]]}, r"\(atlocation agent1\) is not of this game"),
        ({"added": [["atlocation", "agent1", "moon"]]}, r"moon\) is not of this game"),
        ({"more": 1}, "a mapping with the keys task_id"),
    ],
)
def test_wrong_snapshots_are_refused_and_change_nothing(
    changes: dict[str, Any], message: str
) -> None:
    env = ALFWorldEnv(data="generated", house_size="tiny")
    env.reset(seed=0)
    env.step("look")
    before = env.snapshot()
    wrong: Any = {**before, **changes}
    with pytest.raises(InvalidSettingError, match=message):
        env.restore(wrong)
    assert env.snapshot() == before
    with pytest.raises(TaskNotFoundError, match="tiny-train"):
        env.restore({**before, "task_id": "tiny-train-9999"})
    for nothing in (None, [], "x"):
        with pytest.raises(InvalidSettingError, match="what snapshot"):
            env.restore(nothing)  # type: ignore[arg-type]
    assert env.snapshot() == before
    assert env.step("look")[4]["turn_index"] == 2


def test_snapshots_need_an_episode_of_the_native_engine() -> None:
    env = ALFWorldEnv(data="generated", house_size="tiny")
    with pytest.raises(ResetNeeded):
        env.snapshot()
    env.reset(seed=0)
    snapshot = env.snapshot()
    env.close()
    with pytest.raises(ResetNeeded):
        env.snapshot()
    assert env.restore(snapshot)[0]["turn_index"] == 0
    official = ALFWorldEnv(data="generated", house_size="tiny", backend="alfworld")
    for call in (official.snapshot, lambda: official.restore(snapshot)):
        with pytest.raises(InvalidSettingError, match="need backend='native'"):
            call()
