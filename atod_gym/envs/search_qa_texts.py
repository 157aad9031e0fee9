"""What Search-QA says and understands: its actions, and passages as the agent reads them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

Verb = Literal["search", "answer"]

FIRST_TEXT: Final = "Find out by searching, then give a short answer."
MALFORMED_TEXT: Final = "This is no action. Write search[..] or answer[..]."
NO_PASSAGE: Final = "No passage matches this query."
CUT_MARK: Final = " [...]"
"""Ends a text that has been cut."""
LEFT_OUT: Final = "[...]"
"""Stands for passages that are left out."""
MIN_PASSAGE_CHARACTERS: Final = 20
MIN_CHARACTERS: Final = 100
"""Smallest budget of an observation."""

_ACTION: Final = re.compile(r"(search|answer)\s*\[(.*)\]", re.IGNORECASE | re.DOTALL)
_BEFORE, _AFTER = "<information>\n", "\n</information>"


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage that a retriever has found."""

    passage_id: str
    """Empty where the server gives none."""
    title: str
    text: str
    """In one line."""


def parse_action(action: str) -> tuple[Verb, str] | None:
    """The verb of an action and what stands in its brackets; None if it is malformed or empty."""
    match = _ACTION.fullmatch(action.strip())
    argument = match[2].strip() if match else ""
    return (cast("Verb", match[1].lower()), argument) if match and argument else None


def make_passage(passage_id: str, contents: str) -> Passage:
    """Takes a passage's contents apart: the title is the first line, often in quotes."""
    title, _, text = contents.partition("\n")
    title = title.strip()
    if len(title) > 1 and title[0] == title[-1] == '"':
        title = title[1:-1]
    return Passage(passage_id, title, " ".join(text.splitlines()).strip())


def information(
    passages: Sequence[Passage], passage_characters: int, observation_characters: int
) -> tuple[str, tuple[str, ...]]:
    """What the agent reads after a search, and the ids of the passages in it.

    Args:
        passages: the best first.
        passage_characters: most characters of a passage's text, and of its title; longer ones are
            cut. At least `MIN_PASSAGE_CHARACTERS`.
        observation_characters: most characters of the whole, at least `MIN_CHARACTERS`; the
            passages that do not fit are cut or left out.

    Returns:
        The text, in which `CUT_MARK` or `LEFT_OUT` marks whatever is not whole, and the ids.
    """
    if not passages:
        return f"{_BEFORE}{NO_PASSAGE}{_AFTER}", ()
    left = observation_characters - len(_BEFORE) - len(_AFTER)
    lines: list[str] = []
    shown: list[str] = []
    for number, passage in enumerate(passages, 1):
        head = f"Doc {number} (Title: {_cut(passage.title, passage_characters)})"
        # The mark for the passages behind this one must still fit.
        room = left - (len(LEFT_OUT) + 1 if number < len(passages) else 0)
        line = _cut(f"{head} {_cut(passage.text, passage_characters)}".rstrip(), room)
        if not line.startswith(head):
            lines.append(LEFT_OUT)
            break
        lines.append(line)
        shown.append(passage.passage_id)
        left -= len(line) + 1
    return f"{_BEFORE}{chr(10).join(lines)}{_AFTER}", tuple(shown)


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: max(0, most - len(CUT_MARK))].rstrip()}{CUT_MARK}"
