"""ALFWorld as a Gymnasium environment: household tasks in text, one command per turn."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, ClassVar, cast

import gymnasium
from gymnasium.error import ResetNeeded
from gymnasium.utils import EzPickle

from atod_gym.data import TaskManifest
from atod_gym.envs.alfworld.engine import EngineState, GameEngine
from atod_gym.envs.alfworld.expert import ScriptedExpert
from atod_gym.envs.alfworld.splits import check_task_types, open_tasks
from atod_gym.envs.arguments import RENDER_MODES, check_max_turns, check_render_mode, choose_task
from atod_gym.errors import (
    InvalidGameError,
    InvalidSettingError,
    UnsupportedGameError,
)
from atod_gym.spaces import UnicodeText, turn_observation_space
from atod_gym.types import StepInfo, TurnObservation

BACKENDS = ("native", "alfworld")
_TASK_MARK = "Your task is to: "


class ALFWorldEnv(gymnasium.Env[TurnObservation, str], EzPickle):
    """A household task, such as finding a mug, cooling it and putting it on a shelf.

    ## Observation
    A Dict (`TurnObservation`): `instruction`, the task in one sentence; `text`, the game's feedback
    to the last command, byte for byte; `admissible_actions`, all commands that are possible now but
    `help`; `turn_index`, the number of commands so far.

    ## Action
    Any string, such as `go to desk 1` or `take mug 2 from desk 1`. White space around it does not
    count. One that is not admissible gives `Nothing happens.` and costs the turn.

    ## Reward
    1.0 on the turn that reaches the goal, else 0.0.

    ## End of the episode
    `terminated` when the goal is reached; `truncated` after `max_turns` turns without that.
    Stepping on raises `gymnasium.error.ResetNeeded`.

    ## Start
    `reset(seed=...)` picks a task of the split; `reset(options={"task_id": ...})` plays that task.

    ## Info
    See `StepInfo`. `help` counts as a valid action. The last turn's `episode` has the keys of
    Gymnasium's `RecordEpisodeStatistics`; to use that wrapper as well, give it another `stats_key`.

    ## Arguments
    See `__init__`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [*RENDER_MODES], "render_fps": 4}  # type: ignore[misc]

    def __init__(
        self,
        split: str = "train",
        data: str | os.PathLike[str] = "auto",
        backend: str = "native",
        task_types: Sequence[str] | None = None,
        max_turns: int = 50,
        house_size: str = "small",
        render_mode: str | None = None,
    ) -> None:
        """Finds the data; games are loaded at reset.

        Args:
            split: `train`, `valid_seen` or `valid_unseen`.
            data: `official`, `generated`, `auto` (official where found, else generated) or the path
                of a folder of games.
            backend: `native`, or `alfworld` for the official engine (same answers, much slower).
            task_types: play only tasks of these types (names as in `splits.TASK_TYPES`).
            max_turns: turn limit, at least 1.
            house_size: size of generated houses.
            render_mode: `ansi` makes `render()` return what a player would see.

        Raises:
            InvalidSettingError: if an argument has no meaning.
            DataNotFoundError: if the data or split is not there; says how to get it.
        """
        # JSON, and with it the spec of the environment, has no paths.
        data = data if isinstance(data, str) else os.fspath(data)
        EzPickle.__init__(
            self, split, data, backend, task_types, max_turns, house_size, render_mode
        )
        if backend not in BACKENDS:
            raise InvalidSettingError(f"Unknown backend {backend!r}; known: {', '.join(BACKENDS)}.")
        check_max_turns(max_turns)
        check_render_mode(render_mode)
        chosen_types = check_task_types(task_types)
        self.split = split
        self.backend = backend
        self.max_turns = max_turns
        self.render_mode = render_mode
        self._tasks = open_tasks(data, split, house_size)
        self._task_ids = tuple(
            task_id
            for task_id in self._tasks.manifest.task_ids
            if self._tasks.task_type(task_id) in chosen_types
        )
        if not self._task_ids:
            raise InvalidSettingError(
                f"Split {split!r} has no task of type {', '.join(chosen_types)}."
            )
        self._known_ids = frozenset(self._task_ids)
        self.observation_space = cast(
            "gymnasium.Space[TurnObservation]", turn_observation_space(max_turns)
        )
        self.action_space = UnicodeText()
        self._engine: GameEngine | None = None
        self._task_id = ""
        self._state: EngineState | None = None
        self._over = False
        self._instruction = ""
        self._action = ""
        self._turn_index = 0
        self._started = 0.0

    @property
    def manifest(self) -> TaskManifest:
        """All tasks of the split, with their content hash; not narrowed by `task_types`."""
        return self._tasks.manifest

    @property
    def task_ids(self) -> tuple[str, ...]:
        """The task ids that this environment plays, in manifest order."""
        return self._task_ids

    @property
    def data(self) -> str:
        """Which data is played: `official`, `generated` or the path that was given."""
        return self._tasks.label

    @property
    def observation(self) -> TurnObservation:
        """The observation of the last reset or step.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._state is None:
            raise ResetNeeded("call reset() before asking for the observation")
        return self._observation(self._state)

    def expert(self) -> ScriptedExpert:
        """A scripted expert that acts on what the agent sees; one for each episode."""
        return ScriptedExpert()

    @property
    def walkthrough(self) -> tuple[str, ...]:
        """A winning sequence of commands for the current task, made with full knowledge.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._engine is None:
            raise ResetNeeded("call reset() before asking for the walkthrough of its task")
        return self._engine.walkthrough

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[TurnObservation, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: seeds the choice of tasks, of this and of later resets.
            options: `{"task_id": ...}` plays exactly that task.

        Raises:
            TaskNotFoundError: if the task id is not among `task_ids`.
            InvalidSettingError: if `options` has other keys.
            InvalidGameError: if the task's game cannot be read; names the file.
            UnsupportedGameError: if the backend does not play the game; names the other backend.
            MissingExtraError: if the official backend is not installed.
        """
        super().reset(seed=seed)
        task_id = choose_task(options, self._task_ids, self._known_ids, self.split, self.np_random)
        self._state = None
        if self._engine is None or task_id != self._task_id:
            self._close_engine()
            self._engine = self._load(task_id)
            self._task_id = task_id
        state = self._engine.reset()
        _, mark, rest = state.feedback.partition(_TASK_MARK)
        if not mark:
            raise InvalidGameError(
                f"{self._tasks.describe(task_id)}: the first text does not say {_TASK_MARK!r}."
            )
        self._state = state
        self._over = False
        self._instruction = rest.strip()
        self._action = ""
        self._turn_index = 0
        self._started = time.perf_counter()
        return self._observation(state), self._info(state, is_action_valid=True)

    def step(self, action: str) -> tuple[TurnObservation, float, bool, bool, dict[str, Any]]:
        """Executes one command.

        Raises:
            TypeError: if the action is not a `str`.
            gymnasium.error.ResetNeeded: before the first reset and after the end of an episode.
        """
        if self._engine is None or self._state is None:
            raise ResetNeeded("call reset() before step()")
        if self._over:
            raise ResetNeeded("the episode is over: call reset() before the next step()")
        if not isinstance(action, str):
            raise TypeError(
                f'an action is a str, such as "go to desk 1", not {type(action).__name__}'
            )
        is_action_valid = action.strip() in self._state.admissible_commands
        state = self._engine.step(action)
        self._state = state
        self._action = action
        self._turn_index += 1
        terminated = state.won
        truncated = not terminated and self._turn_index >= self.max_turns
        self._over = terminated or truncated
        reward = 1.0 if state.won else 0.0
        info = self._info(state, is_action_valid)
        if self._over:
            # Earlier turns earn nothing, so the return is the last reward.
            seconds = round(time.perf_counter() - self._started, 6)
            info["episode"] = {"r": reward, "l": self._turn_index, "t": seconds}
        return self._observation(state), reward, terminated, truncated, info

    def render(self) -> str | None:
        """With `render_mode="ansi"`: the last command and the game's answer, as a player sees them.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self.render_mode is None:
            gymnasium.logger.warn('render() shows nothing without render_mode="ansi"')
            return None
        if self._state is None:
            raise ResetNeeded("call reset() before render()")
        command = f"> {self._action}\n\n" if self._turn_index else ""
        return f"{command}{self._state.feedback}\n"

    def close(self) -> None:
        """Frees the game; may be called twice."""
        self._close_engine()
        self._state = None

    def _load(self, task_id: str) -> GameEngine:
        game = self._tasks.game(task_id)
        try:
            if self.backend == "alfworld":
                from atod_gym.envs.alfworld.official import OfficialEngine

                return OfficialEngine(game)
            from atod_gym.envs.alfworld.native import NativeEngine

            return NativeEngine(game)
        except (InvalidGameError, UnsupportedGameError) as error:
            name = self._tasks.describe(task_id)
            if name in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _observation(self, state: EngineState) -> TurnObservation:
        return {
            "instruction": self._instruction,
            "text": state.feedback,
            "admissible_actions": tuple(
                command for command in state.admissible_commands if command != "help"
            ),
            "turn_index": self._turn_index,
        }

    def _info(self, state: EngineState, is_action_valid: bool) -> dict[str, Any]:
        info: StepInfo = {
            "task_id": self._task_id,
            "task_type": self._tasks.task_type(self._task_id),
            "split": self.split,
            "data": self._tasks.label,
            "success": state.won,
            "score": 1.0 if state.won else 0.0,
            "action": self._action,
            "is_action_valid": is_action_valid,
            "parse_error": "",
            "turn_index": self._turn_index,
        }
        return cast("dict[str, Any]", info)
