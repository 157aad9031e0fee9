from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.error import ResetNeeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from written_games import write_games

from atod_gym.envs.alfworld.env import ALFWorldEnv
from atod_gym.errors import (
    DataNotFoundError,
    InvalidGameError,
    InvalidSettingError,
    TaskNotFoundError,
)
from atod_gym.types import StepInfo, TurnObservation

SETTINGS: dict[str, Any] = {"data": "generated", "house_size": "tiny"}
TASK = "tiny-train-0003-pick_heat_then_place_in_recep"


def make(**changes: Any) -> ALFWorldEnv:
    env = gymnasium.make("atod/ALFWorld-v0", **{**SETTINGS, **changes}).unwrapped
    assert isinstance(env, ALFWorldEnv)
    return env


def test_the_walkthrough_wins_on_its_last_turn() -> None:
    env = make()
    observation, info = env.reset(options={"task_id": TASK})
    assert observation.keys() == TurnObservation.__annotations__.keys()
    assert info.keys() == StepInfo.__annotations__.keys()
    assert observation["text"].endswith(f"Your task is to: {observation['instruction']}")
    assert (info["task_id"], info["task_type"]) == (TASK, "pick_heat_then_place_in_recep")
    assert (info["is_action_valid"], info["action"], info["turn_index"]) == (True, "", 0)
    assert "help" not in observation["admissible_actions"]
    assert list(observation["admissible_actions"]) == sorted(set(observation["admissible_actions"]))
    *before, last = env.walkthrough
    for number, action in enumerate(before, 1):
        assert action in observation["admissible_actions"]
        observation, reward, terminated, truncated, info = env.step(action)
        assert (reward, terminated, truncated, info["success"]) == (0.0, False, False, False)
        assert observation["turn_index"] == info["turn_index"] == number
        assert "episode" not in info
    observation, reward, terminated, truncated, info = env.step(last)
    assert (reward, terminated, truncated) == (1.0, True, False)
    assert (info["success"], info["score"], info["action"]) == (True, 1.0, last)
    assert info.keys() == StepInfo.__annotations__.keys()
    assert info["turn_index"] == len(before) + 1
    with pytest.raises(ResetNeeded, match="over"):
        env.step("look")


def test_winning_on_the_last_turn_is_no_truncation() -> None:
    turns = len(_walkthrough())
    env = make(max_turns=turns)
    env.reset(options={"task_id": TASK})
    ends = [env.step(action)[2:4] for action in env.walkthrough]
    assert ends == [(False, False)] * (turns - 1) + [(True, False)]
    env = make(max_turns=turns - 1)
    env.reset(options={"task_id": TASK})
    ends = [env.step(action)[2:4] for action in env.walkthrough[:-1]]
    assert ends == [(False, False)] * (turns - 2) + [(False, True)]
    with pytest.raises(ResetNeeded):
        env.step("look")


def _walkthrough() -> tuple[str, ...]:
    env = make()
    env.reset(options={"task_id": TASK})
    return env.walkthrough


def test_task_types_narrow_the_tasks_but_not_the_manifest() -> None:
    env = make(task_types=["look_at_obj_in_light"])
    assert 0 < len(env.task_ids) < len(env.manifest.task_ids)
    assert env.reset(seed=1)[1]["task_type"] == "look_at_obj_in_light"
    assert env.task_ids == make(task_types="look_at_obj_in_light").task_ids
    both = make(task_types="look_at_obj_in_light, pick_two_obj_and_place")
    assert len(both.task_ids) == 2 * len(env.task_ids)
    with pytest.raises(TaskNotFoundError, match="look_at_obj_in_light"):
        env.reset(options={"task_id": TASK})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"backend": "thor"}, InvalidSettingError, "native, alfworld"),
        ({"task_types": ["cook"]}, InvalidSettingError, "'cook'; this split has: look_at_obj"),
        ({"split": "test"}, DataNotFoundError, "train, valid_seen, valid_unseen"),
        ({"house_size": "huge"}, InvalidSettingError, "tiny"),
        ({"data": "nowhere"}, DataNotFoundError, "official, generated"),
    ],
)
def test_wrong_settings_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ALFWorldEnv(**{**SETTINGS, **changes})


ABUSE = [
    "",
    " ",
    "look\nlook",
    "go to",
    "🙂",
    "\ud800",
    "\x00",
    "{}",
    "a" * 100_000,
    "HELP",
    "look.",
]


@pytest.mark.parametrize("action", ABUSE)
def test_any_text_is_an_action(action: str) -> None:
    env = make()
    before, _ = env.reset(seed=0)
    observation, reward, terminated, truncated, info = env.step(action)
    assert observation["text"] == "Nothing happens."
    assert observation["admissible_actions"] == before["admissible_actions"]
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert (info["is_action_valid"], info["turn_index"], info["action"]) == (False, 1, action)
    assert env.action_space.contains(action)
    assert observation in env.observation_space


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.text(st.characters(exclude_categories=()), max_size=30) | st.integers(0, 60), max_size=12
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
        assert info["is_action_valid"] == (action.strip() in (*admissible, "help"))
        assert reward == info["score"] == float(info["success"]) == float(terminated)
        assert truncated == (not terminated and observation["turn_index"] == 10)
        if terminated or truncated:
            break


def test_white_space_around_an_action_does_not_count_and_help_is_valid() -> None:
    env = make()
    env.reset(seed=0)
    assert env.step("  look\n")[4]["is_action_valid"]
    observation, *_, info = env.step("help")
    assert info["is_action_valid"]
    assert "look" in observation["text"]


