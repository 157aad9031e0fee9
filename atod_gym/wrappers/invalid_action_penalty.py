"""Subtract a penalty from the reward of turns with an invalid action."""

from __future__ import annotations

from typing import Any, Literal, get_args

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from atod_gym.errors import InvalidSettingError

Validity = Literal["strict", "format", "either"]


class InvalidActionPenalty(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Subtract a penalty from the reward of invalid turns; `info` stays as it is.

    Args:
        env: for `format` and `either` with `ParseAction`, which reports whether completions parse.
        penalty: subtracted from the turn's reward, >= 0.
        validity: which turns are invalid. `strict`: the action was not admissible; `format`: the
            completion did not parse (as in published ALFWorld runs); `either`: one of the two.

    Raises:
        InvalidSettingError: a negative penalty, an unknown validity, or no `ParseAction` for it.
    """

    def __init__(
        self, env: gymnasium.Env[Any, str], penalty: float, validity: Validity = "strict"
    ) -> None:
        RecordConstructorArgs.__init__(self, penalty=penalty, validity=validity)
        gymnasium.Wrapper.__init__(self, env)
        if not penalty >= 0:
            raise InvalidSettingError(f"The penalty must be >= 0, not {penalty}.")
        if validity not in get_args(Validity):
            raise InvalidSettingError(
                f"Unknown validity {validity!r}; known: {', '.join(get_args(Validity))}."
            )
        if validity != "strict" and not env.has_wrapper_attr("completion_format"):
            raise InvalidSettingError(
                f"validity={validity!r} needs ParseAction inside; apply the penalty outside it, or "
                "outside agent_env."
            )
        self.penalty = penalty
        self.validity = validity

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Execute an action; subtract the penalty from the reward if it is invalid."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        reward = float(reward)
        is_malformed = self.validity != "strict" and info["parse_error"]
        if is_malformed or (self.validity != "format" and not info["is_action_valid"]):
            reward -= self.penalty
        return observation, reward, terminated, truncated, info
