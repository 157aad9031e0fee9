"""ALFWorld as a Gymnasium environment: household tasks in text, one command per turn."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, get_origin, get_type_hints

from gymnasium.error import ResetNeeded

from atod_gym.envs.alfworld.engine import EngineState, GameEngine
from atod_gym.envs.alfworld.engine.native import NativeEngine
from atod_gym.envs.alfworld.expert import ScriptedExpert
from atod_gym.envs.alfworld.games import SOURCE, open_games
from atod_gym.envs.turn_env import TurnEnv, TurnResult
from atod_gym.errors import InvalidGameError, InvalidSettingError, UnsupportedGameError
from atod_gym.types import TurnObservation

BACKENDS = ("native", "alfworld")
_TASK_MARK = "Your task is to: "
_PUT = re.compile(r"(?:put|place|move) (.+?) (?:in/on|into|onto|in|on|to) (.+)")


class Snapshot(TypedDict):
    """The state of an episode, as plain data that pickle and JSON can store."""

    task_id: str
    turn_index: int
    action: str
    """The last action; empty before the first."""
    text: str
    """The text that answered it."""
    is_action_valid: bool
    message: str
    added: list[list[str]]
    """Facts `[predicate, argument, ..]` that hold now and did not at the start."""
    removed: list[list[str]]
    """Facts that held at the start and do not now."""


_KINDS = {key: get_origin(hint) or hint for key, hint in get_type_hints(Snapshot).items()}
"""Key of a `Snapshot` -> type of its value."""


class ALFWorldEnv(TurnEnv):
    """Household tasks in text, such as finding a mug, cooling it and putting it on a shelf.

    ## Observation
    A Dict (`TurnObservation`): `instruction`, the task in one sentence; `text`, the game's feedback
    to the last command, byte for byte; `admissible_actions`, all commands that are possible now
    except `help`; `turn_index`, the number of commands so far.

    ## Action
    Any string, such as `go to desk 1` or `take mug 2 from desk 1`. White space around it is
    ignored. One that is not admissible gives `Nothing happens.` and costs the turn.

    ## Reward
    1.0 on the turn that reaches the goal, else 0.0.

    ## End of the episode
    `terminated` when the goal is reached; `truncated` after `max_turns` turns without that.
    A further step raises `gymnasium.error.ResetNeeded`, except after a truncation by `gym.make`
    alone.

    ## Start
    `reset(seed=...)` picks a task of the split; `reset(options={"task_id": ...})` plays that task.
    It raises `InvalidGameError` if the game cannot be read, `UnsupportedGameError` if the backend
    does not play it, `MissingExtraError` if the backend is not installed.

    ## Info
    See `StepInfo`. `help` counts as a valid action. `message` corrects an action that is spelled
    differently from an admissible one, such as `put mug 2 in desk 1`.

    ## Search
    `snapshot()` returns the state of a running episode, `restore(snapshot)` continues from it, in
    this or another environment of the same data.

    ## Arguments
    See `__init__`.
    """

    example_action = "go to desk 1"
    default_max_turns = 50
    source = SOURCE

    def __init__(
        self,
        split: str = "train",
        data: str | os.PathLike[str] = "auto",
        backend: str = "native",
        task_types: Sequence[str] | str | None = None,
        max_turns: int | None = None,
        house_size: str = "small",
        render_mode: str | None = None,
    ) -> None:
        """Find the data; games are loaded at reset.

        Args:
            split: `train`, `valid_seen` or `valid_unseen`.
            data: `official`, `generated`, `auto` (the games found in the usual folders, else
                generated ones) or a path: a folder of splits or of one split, or a single game.
            backend: `native`, or `alfworld` for the official engine (same answers, much slower).
            task_types: play only tasks of these types: a name, names separated by commas, or a
                list; None: all. The names are `games.TASK_TYPES`.
            max_turns: turn limit, at least 1; None: that of `gym.make` (`max_episode_steps`).
            house_size: size of generated houses.
            render_mode: `ansi` makes `render()` return the text that a player sees.

        Raises:
            InvalidSettingError: if an argument is invalid.
            DataNotFoundError: if the data or split is missing; the message names the remedy.
        """
        TurnEnv.__init__(self, split, max_turns, render_mode)
        if backend not in BACKENDS:
            raise InvalidSettingError(f"Unknown backend {backend!r}; known: {', '.join(BACKENDS)}.")
        self.backend = backend
        self._games = open_games(data, split, house_size)
        self._set_tasks(self._games.manifest, self._games.types, task_types, self._games.label)
        self._engine: GameEngine | None = None
        self._loaded_id = ""
        """The task that the engine plays."""
        self._state: EngineState | None = None

    def expert(self) -> ScriptedExpert:
        """Return a scripted expert that acts on what the agent sees; one for each episode."""
        return ScriptedExpert()

    @property
    def walkthrough(self) -> tuple[str, ...]:
        """Return a winning sequence of commands for the current task, made with full knowledge.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
        """
        if self._engine is None:
            raise ResetNeeded("call reset() before asking for the walkthrough of its task")
        return self._engine.walkthrough

    def snapshot(self) -> Snapshot:
        """Return the state of the episode, for `restore`; later steps do not change it.

        The random generator that chooses tasks is not part of it.

        Raises:
            gymnasium.error.ResetNeeded: before the first reset.
            InvalidSettingError: with `backend="alfworld"`.
        """
        self._check_native()
        if self._result is None:
            raise ResetNeeded("call reset() before snapshot()")
        assert isinstance(self._engine, NativeEngine)
        added, removed = self._engine.changes()
        return {
            "task_id": self._task_id,
            "turn_index": self._turn_index,
            "action": self._action,
            "text": self._result.text,
            "is_action_valid": self._result.is_action_valid,
            "message": self._result.message,
            "added": added,
            "removed": removed,
        }

    def restore(self, snapshot: Snapshot) -> tuple[TurnObservation, dict[str, Any]]:
        """Continue an episode from a snapshot, as if its actions had been played after a reset.

        A snapshot of another task loads that task. `max_turns` of this environment applies.
        Wrappers are not restored; `TimeLimit`, for example, counts its own turns. Play restored
        episodes through `env.unwrapped`.

        Args:
            snapshot: from `snapshot` of an environment that plays the same data.

        Returns:
            The observation and info of the turn at which the snapshot was taken.

        Raises:
            InvalidSettingError: if it is not a snapshot of this game, or with `backend="alfworld"`.
            TaskNotFoundError: if its task is not among `task_ids`.
        """
        self._check_native()
        _check_snapshot(snapshot)
        task_id = self._check_task(snapshot["task_id"])
        is_loaded = self._engine is not None and task_id == self._loaded_id
        engine = self._engine if is_loaded else self._load(task_id)
        assert isinstance(engine, NativeEngine)
        changes = snapshot["added"], snapshot["removed"]
        self._state = engine.restore(*changes, snapshot["text"])
        self._engine, self._loaded_id = engine, task_id
        result = _result(self._state, snapshot["is_action_valid"], snapshot["message"])
        self._begin(task_id, self._sentence(task_id, engine.start), result)
        self._action, self._turn_index = snapshot["action"], snapshot["turn_index"]
        limit = self.turn_limit
        self._over = result.terminated or (limit is not None and self._turn_index >= limit)
        return self.observation, self._info(result)

    def close(self) -> None:
        """Free the resources of the game; may be called twice."""
        self._close_engine()
        super().close()

    def _open(self, task_id: str) -> tuple[str, TurnResult]:
        if self._engine is None or task_id != self._loaded_id:
            self._close_engine()
            self._engine = self._load(task_id)
            self._loaded_id = task_id
        self._state = self._engine.reset()
        return self._sentence(task_id, self._state), _result(self._state)

    def _play(self, action: str) -> TurnResult:
        assert self._engine is not None
        assert self._state is not None
        admissible = self._state.admissible_commands
        is_action_valid = action.strip() in admissible
        self._state = self._engine.step(action)
        message = "" if is_action_valid else _hint(action, admissible, self._says_move)
        return _result(self._state, is_action_valid, message)

    def _sentence(self, task_id: str, start: EngineState) -> str:
        """Return the task as worded in the first text of the game."""
        _, mark, rest = start.feedback.partition(_TASK_MARK)
        if not mark:
            raise InvalidGameError(
                f"{self._games.describe(task_id)}: the first text does not say {_TASK_MARK!r}."
            )
        return rest.strip()

    def _check_native(self) -> None:
        if self.backend != "native":
            raise InvalidSettingError(
                f"snapshot() and restore() need backend='native', not {self.backend!r}."
            )

    @property
    def _says_move(self) -> bool:
        """Return whether the game's command is `move x to y`, as far as known."""
        assert self._engine is not None
        return self.data in ("official", "generated") or any(
            command.startswith("move ") for command in self._engine.walkthrough
        )

    def _load(self, task_id: str) -> GameEngine:
        game = self._games.game(task_id)
        try:
            if self.backend == "alfworld":
                from atod_gym.envs.alfworld.official import OfficialEngine

                return OfficialEngine(game)
            return NativeEngine(game)
        except (InvalidGameError, UnsupportedGameError) as error:
            name = self._games.describe(task_id)
            if name in str(error):
                raise
            raise type(error)(f"{name}: {error}") from error

    def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()


