"""Turns observations into the messages that a chat model reads."""

from __future__ import annotations

import os
from typing import Any

import gymnasium
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import ParseProfile, action_tags, check_profile
from atod_gym.prompts import (
    CHAT_TEMPLATE,
    PROMPT_STYLES,
    WINDOW_TEMPLATE,
    PromptStyle,
    load_template,
    render_prompt,
)
from atod_gym.spaces import UnicodeText
from atod_gym.types import TurnObservation
from atod_gym.wrappers.history import turn_structured


class ChatPrompt(gymnasium.Wrapper[Any, str, Any, str], RecordConstructorArgs):
    """The observation becomes a tuple of messages, dicts of `role` and `content`.

    In window style it is one user message, rebuilt every turn. In chat style it is the dialogue so
    far: the messages of the last turn, the completion as the assistant's message, and one new user
    message, so that every prompt extends the one before. It belongs outside `ParseAction`: the
    dialogue holds completions as they were, while the environment gets the actions in them.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, str],
        style: PromptStyle = "window",
        template: str | os.PathLike[str] | None = None,
        profile: ParseProfile = "tags",
        show_admissible: bool = True,
    ) -> None:
        """Chooses what prompts look like.

        Args:
            env: an environment with turn-structured observations, with or without `History`.
            style: `window` or `chat`.
            template: path of a template file, see `atod_gym.prompts`; None: the style's own.
            profile: how replies are to be written; that of `ParseAction`.
            show_admissible: whether prompts list the admissible actions.

        Raises:
            InvalidSettingError: if a setting is unknown or the template cannot be used.
        """
        path = None if template is None else os.fspath(template)
        RecordConstructorArgs.__init__(
            self, style=style, template=path, profile=profile, show_admissible=show_admissible
        )
        gymnasium.Wrapper.__init__(self, env)
        if style not in PROMPT_STYLES:
            raise InvalidSettingError(
                f"Unknown prompt style {style!r}; known: {', '.join(PROMPT_STYLES)}."
            )
        check_profile(profile)
        turn_structured(env, "ChatPrompt")
        default = CHAT_TEMPLATE if style == "chat" else WINDOW_TEMPLATE
        self.template = default if path is None else load_template(path)
        self.style = style
        self.profile = profile
        self.show_admissible = show_admissible
        self.tags = action_tags(env.unwrapped.metadata)
        message = spaces.Dict({"role": UnicodeText(), "content": UnicodeText()})
        self.observation_space = spaces.Sequence(message)
        self._dialogue: list[tuple[str, str]] = []
        self._observation: Any = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode with a new dialogue."""
        observation, info = self.env.reset(seed=seed, options=options)
        self._dialogue = []
        return self._messages(observation), info

    def step(self, action: str) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Passes a completion on and answers with the next prompt."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._dialogue.append(("assistant", action))
        return self._messages(observation), reward, terminated, truncated, info

    @property
    def past_turns(self) -> int:
        """How many past turns the current prompt shows; they come from `History`."""
        return len(self._observation.get("history", ()))

    def shortened(self, left_out: int) -> tuple[dict[str, str], ...]:
        """The current prompt in window style, without its oldest past turns.

        Args:
            left_out: how many of the `past_turns` to leave out; where the template shows history,
                a line says how many.

        Raises:
            InvalidSettingError: in chat style, where the dialogue only grows; for a number that is
                negative or more than `past_turns`.
        """
        if self.style != "window":
            raise InvalidSettingError("Only prompts of the window style can be shortened.")
        if not 0 <= left_out <= self.past_turns:
            raise InvalidSettingError(
                f"{left_out} turns cannot be left out of a prompt with {self.past_turns}."
            )
        return ({"role": "user", "content": self._render(left_out)},)

    def _render(self, left_out: int = 0) -> str:
        return render_prompt(
            self._observation,
            template=self.template,
            profile=self.profile,
            show_admissible=self.show_admissible,
            tags=self.tags,
            left_out=left_out,
        )

    def _messages(self, observation: TurnObservation) -> tuple[dict[str, str], ...]:
        self._observation = observation
        content = self._render()
        if self.style == "window":
            self._dialogue.clear()
        self._dialogue.append(("user", content))
        return tuple({"role": role, "content": content} for role, content in self._dialogue)
