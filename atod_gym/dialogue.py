"""The dialogue between one environment and a language model: prompts out, completions in.

It contains no environment, so that a vector environment can have one for each of its episodes:

    messages = dialogue.reset(observation, info)
    parsed = dialogue.parse(completion)
    observation, reward, terminated, truncated, info = env.step(parsed.action)
    messages = dialogue.step(completion, parsed, observation, info)

The Gymnasium wrappers of `atod_gym.wrappers` use the same parts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from typing import Any, cast

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import CompletionFormat, ParseProfile
from atod_gym.prompts import (
    CHAT_TEMPLATE,
    PROMPT_STYLES,
    WINDOW_TEMPLATE,
    PromptStyle,
    PromptTemplate,
    load_template,
    render_prompt,
    reply_format,
    turn_hint,
)
from atod_gym.types import HistoryObservation, ParsedAction, TurnObservation, TurnRecord

Prompt = tuple[dict[str, str], ...]
"""Messages: dicts of `role` and `content`."""


class TurnHistory:
    """The last `window` turns of an episode; 0 keeps none.

    Raises:
        InvalidSettingError: the window is negative.
    """

    def __init__(self, window: int) -> None:
        if window < 0:
            raise InvalidSettingError(f"A history window must be >= 0, not {window}.")
        self._turns: deque[TurnRecord] = deque(maxlen=window)
        self._text = ""

    def extend(self, observation: TurnObservation, action: str | None) -> HistoryObservation:
        """Add `history` to an observation that followed an action (None: a reset)."""
        if action is None:
            self._turns.clear()
        else:
            self._turns.append({"text": self._text, "action": action})
        self._text = observation["text"]
        # New records each time, since callers may keep them.
        return {**observation, "history": tuple(turn.copy() for turn in self._turns)}


class AgentDialogue:
    """The messages of one episode, and the actions in its completions.

    Args:
        metadata: of the environment; may name its action tags.
        profile: how completions are written, see `atod_gym.parsing`.
        style: `chat`: the whole dialogue so far; `window`: one message, rebuilt every turn.
        history_window: past turns that the window style shows. An observation that has a `history`
            already, such as that of the `History` wrapper, is shown as it is.
        template: path of a template file or a template, see `atod_gym.prompts`; None: the
            style's own.
        show_admissible: whether prompts list the admissible actions.

    Attributes:
        completion_format: reads and writes completions.

    Raises:
        InvalidSettingError: a setting is unknown or the template cannot be used.
    """

    def __init__(
        self,
        metadata: Mapping[str, Any],
        *,
        profile: ParseProfile = "tags",
        style: PromptStyle = "chat",
        history_window: int = 2,
        template: str | os.PathLike[str] | PromptTemplate | None = None,
        show_admissible: bool = True,
    ) -> None:
        if style not in PROMPT_STYLES:
            raise InvalidSettingError(
                f"Unknown prompt style {style!r}; known: {', '.join(PROMPT_STYLES)}."
            )
        self.completion_format = CompletionFormat.of(metadata, profile)
        self.style = style
        self.show_admissible = show_admissible
        # Prompts of published runs, and of models with the environment's vocabulary only, stay
        # unchanged. A user's template decides with its placeholder {hint}.
        self._shows_hints = template is not None or profile in ("tags", "react")
        default = CHAT_TEMPLATE if style == "chat" else WINDOW_TEMPLATE
        chosen = default if template is None else template
        self.template = chosen if isinstance(chosen, PromptTemplate) else load_template(chosen)
        self._history = TurnHistory(history_window if style == "window" else 0)
        self._messages: list[dict[str, str]] = []
        self._observation: Mapping[str, Any] = {}
        self._hint = ""

    def parse(self, completion: str) -> ParsedAction:
        """Find the action in a completion, see `CompletionFormat.parse`."""
        return self.completion_format.parse(completion)

    def format(self, action: str) -> str:
        """Write an action as a completion, see `CompletionFormat.format`."""
        return self.completion_format.format(action)

    def reset(self, observation: TurnObservation, info: Mapping[str, Any]) -> Prompt:
        """Begin an episode; return its first prompt."""
        del info
        self._messages.clear()
        self._hint = ""
        return self._prompt(observation, None)

    def step(
        self,
        completion: str,
        parsed: ParsedAction,
        observation: TurnObservation,
        info: Mapping[str, Any],
    ) -> Prompt:
        """Add a turn; return the next prompt.

        Args:
            completion: the model's text; the chat style keeps it unchanged.
            parsed: its action, which was executed.
            observation: of the environment's step.
            info: of the same step; the prompt says why the turn did nothing, see `turn_hint`.
        """
        form = self.completion_format
        if self._shows_hints:
            has_format = "{reply_format}" in self.template.later
            reply = "" if has_format else reply_format(form.profile, form.tags)
            # With the profile compat, an action that does not parse is executed, too.
            error = "" if form.profile == "compat" else parsed.error
            self._hint = turn_hint(observation, {**info, "parse_error": error}, reply)
        self._messages.append({"role": "assistant", "content": completion})
        return self._prompt(observation, parsed.action)

    @property
    def prompt(self) -> Prompt:
        """The current prompt."""
        return tuple(message.copy() for message in self._messages)

    @property
    def past_turns(self) -> int:
        """The number of past turns that the current prompt shows."""
        return len(self._observation.get("history", ()))

    def shortened(self, left_out: int) -> Prompt:
        """Render the current prompt of the window style without its oldest past turns.

        Args:
            left_out: number of the `past_turns` to leave out; where the template shows history,
                a line reports their number.

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
        return (self._user_message(left_out),)

    def _prompt(self, observation: TurnObservation, action: str | None) -> Prompt:
        extended = self._history.extend(observation, action)
        self._observation = observation if "history" in observation else extended
        if self.style == "window":
            self._messages.clear()
        self._messages.append(self._user_message())
        return self.prompt

    def _user_message(self, left_out: int = 0) -> dict[str, str]:
        content = render_prompt(
            cast("HistoryObservation", self._observation),
            template=self.template,
            profile=self.completion_format.profile,
            show_admissible=self.show_admissible,
            tags=self.completion_format.tags,
            left_out=left_out,
            hint=self._hint,
        )
        return {"role": "user", "content": content}