def _result(state: EngineState, is_action_valid: bool = True, message: str = "") -> TurnResult:
    shown = tuple([command for command in state.admissible_commands if command != "help"])
    score = 1.0 if state.won else 0.0
    return TurnResult(state.feedback, shown, score, state.won, is_action_valid, message)


def _hint(action: str, admissible: Sequence[str], says_move: bool) -> str:
    """Return the spelling of an inadmissible action in this game; empty: not known.

    Args:
        action: as it was given.
        admissible: the commands that are possible now.
        says_move: whether the game's command is `move x to y`, as in ALFWorld 0.4, and not
            `put x in/on y`.
    """
    listed = {command.casefold(): command for command in admissible if command != "help"}
    plain = " ".join(action.casefold().split()).strip(" \"'`.")
    spellings = [plain]
    if match := _PUT.fullmatch(plain):
        spellings += ["move {} to {}".format(*match.groups())]
        spellings += ["put {} in/on {}".format(*match.groups())]
    meant = next((listed[spelling] for spelling in spellings if spelling in listed), None)
    if meant:
        return f"Write the action as it is listed: {meant}"
    if match and says_move and plain.startswith("put "):
        thing, place = match.groups()
        return (
            f"Here the action is called: move {thing} to {place}. It is possible at {place} with "
            f"{thing} in hand."
        )
    return ""


def _check_snapshot(snapshot: object) -> None:
    """Raise InvalidSettingError for an object that is not a `Snapshot`."""
    if not isinstance(snapshot, Mapping) or snapshot.keys() != _KINDS.keys():
        found = list(snapshot) if isinstance(snapshot, Mapping) else snapshot
        raise InvalidSettingError(
            "restore() takes what snapshot() returned, a mapping with the keys "
            f"{', '.join(_KINDS)}, not {str(found)[:200]!r}."
        )
    wrong = [key for key, kind in _KINDS.items() if type(snapshot[key]) is not kind]
    if not wrong and snapshot["turn_index"] < 0:
        wrong = ["turn_index"]
    if not wrong:
        wrong = [key for key in ("added", "removed") if not all(map(_is_fact, snapshot[key]))]
    if wrong:
        value = str(snapshot[wrong[0]])[:80]
        raise InvalidSettingError(
            f"No snapshot() has {value!r} as {wrong[0]}; the episode is unchanged."
        )


def _is_fact(fact: object) -> bool:
    is_list = isinstance(fact, list | tuple) and len(fact) > 0
    return is_list and all(isinstance(text, str) for text in fact)  # type: ignore[attr-defined]
