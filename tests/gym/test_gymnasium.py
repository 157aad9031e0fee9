"""Every registered id as a citizen of Gymnasium: its wrappers and its vector environments."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.error import ResetNeeded
from gymnasium.spaces.utils import flatten, flatten_space
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

import atod_gym
from atod_gym.envs.vector import TurnVectorEnv
from atod_gym.errors import InvalidSettingError, ServerError, TaskNotFoundError
from atod_gym.wrappers import agent_env, make_env

LIMITS = {"atod/ALFWorld-v0": 50, "atod/WebShop-v0": 15, "atod/SearchQA-v0": 4}
RESERVED = {"episode", "_episode", "final_obs", "final_info", "final_observation"}
# An action that is possible in every state and ends nothing.
IDLE = {
    "atod/ALFWorld-v0": "inventory",
    "atod/WebShop-v0": "search[red shoes]",
    "atod/SearchQA-v0": "search[mill]",
}

pytestmark = pytest.mark.usefixtures("no_user_data")


@pytest.fixture(params=atod_gym.ENV_IDS)
def env_id(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def vectors() -> Iterator[Any]:
    """Makes vector environments and closes them."""
    made: list[VectorEnv[Any, Any, Any]] = []

    def make(env_id: str, count: int, mode: str | None = None, **settings: Any) -> Any:
        envs = gymnasium.make_vec(env_id, count, mode, **settings)
        made.append(envs)
        return envs

    yield make
    for envs in made:
        envs.close()


def run(env: gymnasium.Env[Any, Any], action: str) -> tuple[int, dict[str, Any]]:
    """Plays an idle episode to its end; its length and last info."""
    env.reset(seed=0)
    for length in range(1, 300):
        _, _, terminated, truncated, info = env.step(action)
        assert not terminated
        if truncated:
            return length, info
    raise AssertionError("the episode does not end")


def test_the_registered_spec_names_the_turn_limit(env_id: str) -> None:
    assert gymnasium.spec(env_id).max_episode_steps == LIMITS[env_id]
    env = gymnasium.make(env_id)
    assert env.spec is not None
    assert env.spec.max_episode_steps == LIMITS[env_id]
    assert run(env, IDLE[env_id])[0] == LIMITS[env_id]
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert run(again, IDLE[env_id])[0] == LIMITS[env_id]
    check_env(env.unwrapped)
    env.close()
    again.close()


@pytest.mark.parametrize("limit", [1, 70])
def test_max_episode_steps_shortens_and_lengthens(env_id: str, limit: int, vectors: Any) -> None:
    env = gymnasium.make(env_id, max_episode_steps=limit)
    assert run(env, IDLE[env_id])[0] == limit
    copied = pickle.loads(pickle.dumps(env))
    assert run(copied, IDLE[env_id])[0] == limit
    env.close()
    copied.close()
    envs = vectors(env_id, 2, max_episode_steps=limit)
    envs.reset(seed=0)
    for turn in range(1, limit + 1):
        truncations = envs.step([IDLE[env_id]] * 2)[3]
        assert truncations.tolist() == [turn == limit] * 2


@pytest.mark.parametrize(
    ("max_episode_steps", "max_turns", "played"),
    [
        (None, None, "usual"), (3, None, 3), (None, 3, 3), (2, 3, 2), (3, 2, 2), (60, 2, 2),
        (60, None, 60), (None, 60, "refused"), (60, 60, "refused"), (100, 60, "refused"),
        (-1, 3, 3), (-1, None, None),
    ],
)  # fmt: skip
def test_of_two_limits_the_smaller_counts(
    env_id: str, max_episode_steps: int | None, max_turns: int | None, played: Any, vectors: Any
) -> None:
    limits = {"max_episode_steps": max_episode_steps, "max_turns": max_turns}
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    makers = {
        "single": lambda: gymnasium.make(env_id, **limits),  # type: ignore[arg-type]
        "native": lambda: vectors(env_id, 1, **limits),
        "sync": lambda: vectors(env_id, 1, "sync", **limits),
    }
    played = LIMITS[env_id] if played == "usual" else played
    for kind, make in makers.items():
        if played == "refused":
            with pytest.raises(InvalidSettingError, match="Give max_episode_steps=60 instead"):
                make()
            continue
        env = make()
        env.reset(seed=0)
        action = IDLE[env_id] if kind == "single" else [IDLE[env_id]]
        ends = [bool(np.all(env.step(action)[3])) for _ in range(played or 61)]
        assert ends == [False] * (len(ends) - 1) + [played is not None], kind
        if kind == "native":
            assert env.spec.max_episode_steps == played
        env.close()


@pytest.mark.parametrize("limit", [0, -2, 2.5, "3", True])
def test_a_vector_environment_names_a_wrong_limit(env_id: str, limit: Any) -> None:
    for name in ("max_episode_steps", "max_turns"):
        with pytest.raises(
            InvalidSettingError, match=f"{name} must be an integer from 1 to .*, not {limit!r}"
        ):
            gymnasium.make_vec(env_id, 1, **{name: limit})


@pytest.mark.parametrize("limit", [2, 7])
def test_the_limit_of_gymnasium_is_passed_to_the_environment(env_id: str, limit: int) -> None:
    made = (
        make_env(env_id, limit),
        agent_env(gymnasium.make(env_id, max_episode_steps=limit), profile="plain"),
    )
    for env in made:
        assert env.unwrapped.max_turns == limit  # type: ignore[attr-defined]
        length, info = run(env, IDLE[env_id])
        assert (length, "golden_answers" in info) == (limit, "SearchQA" in env_id)
        with pytest.raises(ResetNeeded, match="over"):
            env.step(IDLE[env_id])
        env.close()
    # The wrapper alone truncates: to the environment the episode is not over.
    env = gymnasium.make(env_id, max_episode_steps=limit)
    assert "golden_answers" not in run(env, IDLE[env_id])[1]
    assert env.step(IDLE[env_id])[4]["turn_index"] == limit + 1
    env.close()


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_a_restored_episode_of_a_vector_environment_continues(mode: str, vectors: Any) -> None:
    envs = vectors("atod/ALFWorld-v0", 2, autoreset_mode=mode, house_size="tiny")
    envs.reset(seed=0)
    first = envs.envs[0]
    start = first.snapshot()
    ended = [envs.step([action, "inventory"])[2][0] for action in first.walkthrough]
    assert ended == [False] * (len(ended) - 1) + [True]
    won = first.snapshot()
    first.restore(start)
    observations, _, terminations, *_ = envs.step([first.walkthrough[0], "inventory"])
    assert observations["turn_index"].tolist() == [1, len(ended) + 1]
    assert not terminations.any()
    first.restore(won)
    if mode == "Disabled":
        assert envs.step([None, "inventory"])[2].tolist() == [True, False]
    else:
        assert envs.step(["inventory"] * 2)[0]["turn_index"].tolist() == [0, len(ended) + 2]


def test_no_reserved_key_is_in_info(env_id: str) -> None:
    env = gymnasium.make(env_id, max_episode_steps=2)
    infos = [env.reset(seed=0)[1], *(env.step(IDLE[env_id])[4] for _ in range(2))]
    for info in infos:
        assert not info.keys() & RESERVED
        assert not any(key.startswith("_") for key in info)
        json.dumps(info)
    env.close()


def test_standard_wrappers_work_with_their_defaults(env_id: str) -> None:
    action = IDLE[env_id]
    env = wrappers.RecordEpisodeStatistics(gymnasium.make(env_id))
    length, info = run(env, action)
    assert (info["episode"]["r"], info["episode"]["l"]) == (0.0, length)
    assert length == LIMITS[env_id]
    env = wrappers.TimeLimit(env, 2)
    assert run(env, action)[0] == 2
    env = wrappers.Autoreset(env)
    env.reset(seed=0)
    ends = [env.step(action)[3] for _ in range(6)]
    assert ends == [False, True, False] * 2
    env = wrappers.TransformObservation(
        env, lambda seen: seen["text"].upper(), env.observation_space["text"]
    )
    observation, _ = env.reset(seed=0)
    assert observation == observation.upper() in env.observation_space
    env = wrappers.OrderEnforcing(wrappers.PassiveEnvChecker(gymnasium.make(env_id).unwrapped))
    with pytest.raises(ResetNeeded):
        env.step(action)
    assert run(wrappers.TimeLimit(env, 3), action)[0] == 3


def test_spaces_flatten(env_id: str) -> None:
    env = gymnasium.make(env_id)
    observation, _ = env.reset(seed=0)
    space = flatten_space(env.observation_space)
    assert flatten(env.observation_space, observation) in space
    assert flatten(env.action_space, IDLE[env_id]) in flatten_space(env.action_space)
    assert isinstance(env.action_space, gymnasium.spaces.Text)
    env.close()


def test_vector_statistics_work_with_their_defaults(env_id: str, vectors: Any) -> None:
    envs = wrappers.vector.RecordEpisodeStatistics(vectors(env_id, 3))
    envs.reset(seed=0)
    for _ in range(LIMITS[env_id]):
        *_, infos = envs.step([IDLE[env_id]] * 3)
    assert infos["episode"]["l"].tolist() == [LIMITS[env_id]] * 3
    assert infos["_episode"].all()
    envs.step([IDLE[env_id]] * 3)
    envs.reset(seed=0, options={"reset_mask": np.array([True, False, True])})
    assert envs.episode_lengths.tolist()[0] == 0


def both(vectors: Any, env_id: str, mode: AutoresetMode, count: int, limit: int) -> list[Any]:
    """The native vector environment and Gymnasium's own over single environments."""
    native = vectors(env_id, count, autoreset_mode=mode.value, max_episode_steps=limit)
    assert isinstance(native, TurnVectorEnv)
    sync = SyncVectorEnv([lambda: make_env(env_id, limit)] * count, autoreset_mode=mode)
    return [native, sync]


