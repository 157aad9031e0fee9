"""Render an observation as the user message of a turn, with a template.

A template is a text with placeholders in braces, filled in as `str.format` does:

| placeholder | value |
|---|---|
| `{instruction}` | the task in one sentence |
| `{text}` | the environment's text of this turn |
| `{admissible_actions}` | one possible action per line |
| `{history}` | the displayed past turns, two lines each |
| `{history_length}` | the number of these turns |
| `{turn_number}` | number of this turn, counted from 1 |
| `{reply_format}` | how to write the reply, for the parse profile and the environment |
| `{hint}` | why the last turn had no effect, see `turn_hint` |

A paragraph (separated by blank lines) whose placeholders are all empty is left out, so that
a heading disappears with its list. The default templates show hints with the parse profiles `tags`
and `react` only. A template file may hold two templates, for the first turn and for later ones,
with a line `---` between them.
"""

from __future__ import annotations

import os
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from atod_gym.errors import InvalidSettingError
from atod_gym.parsing import ACTION_TAGS, ParseProfile
from atod_gym.types import TurnObservation

PromptStyle = Literal["window", "chat"]
PROMPT_STYLES: tuple[PromptStyle, ...] = get_args(PromptStyle)

PLACEHOLDERS = (
    "instruction", "text", "admissible_actions", "history", "history_length", "turn_number",
    "reply_format", "hint",
)  # fmt: skip

_LONGEST_MESSAGE = 500
"""Limit for an environment's message in a prompt: it may repeat a model's own long action."""

