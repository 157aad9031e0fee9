"""Define the base class of all environments: turns, limits, settings, observation and info.

A subclass defines its tasks, how an episode starts and what an action does.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils import EzPickle

from atod_gym.errors import InvalidSettingError
from atod_gym.spaces import MAX_TURNS, UnicodeText, turn_observation_space
from atod_gym.tasks import DataSource, TaskManifest, choose_task_types, task_not_found
from atod_gym.types import StepInfo, TurnObservation

RENDER_MODES = ("ansi",)

Turn = tuple[TurnObservation, float, bool, bool, dict[str, Any]]
"""The result of `step`: observation, reward, terminated, truncated, info."""

_Env = TypeVar("_Env", bound="TurnEnv")
_PLACEHOLDER = re.compile(r"\w+\[<[^<>]+>\]")


class TurnResult(NamedTuple):
    """The outcome of starting an episode or of an action, before it becomes an observation."""

    text: str
    admissible_actions: tuple[str, ...]
    """Sorted; without actions that are hidden from agents."""
    score: float
    """The benchmark's current score; 1.0 is success."""
    terminated: bool
    is_action_valid: bool = True
    message: str = ""
    """Why the action had no effect, for `info["message"]`; usually empty."""


def check_max_turns(max_turns: object, name: str = "max_turns") -> None:
    """Check a turn limit; None means no limit.

    Raises:
        InvalidSettingError: if it is neither None nor an integer from 1 to `MAX_TURNS`.
    """
    if max_turns is not None and (
        isinstance(max_turns, bool)
        or not isinstance(max_turns, int)
        or not 1 <= max_turns <= MAX_TURNS
    ):
        raise InvalidSettingError(
            f"{name} must be an integer from 1 to {MAX_TURNS:,}, not {max_turns!r}."
        )