def assert_equal_steps(first: Any, second: Any) -> None:
    """Compares what two resets or steps return, arrays and their types included."""
    assert type(first) is type(second) or (first is None) == (second is None)
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_equal_steps(first[key], second[key])
    elif isinstance(first, np.ndarray):
        assert first.dtype == second.dtype
        assert_equal_steps(first.tolist(), second.tolist())
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal_steps(one, other)
    else:
        assert first == second


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_the_native_vector_plays_like_single_environments(
    env_id: str, mode: AutoresetMode, vectors: Any
) -> None:
    count, limit = 3, 4
    pair = both(vectors, env_id, mode, count, limit)
    starts = [envs.reset(seed=11) for envs in pair]
    assert_equal_steps(*starts)
    rng = np.random.default_rng(0)
    observation = starts[0][0]
    for _ in range(14):
        listed = observation["admissible_actions"]
        actions = tuple(
            IDLE[env_id] if not one or rng.random() < 0.2 else one[int(rng.integers(len(one)))]
            for one in listed
        )
        steps = [envs.step(actions) for envs in pair]
        assert_equal_steps(*steps)
        observation, _, terminated, truncated, _ = steps[0]
        assert observation in pair[0].observation_space
        over = terminated | truncated
        if mode is AutoresetMode.DISABLED and over.any():
            resets = [envs.reset(options={"reset_mask": over.copy()}) for envs in pair]
            assert_equal_steps(*resets)
            observation = resets[0][0]
    pair[1].close()


