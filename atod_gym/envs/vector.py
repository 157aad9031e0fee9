"""Native vector environments: many episodes, one batched call per turn.

`gymnasium.make_vec("atod/WebShop-v0", num_envs=64)` makes one. Environments with a server play a
turn of all episodes in one request, ALFWorld plays them in one loop. No extra processes are needed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from atod_gym.envs.turn_env import (
    Turn,
    TurnEnv,
    check_integer,
    check_max_turns,
    check_registered_limit,
)
from atod_gym.errors import InvalidSettingError
from atod_gym.types import TurnObservation

Step = tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]

_ABSENT: Any = object()


class TurnVectorEnv(VectorEnv[dict[str, Any], Sequence[str | None], NDArray[Any]]):
    """`num_envs` episodes of one environment, stepped together.

    ## Observation
    A dict of `instruction`, `text` (tuples of `num_envs` texts), `admissible_actions` (a tuple of
    tuples) and `turn_index` (an int64 array), as `SyncVectorEnv` batches them.

    ## Action
    A sequence of `num_envs` texts. With `autoreset_mode="Disabled"` None in place of a text leaves
    an environment unchanged: its reward is 0.0, its flags are the last ones and `infos` has no
    entry for it. An environment whose episode is over accepts only None until it is reset.

    ## Reset
    `reset(seed=s)` seeds environment i with s + i; it then plays like a single environment
    with that seed. A list gives each seed. Options: `task_ids`, a sequence with a task id or None
    (a random task) for each environment; `task_id`, one task for all; `reset_mask`, a boolean array
    of the environments to reset.

    ## Infos
    Arrays by key with a mask under `_<key>`, as in every Gymnasium vector environment. With
    `autoreset_mode="SameStep"` the last observation and info of an episode are in `final_obs` and
    `final_info`.
    """

    env_id: ClassVar[str]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        **settings: Any,
    ) -> None:
        """Make the environments.

        Args:
            num_envs: number of episodes that are played at the same time, at least 1.
            autoreset_mode: `NextStep`, `SameStep` or `Disabled`, see Gymnasium.
            max_episode_steps: turn limit; -1: none. A smaller `max_turns` in `settings` counts.
            **settings: of the environment class.

        Raises:
            InvalidSettingError: if a setting is invalid.
            AtodError: if an environment cannot be made, see its class.
        """
        check_integer("num_envs", num_envs, 1)
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            known = ", ".join(mode.value for mode in AutoresetMode)
            raise InvalidSettingError(
                f"Unknown autoreset_mode {autoreset_mode!r}; known: {known}."
            ) from None
        if max_episode_steps not in (None, -1):
            check_max_turns(max_episode_steps, "max_episode_steps")
            check_max_turns(settings.get("max_turns"))
            check_registered_limit(self.env_id, settings.get("max_turns"))
            given = settings.get("max_turns") or max_episode_steps
            settings["max_turns"] = min(given, max_episode_steps)
        creator: Any = load_env_creator(str(gymnasium.spec(self.env_id).entry_point))
        self.num_envs = num_envs
        self.envs: list[TurnEnv] = []
        try:
            for _ in range(num_envs):
                self.envs.append(creator(**settings))
        except BaseException:
            self.close_extras()
            raise
        first = self.envs[0]
        self.render_mode = first.render_mode
        self.metadata = {**first.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, num_envs)
        self.action_space = batch_space(first.action_space, num_envs)
        self._played: tuple[NDArray[np.bool_], dict[int, Turn]] | None = None
        """Result of `_play_turn` in a `step` in which new episodes failed to start."""

    @property
    def spec(self) -> EnvSpec | None:
        """The specification of `gymnasium.make_vec`, with the turn limit that is played."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = copy.copy(spec)
        if self._spec is not None:
            self._spec.max_episode_steps = self.envs[0].turn_limit

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The task ids that every environment plays, in manifest order."""
        return self.envs[0].task_ids

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes in all environments, or in those of a mask; see the class.

        Raises:
            InvalidSettingError: if an option is unknown or does not have `num_envs` entries.
            TaskNotFoundError: if a task id is not among `task_ids`.
            AtodError: if a task cannot be started; the environments of this call must be reset.
        """
        seeds = self._seeds(seed)
        numbers, task_ids = self._reset_options(options or {})
        infos: list[dict[str, Any] | None] = [None] * self.num_envs
        starts = self.begin(numbers, task_ids, [seeds[number] for number in numbers])
        self._played = None
        for number, (_, info) in zip(numbers, starts, strict=True):
            infos[number] = info
        return self._observations(), _batched(infos)

    def step(self, actions: Sequence[str | None]) -> Step:
        """Play one turn in every environment.

        Raises:
            InvalidSettingError: if there are not `num_envs` actions.
            TypeError: if an action is not a text.
            gymnasium.error.ResetNeeded: if an environment has no running episode.
            ServerError: if a server fails. The same call may be repeated unless the message says to
                reset: no turn is spent twice, also if only new episodes failed to start.
        """
        if isinstance(actions, str) or len(actions) != self.num_envs:
            raise InvalidSettingError(
                f"step() takes a sequence of {self.num_envs} actions, one for each environment."
            )
        if self._played is None:
            self._played = self._play_turn(actions)
        over, turns = self._played
        rewards = np.zeros(self.num_envs)
        infos: list[dict[str, Any] | None] = [None] * self.num_envs
        if self.autoreset_mode is AutoresetMode.NEXT_STEP:
            self._restart(over, infos)
        terminations, truncations = np.array([env.ended for env in self.envs], np.bool_).T.copy()
        for number, turn in turns.items():
            _, rewards[number], terminations[number], truncations[number], infos[number] = turn
        final: dict[str, Any] = {}
        ended = terminations | truncations
        if self.autoreset_mode is AutoresetMode.SAME_STEP and ended.any():
            final = self._final(ended, turns)
            self._restart(ended, infos)
        self._played = None
        infos_by_key = {**final, **_batched(infos)}
        return self._observations(), rewards, terminations, truncations, infos_by_key

    def _play_turn(
        self, actions: Sequence[str | None]
    ) -> tuple[NDArray[np.bool_], dict[int, Turn]]:
        """Play the actions; return which episodes were over before, and the turns by number."""
        over = np.array([any(env.ended) for env in self.envs], np.bool_)
        resets = self.autoreset_mode is AutoresetMode.NEXT_STEP
        skips = self.autoreset_mode is AutoresetMode.DISABLED
        playing: list[tuple[int, str]] = []
        for number, action in enumerate(actions):
            if (resets and over[number]) or (skips and action is None):
                continue
            if over[number]:
                raise ResetNeeded(
                    f"The episode of environment {number} is over: reset it, or pass None."
                )
            playing.append((number, action))  # type: ignore[arg-type]
        numbers = [number for number, _ in playing]
        turns = self.play(numbers, [action for _, action in playing])
        return over, dict(zip(numbers, turns, strict=True))

    def begin(
        self,
        numbers: Sequence[int],
        task_ids: Sequence[str | None] | None = None,
        seeds: Sequence[int | None] | None = None,
    ) -> list[tuple[TurnObservation, dict[str, Any]]]:
        """Start episodes in some environments, without batching what they return.

        Args:
            numbers: of the environments, each once.
            task_ids: for each number a task id, or None for a random task; None: all random.
            seeds: for each number a seed, or None.

        Returns:
            Observation and info of each, in the order of `numbers`.

        Raises:
            TaskNotFoundError: if a task id is not among `task_ids`; no episode is left then.
            AtodError: if a task cannot be started; these environments must be reset.
        """
        if not numbers:
            return []
        envs = [self.envs[number] for number in numbers]
        options: list[dict[str, Any]] = [
            {} if task_id is None else {"task_id": env._check_task(task_id)}
            for env, task_id in zip(envs, task_ids or [None] * len(envs), strict=True)
        ]
        chosen = [
            env._choose(seed, option)
            for env, seed, option in zip(envs, seeds or [None] * len(envs), options, strict=True)
        ]
        opened = type(envs[0])._open_many(envs, chosen)
        return [
            env._begin(task_id, *start)
            for env, task_id, start in zip(envs, chosen, opened, strict=True)
        ]

    def play(self, numbers: Sequence[int], actions: Sequence[str]) -> list[Turn]:
        """Play one turn in some environments, without batching what they return.

        Args:
            numbers: of the environments, each once; their episodes must be running.
            actions: one for each number.

        Returns:
            The results of `step` of a single environment, in the order of `numbers`.

        Raises:
            See `step`.
        """
        if not numbers:
            return []
        envs = [self.envs[number] for number in numbers]
        for env, action in zip(envs, actions, strict=True):
            env._check_step(action)
        results = type(envs[0])._play_many(envs, actions)
        return [
            env._record(action, result)
            for env, action, result in zip(envs, actions, results, strict=True)
        ]

    def render(self) -> tuple[Any, ...]:
        """Return the rendering of each environment."""
        return tuple([env.render() for env in self.envs])

    def call(self, name: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Call a method of every environment, or read an attribute; return the results."""
        found = [getattr(env, name) for env in self.envs]
        return tuple([one(*args, **kwargs) if callable(one) else one for one in found])

    def get_attr(self, name: str) -> tuple[Any, ...]:
        """Return an attribute of every environment."""
        return self.call(name)

    def close_extras(self, **kwargs: Any) -> None:
        """Close all environments."""
        for env in self.envs:
            env.close()

    def _seeds(self, seed: int | Sequence[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        if isinstance(seed, int | np.integer):
            return [int(seed) + number for number in range(self.num_envs)]
        if len(seed) != self.num_envs:
            raise InvalidSettingError(f"Give {self.num_envs} seeds, not {len(seed)}.")
        return list(seed)

    def _reset_options(self, options: Mapping[str, Any]) -> tuple[list[int], list[str | None]]:
        """Return the numbers of the environments to reset, and the task of each."""
        unknown = [key for key in options if key not in ("reset_mask", "task_ids", "task_id")]
        if unknown:
            raise InvalidSettingError(
                f"Unknown reset option {unknown[0]!r}; known: reset_mask, task_ids, task_id."
            )
        numbers = list(range(self.num_envs))
        if "reset_mask" in options:
            mask = options["reset_mask"]
            if (
                not isinstance(mask, np.ndarray)
                or mask.dtype != np.bool_
                or mask.shape != (self.num_envs,)
                or not mask.any()
            ):
                raise InvalidSettingError(
                    f"reset_mask must be a boolean array of shape ({self.num_envs},) in which at "
                    f"least one entry is True, not {mask!r}."
                )
            numbers = mask.nonzero()[0].tolist()
        task_ids = options.get("task_ids", [options.get("task_id")] * self.num_envs)
        if isinstance(task_ids, str) or len(task_ids) != self.num_envs:
            raise InvalidSettingError(
                f"task_ids must have an entry for each of the {self.num_envs} environments."
            )
        return numbers, [task_ids[number] for number in numbers]

    def _restart(self, over: NDArray[np.bool_], infos: list[dict[str, Any] | None]) -> None:
        """Start random tasks in the environments of a mask; put their infos into `infos`."""
        numbers = over.nonzero()[0].tolist()
        for number, (_, info) in zip(numbers, self.begin(numbers), strict=True):
            infos[number] = info

    def _final(self, ended: NDArray[np.bool_], turns: Mapping[int, Turn]) -> dict[str, Any]:
        """Return `final_obs` and `final_info` of the episodes that have just ended."""
        observations = np.full(self.num_envs, None, dtype=object)
        last: list[dict[str, Any] | None] = [None] * self.num_envs
        for number in ended.nonzero()[0].tolist():
            observations[number], *_, last[number] = turns[number]
        return {
            "final_obs": observations,
            "_final_obs": ended,
            "final_info": _batched(last),
            "_final_info": ended.copy(),
        }

    def _observations(self) -> dict[str, Any]:
        """Return the observations of all environments.

        Raises:
            ResetNeeded: if an environment was never reset.
        """
        observations = [env.observation for env in self.envs]
        return {
            "admissible_actions": tuple([one["admissible_actions"] for one in observations]),
            "instruction": tuple([one["instruction"] for one in observations]),
            "text": tuple([one["text"] for one in observations]),
            "turn_index": np.array([one["turn_index"] for one in observations], np.int64),
        }


def _batched(infos: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """Batch infos as `VectorEnv._add_info` does: an array and a mask for each key."""
    batched: dict[str, Any] = {}
    given = [info for info in infos if info is not None]
    for key in dict.fromkeys([key for info in given for key in info]):
        values = [None if info is None else info.get(key, _ABSENT) for info in infos]
        if len(given) == len(infos) and _ABSENT not in values:
            mask = np.ones(len(infos), np.bool_)
            first = values[0]
        else:
            has = [info is not None and key in info for info in infos]
            mask = np.array(has, np.bool_)
            first = values[has.index(True)]
            values = [value if there else None for value, there in zip(values, has, strict=True)]
        if isinstance(first, Mapping):
            batched[key] = _batched(values)
        elif type(first) in (bool, int, float):
            batched[key] = np.array([value or 0 for value in values], dtype=type(first))
        else:
            batched[key] = np.fromiter(values, dtype=object, count=len(values))
        batched[f"_{key}"] = mask
    return batched


class ALFWorldVectorEnv(TurnVectorEnv):
    """A vector environment of `atod/ALFWorld-v0`."""

    env_id = "atod/ALFWorld-v0"


class WebShopVectorEnv(TurnVectorEnv):
    """A vector environment of `atod/WebShop-v0`: a turn of all is one request."""

    env_id = "atod/WebShop-v0"


class SearchQAVectorEnv(TurnVectorEnv):
    """A vector environment of `atod/SearchQA-v0`: the searches of a turn are one request."""

    env_id = "atod/SearchQA-v0"
