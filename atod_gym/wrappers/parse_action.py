"""Turns a model's completion into the action that the environment executes."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import ParseProfile, check_profile, parse_completion
from atod_gym.spaces import UnicodeText


class ParseAction(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Its `step` takes a completion; `info["parse_error"]` says why one did not parse.

    A completion that does not parse is no error: what `parse_completion` finds, possibly an empty
    action, is executed, and the turn is spent.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, str],
        profile: ParseProfile = "tags",
        last_characters: int = 30,
    ) -> None:
        """See `parse_completion` for the arguments.

        Raises:
            InvalidSettingError: for an unknown profile or a negative number of characters.
        """
        RecordConstructorArgs.__init__(self, profile=profile, last_characters=last_characters)
        gymnasium.Wrapper.__init__(self, env)
        check_profile(profile)
        if last_characters < 0:
            raise InvalidSettingError(f"last_characters must be >= 0, not {last_characters}.")
        self.profile = profile
        self.last_characters = last_characters
        self.action_space = UnicodeText()

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Parses the completion, executes its action and reports how the parsing went.

        Raises:
            TypeError: if the completion is not a `str`.
        """
        if not isinstance(action, str):
            raise TypeError(f"a completion is a str, not {type(action).__name__}")
        parsed = parse_completion(
            action, profile=self.profile, last_characters=self.last_characters
        )
        observation, reward, terminated, truncated, info = self.env.step(parsed.action)
        return (
            observation,
            reward,
            terminated,
            truncated,
            {**info, "action": parsed.action, "parse_error": parsed.error},
        )
