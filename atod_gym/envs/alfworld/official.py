"""The official engine as a backend: TextWorld's PDDL environment under ALFWorld's name demangler.

Needs the extra `alfworld`. The native engine, whose answers are tested against it, is thousands of
times as fast.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import warnings
from collections.abc import Mapping
from typing import Any

from atod_gym.envs.alfworld.engine import EngineState, read_game, read_walkthrough
from atod_gym.errors import InvalidGameError, MissingExtraError, UnsupportedGameError

# Names of the same action in the grammars of data for alfworld <= 0.3 and >= 0.4.
_OLD_PUT = "put {o} in/on {r}"
_NEW_PUT = "move {o} to {r}"

_one_at_a_time = threading.RLock()
"""Fast Downward, its translator and the filters of warnings belong to the whole process."""


class OfficialEngine:
    """`GameEngine` on `textworld.envs.PddlEnv`; only one of a process runs at a time."""

    def __init__(self, game: Mapping[str, object] | str | os.PathLike[str]) -> None:
        """Load a game: its content, or the path of its file.

        Raises:
            MissingExtraError: if alfworld or textworld is not installed.
            UnsupportedGameError: if the data and the installed alfworld are of different versions.
            InvalidGameError: if the game cannot be read, or the official engine refuses it.
        """
        with _one_at_a_time:
            pddl_env, demangler, infos = _official_classes()
        content = read_game(game)
        _check_versions(content["grammar"], importlib.metadata.version("alfworld"))
        self.walkthrough = read_walkthrough(content)
        self._env: Any = self._call(
            lambda: demangler(pddl_env(infos(won=True, admissible_commands=True)))
        )
        self._call(self._env.load, content)

    def reset(self) -> EngineState:
        """Restart the game."""
        return self._engine_state(self._call(self._env.reset))

    def step(self, command: str) -> EngineState:
        """Execute a command; an inadmissible one gives `Nothing happens.`."""
        return self._engine_state(self._call(self._env.step, command)[0])

    def close(self) -> None:
        """Free the resources of the game; may be called twice.

        Its copy of Fast Downward stays loaded: unloading it crashed the interpreter at exit.
        """
        self._env = None

    @staticmethod
    def _engine_state(state: Any) -> EngineState:
        commands = tuple(state["admissible_commands"])
        return EngineState(state["feedback"], commands, bool(state["won"]))

    @staticmethod
    def _call(function: Any, *arguments: object) -> Any:
        """Call the official engine without its warnings; convert failures to InvalidGameError."""
        with _one_at_a_time, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return function(*arguments)
            # The translator raises SystemExit for PDDL that it does not support.
            except (Exception, SystemExit) as error:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise InvalidGameError(f"The official engine refuses the game: {reason}") from error


def _official_classes() -> tuple[Any, Any, Any]:
    """Import PddlEnv, AlfredDemangler and EnvInfos without their warnings."""
    # alfworld sets its own variable on import; worker processes must not inherit it.
    configured = os.environ.get("ALFWORLD_DATA")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
            from textworld import EnvInfos
            from textworld.envs.pddl import PddlEnv
    except ImportError as error:
        raise MissingExtraError(
            f'backend="alfworld" needs packages that are not installed ({error}): '
            'pip install "atod-gym[alfworld]". backend="native" needs none.'
        ) from error
    finally:
        if configured is None:
            os.environ.pop("ALFWORLD_DATA", None)
    return PddlEnv, AlfredDemangler, EnvInfos


def _check_versions(grammar: str, installed: str) -> None:
    """Raise UnsupportedGameError if data and installed alfworld are of different versions."""
    major, minor = (int(part) for part in installed.split(".")[:2])
    is_new_package = (major, minor) >= (0, 4)
    if _OLD_PUT in grammar and is_new_package:
        found, wanted, says = "<= 0.3", ">= 0.4", "put X in/on Y"
    elif _NEW_PUT in grammar and not is_new_package:
        found, wanted, says = ">= 0.4", "<= 0.3", "move X to Y"
    else:
        return
    raise UnsupportedGameError(
        f'This game was made for alfworld {found} (it says "{says}"), but alfworld {installed} is '
        f"installed, which needs data for {wanted}. Use "
        'backend="native", which follows the file, or get matching data with '
        "alfworld-download --force."
    )