def check_integer(name: str, value: object, least: int) -> None:
    """Raise InvalidSettingError for a setting that is not an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidSettingError(f"{name} must be an integer >= {least}, not {value!r}.")


def check_registered_limit(env_id: str, max_turns: int | None) -> None:
    """Raise InvalidSettingError for a `max_turns` above the limit that an id is registered with."""
    registered = gymnasium.registry.get(env_id)
    limit = None if registered is None else registered.max_episode_steps
    if max_turns is not None and limit is not None and max_turns > limit:
        raise InvalidSettingError(
            f"max_turns={max_turns} is above the registered limit of {env_id}, {limit} turns, and "
            f"only max_episode_steps raises that. Give max_episode_steps={max_turns} instead."
        )


class TurnEnv(gymnasium.Env[TurnObservation, str], EzPickle, ABC):
    """An episode of turns: an action in, a text out; reward 1.0 for success, else 0.0.

    A subclass calls `_set_tasks` and implements the hooks `_open` and `_play`; one with a server
    also `_open_many` and `_play_many`. Only its arguments are pickled.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [*RENDER_MODES], "render_fps": 4}  # type: ignore[misc]
    example_action: ClassVar[str]
    """An action for messages."""
    default_max_turns: ClassVar[int]
    """Turn limit that the environment is registered with."""
    source: ClassVar[DataSource]
    """The places in which its data is searched."""

    manifest: TaskManifest
    """All tasks of the split, with their content hash; not narrowed by `task_types`."""
    task_ids: tuple[str, ...]
    """The task ids of this environment, in manifest order."""
    data: str
    """The data that is played: `official`, `generated` or the path of other data."""
    _task_types: Mapping[str, str]
    """Task id -> task type, for all `task_ids`."""

    def __new__(cls: type[_Env], *args: Any, **kwargs: Any) -> _Env:
        """Keep the arguments for pickling."""
        env = super().__new__(cls)
        EzPickle.__init__(env, *args, **kwargs)
        return env

    def __init__(
        self, split: str, max_turns: int | None = None, render_mode: str | None = None
    ) -> None:
        """Check the settings that all environments have.

        Args:
            split: name of a split.
            max_turns: episodes are truncated after this many turns; None: no limit here. The limit
                of `gym.make`, `max_episode_steps`, is unknown here until `limit_turns`.
            render_mode: None or `ansi`.

        Raises:
            InvalidSettingError: if a setting is invalid.
        """
        if not isinstance(split, str) or not split:
            raise InvalidSettingError(f"split must be a name such as train, not {split!r}.")
        check_max_turns(max_turns)
        if render_mode is not None and render_mode not in RENDER_MODES:
            raise InvalidSettingError(
                f"Unknown render_mode {render_mode!r}; known: None, {', '.join(RENDER_MODES)}."
            )
        self.split = split
        self.max_turns = self.default_max_turns if max_turns is None else max_turns
        """The number of turns that experts plan with."""
        self.render_mode = render_mode
        self.observation_space = cast(
            "gymnasium.Space[TurnObservation]", turn_observation_space(max_turns)
        )
        self.action_space = UnicodeText()
        self.turn_limit = max_turns
        self._spec: EnvSpec | None = None
        self._result: TurnResult | None = None
        """None before the first reset."""
        self._task_id = ""
        self._instruction = ""
        self._action = ""
        self._turn_index = 0
        self._over = False

    @property
    def spec(self) -> EnvSpec | None:
        """The specification with which `gym.make` made the environment; None without it."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None:
            check_registered_limit(spec.id, self.turn_limit)
        self._spec = spec

    def limit_turns(self, limit: int) -> None:
        """Set a limit from outside, such as that of `TimeLimit`, unless `max_turns` is smaller."""
        self.turn_limit = self.max_turns = min(limit, self.turn_limit or limit)

    @staticmethod
    def is_placeholder(action: str) -> bool:
        """Return whether an admissible action is a placeholder, such as `search[<query>]`."""
        return _PLACEHOLDER.fullmatch(action) is not None

    def _set_tasks(
        self, manifest: TaskManifest, types: Mapping[str, str], task_types: object, data: str
    ) -> None:
        """Set the tasks; `__init__` of a subclass calls it.

        Args:
            manifest: all tasks of the split.
            types: task id -> task type, for all of them.
            task_types: the setting, see `choose_task_types`.
            data: the value of `info["data"]`.
        """
        self.manifest, self.data = manifest, data
        self._task_types = choose_task_types(types, task_types)
        # One tuple for all environments: a split may have more than a million tasks.
        is_whole = self._task_types is types
        self.task_ids = manifest.task_ids if is_whole else tuple(self._task_types)

    @abstractmethod
    def _open(self, task_id: str) -> tuple[str, TurnResult]:
        """Start an episode; return its instruction and the first result."""

    @abstractmethod
    def _play(self, action: str) -> TurnResult:
        """Execute an action of a running episode; if it raises, the turn is not spent."""

    @classmethod
    def _open_many(
        cls, envs: Sequence[Any], task_ids: Sequence[str]
    ) -> list[tuple[str, TurnResult]]:
        """Start an episode in each environment; if it raises, no episode has begun."""
        return [env._open(task_id) for env, task_id in zip(envs, task_ids, strict=True)]

    @classmethod
    def _play_many(cls, envs: Sequence[Any], actions: Sequence[str]) -> list[TurnResult]:
        """Execute an action in each environment; if it raises, no turn is spent."""
        return [env._play(action) for env, action in zip(envs, actions, strict=True)]

    def _own_info(self) -> dict[str, Any]:
        """Return the keys of `info` besides those of `StepInfo`; new objects each time."""
        return {}

    @property
    def observation(self) -> TurnObservation:
        """The observation of the last reset or step.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        result = self._result
        if result is None:
            raise ResetNeeded("call reset() before asking for the observation")
        return {
            "instruction": self._instruction,
            "text": result.text,
            "admissible_actions": result.admissible_actions,
            "turn_index": self._turn_index,
        }

    @property
    def ended(self) -> tuple[bool, bool]:
        """Whether the episode is terminated, and whether it is truncated."""
        is_terminated = self._result is not None and self._result.terminated
        return is_terminated, self._over and not is_terminated

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TurnObservation, dict[str, Any]]:
        """Start an episode.

        Args:
            seed: seeds the choice of tasks, of this and of later resets.
            options: `{"task_id": ...}` plays exactly that task.

        Raises:
            TaskNotFoundError: if the task id is not among `task_ids`.
            InvalidSettingError: if `options` has other keys.
            AtodError: if the task cannot be loaded, see the class; reset() may be called again.
        """
        task_id = self._choose(seed, options or {})
        return self._begin(task_id, *self._open(task_id))

    def _choose(self, seed: int | None, options: Mapping[str, Any]) -> str:
        """Leave the current episode and return the task of the next one."""
        super().reset(seed=seed)
        task_id = self._chosen_task(options)
        self._result = None
        return task_id

    def _begin(
        self, task_id: str, instruction: str, result: TurnResult
    ) -> tuple[TurnObservation, dict[str, Any]]:
        """Record the start of an episode."""
        self._instruction = instruction
        self._result = result
        self._task_id = task_id
        self._action = ""
        self._turn_index = 0
        self._over = result.terminated
        return self.observation, self._info(result)

    def step(self, action: str) -> Turn:
        """Play one action.

        Raises:
            TypeError: if the action is not a `str`.
            gymnasium.error.ResetNeeded: before the first reset and after the end of an episode.
            ServerError: if a server is needed and fails. The turn is not spent, and the same step
                may be called again, unless the message says to reset.
        """
        self._check_step(action)
        return self._record(action, self._play(action))

    def _check_step(self, action: object) -> None:
        self._check_playing()
        if not isinstance(action, str):
            raise TypeError(
                f'an action is a str, such as "{self.example_action}", not {type(action).__name__}'
            )

    def _record(self, action: str, result: TurnResult) -> Turn:
        """Record a turn that was played."""
        self._result = result
        self._action = action
        self._turn_index += 1
        truncated = not result.terminated and self._turn_index == self.turn_limit
        self._over = result.terminated or truncated
        reward = 1.0 if result.score == 1.0 else 0.0
        return self.observation, reward, result.terminated, truncated, self._info(result)

    def render(self) -> str | None:
        """Return, with `render_mode="ansi"`, the last action and the text after it.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render() shows nothing without render_mode="ansi"')
            return None
        if self._result is None:
            raise ResetNeeded("call reset() before render()")
        command = f"> {self._action}\n\n" if self._turn_index else ""
        return f"{command}{self._result.text}\n"

    def close(self) -> None:
        """Leave the episode; may be called twice."""
        self._result = None

    def _check_playing(self) -> None:
        if self._result is None:
            raise ResetNeeded("call reset() before step()")
        if self._over:
            raise ResetNeeded("the episode is over: call reset() before the next step()")

    def _check_task(self, task_id: object) -> str:
        """Return a valid task id; raise `TaskNotFoundError` with proposals for an unknown one."""
        if not isinstance(task_id, str) or task_id not in self._task_types:
            raise task_not_found(task_id, self.task_ids, self.split)
        return task_id

    def _chosen_task(self, options: Mapping[str, Any]) -> str:
        """Return the task that a reset names, else a random one (only then is a number drawn)."""
        unknown = [key for key in options if key != "task_id"]
        if unknown:
            raise InvalidSettingError(
                f"Unknown reset option {unknown[0]!r}; the only one is 'task_id'."
            )
        if "task_id" in options:
            return self._check_task(options["task_id"])
        return self.task_ids[int(self.np_random.integers(len(self.task_ids)))]

    def _info(self, result: TurnResult) -> dict[str, Any]:
        info: StepInfo = {
            "task_id": self._task_id,
            "task_type": self._task_types[self._task_id],
            "split": self.split,
            "data": self.data,
            "success": result.score == 1.0,
            "score": result.score,
            "action": self._action,
            "is_action_valid": result.is_action_valid,
            "parse_error": "",
            "turn_index": self._turn_index,
            "message": result.message,
        }
        info.update(self._own_info())  # type: ignore[typeddict-item]
        return info  # type: ignore[return-value]
