"""Keeps the turns of the current episode."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from atod_gym.wrappers.history import turn_structured


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """One turn as it was played."""

    text: str
    """What the environment had said before the action."""
    action: str
    """What was executed."""
    reward: float
    info: dict[str, Any]
    """The info that the action brought."""


class RecordTurns(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """`turns` holds the episode so far; a reset empties it."""

    def __init__(self, env: gymnasium.Env[Any, str]) -> None:
        """Raises `InvalidSettingError` if the observation has no `text`."""
        RecordConstructorArgs.__init__(self)
        gymnasium.Wrapper.__init__(self, env)
        turn_structured(env, "RecordTurns")
        self._turns: list[RecordedTurn] = []
        self._text = ""

    @property
    def turns(self) -> tuple[RecordedTurn, ...]:
        """The turns since the last reset, oldest first."""
        return tuple(self._turns)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode and forgets the last one."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._turns = []
        self._text = observation["text"]
        return observation, info

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Executes an action and records the turn."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        executed = info.get("action", action)
        self._turns.append(RecordedTurn(self._text, executed, float(reward), dict(info)))
        self._text = observation["text"]
        return observation, reward, terminated, truncated, info
