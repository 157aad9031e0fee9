"""ALFWorld engines: the interface that both backends share, and the game files they play."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from atod_gym.errors import InvalidGameError

NOTHING_HAPPENS = "Nothing happens."
"""The feedback to a command that is not admissible."""

_TEXT_KEYS = ("pddl_domain", "grammar", "pddl_problem")


class EngineState(NamedTuple):
    """The result of a reset or a command."""

    feedback: str
    """The text shown to the player, byte for byte as the official engine writes it."""
    admissible_commands: tuple[str, ...]
    """Sorted, without duplicates; contains `help`, which is not shown to agents."""
    won: bool


class GameEngine(Protocol):
    """One game being played; not thread-safe."""

    walkthrough: tuple[str, ...]
    """A winning command sequence made with full knowledge; empty if the file has none."""

    def reset(self) -> EngineState:
        """Restart the game."""

    def step(self, command: str) -> EngineState:
        """Execute a command; one that is not admissible gives `Nothing happens.`."""

    def close(self) -> None:
        """Free the resources of the game; may be called twice."""


def read_game(game: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return the content of a game, after a check that it has the texts that an engine needs.

    Args:
        game: the path of a game file, or its content.

    Raises:
        InvalidGameError: the file and the reason are in the message.
    """
    name = "The game"
    content: object = game
    if not isinstance(game, Mapping):
        name = f"The game file {os.fspath(game)}"
        try:
            content = json.loads(Path(game).read_bytes())
        except OSError as error:
            raise InvalidGameError(
                f"Cannot read the game file {os.fspath(game)}: {error.strerror or error}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidGameError(f"{name} is not JSON: {error}.") from error
    if not isinstance(content, Mapping):
        raise InvalidGameError(f"{name} must be a JSON object.")
    wrong = [key for key in _TEXT_KEYS if not isinstance(content.get(key), str)]
    if wrong:
        raise InvalidGameError(f"{name} has no text under {', '.join(wrong)}.")
    return content


def read_walkthrough(game: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the walkthrough in the content of a game; empty if it has no list of commands."""
    commands = game.get("walkthrough")
    return tuple(map(str, commands)) if isinstance(commands, list | tuple) else ()
