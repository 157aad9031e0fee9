"""Turns a model's completion into the action that the environment executes."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.utils import RecordConstructorArgs

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import (
    LAST_CHARACTERS,
    ParseProfile,
    action_tags,
    check_profile,
    format_action,
    parse_completion,
)
from atod_gym.spaces import UnicodeText
from atod_gym.types import ParsedAction


class ParseAction(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """Its `step` takes a completion; `info["parse_error"]` says why one did not parse.

    A completion that does not parse is no error: what `parse_completion` finds, possibly an empty
    action, is executed, and the turn is spent. Which tags mark an action the environment says in
    its `metadata`.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, str],
        profile: ParseProfile = "tags",
        last_characters: int | None = None,
    ) -> None:
        """See `parse_completion` for the arguments.

        Args:
            env: the environment.
            profile: how completions are parsed.
            last_characters: None: what published runs had, which the environment names in its
                `metadata` if it is not 30.

        Raises:
            InvalidSettingError: for an unknown profile or a negative number of characters.
        """
        RecordConstructorArgs.__init__(self, profile=profile, last_characters=last_characters)
        gymnasium.Wrapper.__init__(self, env)
        check_profile(profile)
        if last_characters is None:
            last_characters = int(env.unwrapped.metadata.get("last_characters", LAST_CHARACTERS))
        if last_characters < 0:
            raise InvalidSettingError(f"last_characters must be >= 0, not {last_characters}.")
        self.profile = profile
        self.last_characters = last_characters
        self.tags = action_tags(env.unwrapped.metadata)
        self.action_space = UnicodeText()

    def parse(self, completion: str) -> ParsedAction:
        """What `step` finds in a completion, without playing it.

        Raises:
            TypeError: if the completion is not a `str`.
        """
        if not isinstance(completion, str):
            raise TypeError(f"a completion is a str, not {type(completion).__name__}")
        return parse_completion(
            completion,
            profile=self.profile,
            tags=self.tags,
            last_characters=self.last_characters,
        )

    def format(self, action: str) -> str:
        """The shortest completion that `step` reads as this action; the inverse of `parse`.

        Raises:
            InvalidSettingError: if the environment's tags cannot hold the action.
        """
        return format_action(action, self.profile, self.tags)

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Parses the completion, executes its action and reports how the parsing went.

        Raises:
            TypeError: if the completion is not a `str`.
        """
        parsed = self.parse(action)
        observation, reward, terminated, truncated, info = self.env.step(parsed.action)
        return (
            observation,
            reward,
            terminated,
            truncated,
            {**info, "action": parsed.action, "parse_error": parsed.error},
        )