def test_seeds_and_task_ids_of_a_vector_environment(env_id: str, vectors: Any) -> None:
    envs = vectors(env_id, 4)
    singles = [gymnasium.make(env_id) for _ in range(4)]
    _, infos = envs.reset(seed=[7, 3, 3, 9])
    expected = [
        env.reset(seed=seed)[1]["task_id"] for env, seed in zip(singles, (7, 3, 3, 9), strict=True)
    ]
    assert infos["task_id"].tolist() == expected
    chosen = [envs.task_ids[5], envs.task_ids[5], None, envs.task_ids[0]]
    _, infos = envs.reset(options={"task_ids": chosen})
    assert [infos["task_id"][i] for i in (0, 1, 3)] == [chosen[i] for i in (0, 1, 3)]
    _, infos = envs.reset(options={"task_id": envs.task_ids[2]})
    assert infos["task_id"].tolist() == [envs.task_ids[2]] * 4
    with pytest.raises(TaskNotFoundError):
        envs.reset(options={"task_ids": ["no such task", None, None, None]})
    # A refused reset leaves the episodes as they were.
    assert envs.step([IDLE[env_id]] * 4)[0]["turn_index"].tolist() == [1] * 4
    for env in singles:
        env.close()


def test_none_leaves_an_environment_as_it_is(env_id: str, vectors: Any) -> None:
    envs = vectors(env_id, 3, autoreset_mode="Disabled", max_episode_steps=2)
    envs.reset(seed=0)
    action = IDLE[env_id]
    observations, rewards, _, truncations, infos = envs.step([action, None, action])
    assert observations["turn_index"].tolist() == [1, 0, 1]
    assert infos["_task_id"].tolist() == [True, False, True]
    *_, truncations, infos = envs.step([action, action, None])
    assert truncations.tolist() == [True, False, False]
    with pytest.raises(ResetNeeded, match="environment 0"):
        envs.step([action] * 3)
    *_, truncations, infos = envs.step([None, action, action])
    assert truncations.tolist() == [True] * 3
    observations, _ = envs.reset(options={"reset_mask": np.array([False, True, False])})
    assert observations["turn_index"].tolist() == [2, 0, 2]
    assert envs.step([None] * 3)[3].tolist() == [True, False, True]
    assert rewards.tolist() == [0.0] * 3


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_step_whose_new_episodes_do_not_start_is_repeated_without_loss(
    env_id: str, mode: str, vectors: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [vectors(env_id, 3, autoreset_mode=mode, max_episode_steps=3) for _ in range(2)]
    late = np.array([False, True, False])
    fails = False
    envs = pair[0]
    kind = type(envs.envs[0])
    open_many = kind._open_many

    def flaky(cls: Any, some: Any, task_ids: Any) -> Any:
        nonlocal fails
        fails = some[0] in envs.envs and not fails
        if fails:
            raise ServerError("down for a moment")
        return open_many(some, task_ids)

    for one in pair:
        one.reset(seed=3)
        one.step([IDLE[env_id]] * 3)
        # Environment 1 lags behind, so that episodes end at different steps.
        one.reset(options={"reset_mask": late, "task_id": one.task_ids[0]})
    monkeypatch.setattr(kind, "_open_many", classmethod(flaky))
    failures = 0
    for _ in range(8):
        expected = pair[1].step([IDLE[env_id]] * 3)
        for _ in range(2):
            try:
                seen = envs.step([IDLE[env_id]] * 3)
                break
            except ServerError:
                failures += 1
        for one, other in zip(seen[1:4], expected[1:4], strict=True):
            assert one.tolist() == other.tolist()
        assert seen[0]["turn_index"].tolist() == expected[0]["turn_index"].tolist()
        assert seen[4].keys() == expected[4].keys()
        if "final_obs" in seen[4]:
            ended = seen[2] | seen[3]
            assert [one["turn_index"] for one in seen[4]["final_obs"][ended]] == [3] * ended.sum()
    assert failures >= 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda envs: envs.step(["x"]), "sequence of 2"),
        (lambda envs: envs.step("xy"), "sequence of 2"),
        (lambda envs: envs.reset(options={"task": "x"}), "known: reset_mask"),
        (lambda envs: envs.reset(options={"task_ids": ["x"]}), "each of the 2"),
        (lambda envs: envs.reset(options={"reset_mask": [True, False]}), "boolean array"),
        (lambda envs: envs.reset(options={"reset_mask": np.zeros(2, bool)}), "at least one"),
        (lambda envs: envs.reset(seed=[1]), "2 seeds"),
    ],
)
def test_wrong_calls_of_a_vector_environment(call: Any, message: str, vectors: Any) -> None:
    envs = vectors("atod/ALFWorld-v0", 2, house_size="tiny")
    envs.reset(seed=0)
    with pytest.raises(InvalidSettingError, match=message):
        call(envs)


@pytest.mark.parametrize("settings", [{"num_envs": 0}, {"autoreset_mode": "sometimes"}])
def test_wrong_settings_of_a_vector_environment(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidSettingError, match=next(iter(settings))):
        gymnasium.make_vec("atod/ALFWorld-v0", **settings)


def test_a_vector_environment_has_the_usual_surface(env_id: str, vectors: Any) -> None:
    envs = vectors(env_id, 2, render_mode="ansi")
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.action_space.sample() in envs.action_space
    observations, _ = envs.reset(seed=0)
    assert envs.render() == tuple(f"{text}\n" for text in observations["text"])
    assert envs.get_attr("split") == ("train", "train")
    assert envs.call("is_placeholder", "search[<query>]") == (True, True)
    json.loads(envs.spec.to_json())
    envs.close()
    envs.close()
