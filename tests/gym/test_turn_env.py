"""Check the common behaviour of environments: seeds, limits, errors, rendering, copies."""

from __future__ import annotations

import contextlib
import inspect
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import NameNotFound, ResetNeeded, VersionNotFound
from gymnasium.utils.env_checker import check_env

import atod_gym
from atod_gym.envs.turn_env import TurnEnv
from atod_gym.errors import (
    AtodError,
    DataNotFoundError,
    InvalidSettingError,
    TaskNotFoundError,
)


@dataclass(frozen=True)
class Case:
    """An environment, and an action that is possible at its start and ends nothing."""

    env_id: str
    settings: dict[str, Any]
    action: str
    change: dict[str, Any]
    """A setting that changes what an episode shows."""

    def make(self, **changes: Any) -> TurnEnv:
        env = gymnasium.make(self.env_id, **{**self.settings, **changes}).unwrapped
        assert isinstance(env, TurnEnv)
        return env


CASES = [
    Case("atod/ALFWorld-v0", {"data": "generated", "house_size": "tiny"}, "inventory",
         {"task_types": ["look_at_obj_in_light"]}),
    Case("atod/WebShop-v0", {"data": "generated"}, "search[red shoes]",
         {"text_style": "text_rich"}),
    Case("atod/SearchQA-v0", {"data": "generated"}, "search[mill]", {"topk": 2}),
]  # fmt: skip


@pytest.fixture(params=CASES, ids=lambda case: case.env_id)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


def test_no_environment_is_forgotten() -> None:
    assert [case.env_id for case in CASES] == list(atod_gym.ENV_IDS)


@pytest.mark.parametrize("more", [{}, {"render_mode": "ansi"}])
def test_every_check_passes(case: Case, more: dict[str, Any]) -> None:
    check_env(case.make(**more))


def test_the_module_prefix_needs_no_import(case: Case) -> None:
    env = gymnasium.make(f"atod_gym:{case.env_id}", **case.settings)
    assert env.reset(seed=0)[1]["data"] == "generated"
    env.close()
    with pytest.raises(NameNotFound):
        gymnasium.make(case.env_id.replace("-v0", "s-v0"))
    with pytest.raises(VersionNotFound):
        gymnasium.make(case.env_id.replace("v0", "v7"))


def test_the_spec_survives_json_and_the_environment_pickles(case: Case) -> None:
    env = gymnasium.make(case.env_id, **case.settings, **case.change, max_turns=3)
    assert env.spec is not None
    copies = [gymnasium.make(EnvSpec.from_json(env.spec.to_json())).unwrapped,
              pickle.loads(pickle.dumps(env.unwrapped))]  # fmt: skip
    usual = case.make(max_turns=3)
    episodes = [[one.reset(seed=3), one.step(case.action)] for one in (env, usual, *copies)]
    assert episodes[0] == episodes[2] == episodes[3] != episodes[1]
    for copy in copies:
        assert copy.observation_space == env.observation_space
        assert copy.max_turns == 3


def test_the_turn_limit_truncates_once(case: Case) -> None:
    env = case.make(max_turns=3)
    env.reset(seed=0)
    results = [env.step(case.action) for _ in range(3)]
    assert [result[2:4] for result in results] == [(False, False)] * 2 + [(False, True)]
    assert results[-1][0] in env.observation_space
    with pytest.raises(ResetNeeded, match="over"):
        env.step(case.action)


def test_seeds_and_task_ids_choose_the_task(case: Case) -> None:
    env, other = case.make(), case.make()
    assert env.task_ids == env.manifest.task_ids == tuple(sorted(env.task_ids))
    first = [env.reset(seed=5)[1]["task_id"], *(env.reset()[1]["task_id"] for _ in range(5))]
    second = [other.reset(seed=5)[1]["task_id"], *(other.reset()[1]["task_id"] for _ in range(5))]
    assert first == second
    assert len(set(first)) > 1
    picked = [env.reset(seed=5, options={"task_id": env.task_ids[7]}) for _ in range(2)]
    assert picked[0] == picked[1]
    # Naming the task draws nothing, so the seeded sequence starts behind it.
    assert env.reset()[1]["task_id"] == first[0]


