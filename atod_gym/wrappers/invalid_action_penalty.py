"""Subtracts a penalty from the reward of turns whose action is not valid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from atod_gym.errors import InvalidSettingError

Validity = Literal["strict", "format", "either"]


def is_penalized(info: Mapping[str, Any], validity: Validity) -> bool:
    """Whether a turn costs something, by the `info` that it ended with.

    Args:
        info: of `ParseAction`, with `parse_error` and `is_action_valid`.
        validity: `strict`: the action was not admissible; `format`: the completion did not parse
            (as in published ALFWorld runs); `either`: one of the two.
    """
    is_malformed = validity != "strict" and bool(info["parse_error"])
    return is_malformed or (validity != "format" and not info["is_action_valid"])


class InvalidActionPenalty(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Belongs outside `ParseAction`, which reports the format; `info` keeps the bare figures."""

    def __init__(
        self, env: gymnasium.Env[Any, str], penalty: float, validity: Validity = "strict"
    ) -> None:
        """Sets what an invalid turn costs and what makes a turn invalid.

        Args:
            env: the environment.
            penalty: subtracted from the turn's reward, >= 0.
            validity: see `is_penalized`.

        Raises:
            InvalidSettingError: for a negative penalty or an unknown validity.
        """
        RecordConstructorArgs.__init__(self, penalty=penalty, validity=validity)
        gymnasium.Wrapper.__init__(self, env)
        if not penalty >= 0:
            raise InvalidSettingError(f"A penalty is >= 0, not {penalty}.")
        if validity not in get_args(Validity):
            raise InvalidSettingError(
                f"Unknown validity {validity!r}; known: {', '.join(get_args(Validity))}."
            )
        self.penalty = penalty
        self.validity = validity

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Executes an action; the reward is lower if it is not valid."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        penalty = self.penalty if is_penalized(info, self.validity) else 0.0
        return observation, float(reward) - penalty, terminated, truncated, info
