"""From a model's completion to an action: three profiles of what a completion looks like.

| profile | a valid completion | executed when it is not valid |
|---|---|---|
| `plain` | the action itself, white space around it aside | nothing (an empty action) |
| `tags` | one `<action>..</action>`, optionally after `<think>..</think>` | nothing |
| `compat` | as published runs had it, see `_parse_compat` | what published runs executed |
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from atod_gym.errors import InvalidSettingError
from atod_gym.types import ParsedAction

ParseProfile = Literal["plain", "tags", "compat"]
PARSE_PROFILES: tuple[ParseProfile, ...] = get_args(ParseProfile)

LAST_CHARACTERS = 30
"""How much of a completion without tags counts as the action, in published ALFWorld runs."""

_CJK = re.compile("[\u4e00-\u9fff]")
_OPEN, _CLOSE = "<action>", "</action>"
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"


def parse_completion(
    text: str, *, profile: ParseProfile = "tags", last_characters: int = LAST_CHARACTERS
) -> ParsedAction:
    """Finds the action in a completion; any text gives a result.

    Args:
        text: the completion, without special tokens.
        profile: see the table of this module.
        last_characters: `compat` only: how much of the end counts as the action when there is no
            action block (30 for ALFWorld, 20 for WebShop in published runs).

    Raises:
        InvalidSettingError: for an unknown profile or a negative number of characters.
    """
    check_profile(profile)
    if last_characters < 0:
        raise InvalidSettingError(f"last_characters must be >= 0, not {last_characters}.")
    if profile == "plain":
        action = text.strip()
        return _parsed(action, "", "" if action else "the completion is empty")
    if profile == "tags":
        return _parse_tags(text)
    return _parse_compat(text, last_characters)


def format_action(action: str, profile: ParseProfile) -> str:
    """The shortest completion that `parse_completion` reads as this action."""
    check_profile(profile)
    return action if profile == "plain" else f"<think></think><action>{action}</action>"


def check_profile(profile: str) -> None:
    """Raises `InvalidSettingError` unless the profile is known."""
    if profile not in PARSE_PROFILES:
        raise InvalidSettingError(
            f"Unknown parse profile {profile!r}; known: {', '.join(PARSE_PROFILES)}."
        )


def _parse_tags(text: str) -> ParsedAction:
    """Looks for the one action block behind the thought; a tag inside the thought is a thought."""
    before, mark, answer = text.rpartition(_THINK_CLOSE)
    thought = before.partition(_THINK_OPEN)[2].strip() if _THINK_OPEN in before else before.strip()
    if not mark:
        thought, answer = "", text
        if _THINK_OPEN in text:
            return _parsed("", text.partition(_THINK_OPEN)[2].strip(), f"no {_THINK_CLOSE}")
    if answer.count(_OPEN) != 1 or answer.count(_CLOSE) != 1:
        found = "no" if _OPEN not in answer or _CLOSE not in answer else "more than one"
        return _parsed("", thought, f"{found} {_OPEN}..{_CLOSE} block")
    action = answer.partition(_OPEN)[2].partition(_CLOSE)[0].strip()
    if answer.index(_CLOSE) < answer.index(_OPEN):
        return _parsed("", thought, f"{_CLOSE} stands before {_OPEN}")
    return _parsed(action, thought, "" if action else "the action is empty")


def _parse_compat(text: str, last_characters: int) -> ParsedAction:
    """The rules behind published ALFWorld and WebShop numbers, kept to the letter.

    The action is lower-cased. It stands between the first opening and the first closing action tag,
    whatever their case. Without such tags the end of the completion is executed and the turn is
    invalid. It is also invalid without `<think>` and `</think>` (in lower case, anywhere) and with
    a Chinese character anywhere; then the action found is executed all the same.
    """
    lowered = text.lower()
    thought = text.partition(_THINK_OPEN)[2].partition(_THINK_CLOSE)[0].strip()
    start, end = lowered.find(_OPEN), lowered.find(_CLOSE)
    if start < 0 or end < 0:
        action = lowered[-last_characters:] if last_characters else ""
        return _parsed(action, thought, f"no {_OPEN}..{_CLOSE} block")
    action = lowered[start + len(_OPEN) : end].strip()
    if _THINK_OPEN not in text or _THINK_CLOSE not in text:
        return _parsed(action, thought, f"no {_THINK_OPEN}..{_THINK_CLOSE} block")
    if _CJK.search(text):
        return _parsed(action, thought, "Chinese characters")
    return _parsed(action, thought, "")


def _parsed(action: str, thought: str, error: str) -> ParsedAction:
    return ParsedAction(action, thought, is_valid=not error, error=error)