_BRACES = "Write {{ and }} for literal braces."


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The template of the first turn and that of later turns.

    Raises:
        InvalidSettingError: an unknown placeholder, a stray brace, or a part that cannot show the
            turn: `later` needs `{text}`, `first` needs it or `{instruction}`.
    """

    first: str
    later: str

    def __post_init__(self) -> None:
        for part, needed in ((self.first, {"text", "instruction"}), (self.later, {"text"})):
            if not needed & {
                name for paragraph in part.split("\n\n") for name in _names(paragraph)
            }:
                raise InvalidSettingError(
                    "A prompt template needs {text} for later turns, and {text} or {instruction} "
                    "for the first turn. A line of --- separates two parts; a single part serves "
                    "both."
                )

    def fill(self, values: Mapping[str, str], is_first: bool) -> str:
        """Fill in one of the two templates; leave out paragraphs whose values are all empty."""
        filled = []
        for paragraph in (self.first if is_first else self.later).split("\n\n"):
            names = _names(paragraph)
            if not names or any(values[name] for name in names):
                filled.append(paragraph.format_map(values))
        return "\n\n".join(filled)


def _names(paragraph: str) -> list[str]:
    """Return the placeholders of a paragraph; raise `InvalidSettingError` for others."""
    try:
        fields = list(string.Formatter().parse(paragraph))
    except ValueError as error:
        raise InvalidSettingError(
            f"The prompt template has a stray brace ({error}). {_BRACES}"
        ) from error
    names = []
    for _, name, spec, conv in fields:
        shown = f"{name}{f'!{conv}' if conv else ''}{f':{spec}' if spec else ''}"
        if name is not None and shown not in PLACEHOLDERS:
            raise InvalidSettingError(
                f"Unknown placeholder {{{shown}}} in a prompt template; known: "
                f"{', '.join(f'{{{known}}}' for known in PLACEHOLDERS)}. {_BRACES}"
            )
        if name is not None:
            names.append(name)
    return names


_HEAD = "Your task: {instruction}\n\n"
_ACTIONS = "You can do one of these now:\n{admissible_actions}"

WINDOW_TEMPLATE = PromptTemplate(
    first=f"{_HEAD}This is turn 1. You observe:\n{{text}}\n\n{_ACTIONS}\n\n{{reply_format}}",
    later=(
        f"{_HEAD}This is turn {{turn_number}}.\n\n"
        "What happened in the turns before it (the last {history_length}):\n{history}\n\n"
        f"You observe now:\n{{text}}\n\n{{hint}}\n\n{_ACTIONS}\n\n{{reply_format}}"
    ),
)
"""Default of the window style: every message is self-contained."""

CHAT_TEMPLATE = PromptTemplate(
    first=f"{_HEAD}{{text}}\n\n{_ACTIONS}\n\n{{reply_format}}",
    later=f"{{text}}\n\n{{hint}}\n\n{_ACTIONS}",
)
"""Default of the chat style: later messages add to the dialogue before them."""


def load_template(path: str | os.PathLike[str]) -> PromptTemplate:
    """Read a template file; without a line `---` the one template serves all turns.

    Raises:
        InvalidSettingError: the file cannot be read or has more than two parts; see also
            `PromptTemplate`.
    """
    name = os.fspath(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidSettingError(f"Cannot read the prompt template {name}: {error}.") from error
    parts = re.split(r"^[^\S\n]*---[^\S\n]*$", "\n".join(lines), flags=re.MULTILINE)
    if len(parts) > 2:
        raise InvalidSettingError(
            f"The prompt template {name} has {len(parts)} parts; at most two, for the first and "
            "for later turns, can be separated by a line of ---."
        )
    try:
        return PromptTemplate(parts[0].strip("\n"), parts[-1].strip("\n"))
    except InvalidSettingError as error:
        raise InvalidSettingError(f"{name}: {error}") from error


def reply_format(profile: ParseProfile, tags: Sequence[str] = ACTION_TAGS) -> str:
    """Return the value of `{reply_format}`: instructions for a completion that parses."""
    only_action = tuple(tags) == ACTION_TAGS
    forms = " or ".join(f"{tag}[..]" for tag in tags)
    if profile == "plain":
        return f"Reply with the next action alone{'' if only_action else f': {forms}'}."
    if profile == "react":
        return (
            "Think about what to do next. Then write exactly one action. Reply in two lines:\n"
            f"Thought: your thought\nAction: {'the action' if only_action else forms}"
        )
    one = "action inside <action> and </action>"
    if not only_action:
        one = f"of {' or '.join(f'<{tag}>..</{tag}>' for tag in tags)}"
    return f"Think about what to do next inside <think> and </think>. Then write exactly one {one}."


def turn_hint(observation: TurnObservation, info: Mapping[str, Any], reply: str = "") -> str:
    """Return why a turn had no effect, in one or two sentences; empty if it had one.

    Args:
        observation: of the turn; a message that its text contains is not repeated.
        info: of the turn; its `parse_error`, else the environment's `message`.
        reply: instructions for completions; follows a parse error.
    """
    if info.get("parse_error"):
        return f"Your reply was not used: {info['parse_error']}. {reply}".rstrip()
    message = str(info.get("message", ""))
    if message in observation["text"]:
        return ""
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]} .."


def shown_text(observation: TurnObservation, info: Mapping[str, Any]) -> str:
    """Join the text and the hint of a turn, for agents without a prompt."""
    hint = turn_hint(observation, info)
    return "\n\n".join(part for part in (observation["text"], hint) if part)


def left_out_note(turns: int) -> str:
    """Return the line that replaces the oldest turns if they do not fit a prompt."""
    return f"[{turns} earlier turn{'s' if turns > 1 else ''} left out]"


def render_prompt(
    observation: TurnObservation,
    *,
    template: PromptTemplate,
    profile: ParseProfile,
    show_admissible: bool = True,
    tags: Sequence[str] = ACTION_TAGS,
    left_out: int = 0,
    hint: str = "",
) -> str:
    """Return the user message for an observation.

    Args:
        observation: with or without history; its text may hold braces and anything else.
        template: `first` is used when `turn_index` is 0.
        profile: chooses the text of `{reply_format}`.
        show_admissible: False leaves `{admissible_actions}` empty.
        tags: those of the environment's actions, for `{reply_format}`.
        left_out: number of the oldest past turns to leave out; `{history}` reports it.
        hint: why the last turn had no effect; `{history}` has no hints.
    """
    turn_index = int(observation["turn_index"])
    history = observation.get("history", ())  # of a HistoryObservation
    assert isinstance(history, tuple)
    history = history[left_out:]
    admissible = observation["admissible_actions"] if show_admissible else ()
    lines = [left_out_note(left_out)] if left_out else []
    for number, turn in enumerate(history, turn_index - len(history) + 1):
        lines.append(f"[turn {number}] you observed: {turn['text']}")
        lines.append(f"[turn {number}] you did: {turn['action']}")
    values = {
        "instruction": observation["instruction"],
        "text": observation["text"],
        "admissible_actions": "\n".join(admissible),
        "history": "\n".join(lines),
        "history_length": str(len(history)) if lines else "",
        "turn_number": str(turn_index + 1),
        "reply_format": reply_format(profile, tags),
        "hint": hint,
    }
    return template.fill(values, is_first=turn_index == 0)