def test_wrong_calls_are_named(case: Case) -> None:
    env = case.make()
    for call in (lambda: env.step(case.action), lambda: env.observation):
        with pytest.raises(ResetNeeded, match="reset"):
            call()
    task_id = env.task_ids[0]
    with pytest.raises(TaskNotFoundError, match="Did you mean "):
        env.reset(options={"task_id": f"{task_id}x"})
    with pytest.raises(TaskNotFoundError, match=f"An example: {task_id}"):
        env.reset(options={"task_id": "🙂"})
    with pytest.raises(TaskNotFoundError):
        env.reset(options={"task_id": 3})
    with pytest.raises(InvalidSettingError, match=r"'task'.*'task_id'"):
        env.reset(options={"task": task_id})
    env.reset(seed=0)
    for action in (None, case.action.encode(), 3, [case.action]):
        with pytest.raises(TypeError, match=f"str.*not {type(action).__name__}"):
            env.step(action)  # type: ignore[arg-type]
    assert env.step(case.action)[4]["turn_index"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_turns": 0}, "max_turns"),
        ({"max_turns": 2.5}, "max_turns"),
        ({"max_turns": True}, "max_turns"),
        ({"render_mode": "human"}, "ansi"),
        ({"split": ""}, "split"),
        ({"split": None}, "split"),
        ({"task_types": []}, "task_types is empty"),
        ({"task_types": 3}, "list of names"),
    ],
)
def test_wrong_settings_are_named(case: Case, changes: dict[str, Any], message: str) -> None:
    kind = type(case.make())
    with pytest.raises(InvalidSettingError, match=message):
        kind(**{**case.settings, **changes})


ODD = [None, 5, -1, 2.5, float("nan"), 2**70, True, "", "x", "\0", b"x", ["a"], [[1]], {}, object()]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.usefixtures("no_user_data")
def test_a_setting_of_a_wrong_type_raises_no_other_error(case: Case, value: Any) -> None:
    kind = type(case.make())
    # Where these are valid, other servers start.
    for name in inspect.signature(kind).parameters.keys() - {
        "products", "entities", "goal_seed", "world_seed", "human_goals",
    }:  # fmt: skip
        settings = {**case.settings, name: value}
        if name in ("corpus", "server_url"):
            settings["data"] = "auto"
        with contextlib.suppress(AtodError):
            env = kind(**settings)
            env.reset(seed=0)
            env.close()


@pytest.mark.parametrize("value", [10**6, 10**9])
def test_large_numbers_are_refused_or_work(case: Case, value: int) -> None:
    for name in inspect.signature(type(case.make())).parameters.keys() & {
        "max_turns", "expert_turns", "topk", "passage_characters", "observation_characters",
        "timeout",
    }:  # fmt: skip
        with contextlib.suppress(InvalidSettingError):
            limit = {"max_episode_steps": value} if name == "max_turns" else {name: value}
            env = case.make(**limit)
            env.reset(seed=0)
            assert env.step(case.action)[4]["is_action_valid"]
            env.close()


def test_a_path_is_never_a_word(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_user_data: None
) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("auto", "official", "generated"):
        (tmp_path / word).mkdir()
        with pytest.raises(DataNotFoundError, match=f"data in '{word}'"):
            case.make(data=Path(word))


def test_observations_and_infos_are_new_objects(case: Case) -> None:
    env = case.make()
    observation, info = env.reset(seed=0)
    observation["text"] = info["task_id"] = "changed"
    again, _, _, _, new_info = env.step(case.action)
    assert again["text"] != "changed" != new_info["task_id"]


def test_rendering_shows_the_last_action(case: Case) -> None:
    env = case.make(render_mode="ansi")
    with pytest.raises(ResetNeeded):
        env.render()
    text = env.reset(seed=0)[0]["text"]
    assert env.render() == f"{text}\n"
    text = env.step(case.action)[0]["text"]
    assert env.render() == f"> {case.action}\n\n{text}\n"


def test_closing_twice_and_playing_on_after_a_reset(case: Case) -> None:
    env = case.make()
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(ResetNeeded):
        env.step(case.action)
    assert env.reset(seed=0)[1]["turn_index"] == 0