@pytest.mark.parametrize(
    "written",
    ["`{}`", '"{}"', "{}.", "'{}'.", " {} . "],
)
def test_a_quoted_or_capitalised_action_is_corrected(written: str) -> None:
    env = make()
    observation, _ = env.reset(seed=0)
    before = env.snapshot()
    for action in observation["admissible_actions"]:
        for spelled in (written.format(action), written.format(action.upper())):
            env.restore(before)
            observation, *_, info = env.step(spelled)
            assert observation["text"] == "Nothing happens."
            assert not info["is_action_valid"]
            assert info["message"] == f"Write the action as it is listed: {action}"
    assert env.step("HELP")[4]["message"] == "", "help is not listed"


@pytest.mark.parametrize("old", [False, True])
def test_the_other_grammars_spelling_of_putting_down_is_corrected(
    tmp_path: Path, old: bool
) -> None:
    [path] = write_games(tmp_path, {"train": 1}, house_size="tiny")
    if old:
        text = path.read_text(encoding="utf-8").replace("move {o} to {r}", "put {o} in/on {r}")
        text = re.sub(r'"move ([^"{]+) to ([^"{]+)"', r'"put \1 in/on \2"', text)
        path.write_text(text, encoding="utf-8")
    env = make(data=str(tmp_path))
    env.reset()
    *before, last = env.walkthrough
    listed = last
    thing, place = re.split(" in/on | to ", last.split(" ", 1)[1])
    spellings = {f"{verb} {thing} {word} {place}" for verb in ("put", "move", "Place")
                 for word in ("in/on", "in", "on", "into", "to")}  # fmt: skip
    for spelled in spellings:
        message = env.step(spelled)[4]["message"]
        if spelled.startswith("put") and not old:
            assert message.startswith(f"Here the action is called: move {thing} to {place}.")
        else:
            assert message == "", "nothing is held yet"
    for command in before:
        env.step(command)
    held = env.snapshot()
    for spelled in spellings - {listed}:
        env.restore(held)
        observation, *_, info = env.step(spelled)
        assert observation["text"] == "Nothing happens."
        assert info["message"] == f"Write the action as it is listed: {listed}"
    env.restore(held)
    *_, info = env.step(listed)
    assert (info["success"], info["message"]) == (True, "")


def _make_vec(mode: str, **vector_settings: Any) -> gymnasium.vector.VectorEnv[Any, Any, Any]:
    return gymnasium.make_vec(
        "atod/ALFWorld-v0",
        num_envs=3,
        vectorization_mode=mode,
        vector_kwargs=vector_settings,
        max_turns=3,
        **SETTINGS,
    )


@pytest.mark.parametrize(("mode", "more"), [("sync", {}), ("async", {"shared_memory": False})])
def test_vector_environments_agree_with_single_ones(mode: str, more: dict[str, Any]) -> None:
    envs = _make_vec(mode, **more)
    try:
        observations, infos = envs.reset(seed=11)
        assert observations in envs.observation_space
        singles = [make(max_turns=3).reset(seed=11 + number) for number in range(3)]
        assert observations["text"] == tuple(single[0]["text"] for single in singles)
        assert list(infos["task_id"]) == [single[1]["task_id"] for single in singles]
        for turn in range(1, 4):
            observations, rewards, _, truncated, infos = envs.step(
                ("look", "inventory", "nonsense")
            )
            assert observations["turn_index"].tolist() == [turn] * 3
            assert list(infos["is_action_valid"]) == [True, True, False]
            assert rewards.tolist() == [0.0] * 3
        assert truncated.all()
        assert infos["turn_index"].tolist() == [3] * 3
        observations, *_ = envs.step(("look",) * 3)
        assert observations["turn_index"].tolist() == [0] * 3
        assert envs.step(envs.action_space.sample())[0] in envs.observation_space
    finally:
        envs.close()


def test_shared_memory_is_refused_with_advice() -> None:
    with warnings.catch_warnings():
        # Gymnasium's destructor trips over the half-made object.
        warnings.simplefilter("ignore")
        with pytest.raises((TypeError, ValueError), match="shared_memory"):
            _make_vec("async")


def test_a_corrupt_game_is_named_when_its_task_is_played(tmp_path: Path) -> None:
    files = write_games(tmp_path, {"train": 6}, house_size="tiny")
    broken = {
        "cut": b'{"solvable": true, "pddl_domain": "(define',
        "lacking": b'{"solvable": true}',
        "nonsense": b'{"solvable": true, "pddl_domain": "(", "grammar": "x", "pddl_problem": "("}',
        "cut early": files[3].read_bytes()[:500],
    }
    for path, content in zip(files, broken.values(), strict=False):
        path.write_bytes(content)
    env = make(data=str(tmp_path))
    assert env.data == str(tmp_path)
    for path in files[:4]:
        with pytest.raises(InvalidGameError) as caught:
            env.reset(options={"task_id": f"{path.parts[-3]}/{path.parts[-2]}"})
        assert str(path) in str(caught.value)
        with pytest.raises(ResetNeeded):
            env.step("look")
    files[4].unlink()
    task_id = f"{files[4].parts[-3]}/{files[4].parts[-2]}"
    with pytest.raises(InvalidGameError, match="cannot be read"):
        env.reset(options={"task_id": task_id})
    env.reset(options={"task_id": f"{files[5].parts[-3]}/{files[5].parts[-2]}"})
    assert env.step("look")[4]["is_action_valid"]
