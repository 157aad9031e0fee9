"""What an ALFWorld engine is: the contract that the native and the official backend share."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class EngineState(NamedTuple):
    """What an engine says after a reset or a command."""

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
        """Starts the game anew."""

    def step(self, command: str) -> EngineState:
        """Executes a command; one that is not admissible gives `Nothing happens.`."""

    def close(self) -> None:
        """Frees what the game holds; may be called twice."""
