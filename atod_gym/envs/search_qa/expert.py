"""A scripted searcher for Search-QA that answers from the passages in its observations.

It matches the wordings of questions and passages of a generated world and has none of its facts. It
searches for the name in the question and reads the answer from the passage with that title. For a
second hop (bridge) or a second name (comparison) it searches again. It uses all results of the
episode, so it recovers from turns in which another action was executed. It searches for a question
in other words as it is, and guesses the answer. With gold answers, it gives the first one that a
passage contains.

`wordings.json` has regular expressions with one group, by relation: `questions` (the group is the
entity or a phrase for it), `passages` (the value; @ stands for any entity, # for any year) and
`phrases` (the entity, where the whole phrase stands for the value); and under `comparisons` the
beginnings of questions that compare years, which an adverb and two names follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from atod_gym.scoring import normalize_answer

_DATA: Final = json.loads(Path(__file__).with_name("wordings.json").read_text("utf-8"))
_ENTITY: Final = r"(?:The )?[A-Z]\w*(?: [A-Z]\w*)+"
_SMALLER: Final = ("first", "earlier", "older")
_DOCUMENT: Final = re.compile(r"^Doc \d+ \(Title: (.*?)\)(?: (.*))?$", re.MULTILINE)


def _compiled(kind: str, flags: int = 0) -> list[tuple[str, re.Pattern[str]]]:
    """Return each pattern of a kind with its relation."""
    return [
        (name, re.compile(pattern.replace("@", _ENTITY).replace("#", r"\d{4}"), flags))
        for name, wordings in _DATA["relations"].items()
        for pattern in wordings.get(kind, ())
    ]


# In this order: "What is the birthplace of Marta Halden known for?" asks for no birthplace.
_QUESTIONS: Final = _compiled("questions", re.IGNORECASE)
_PHRASES: Final = _compiled("phrases", re.IGNORECASE)
_PASSAGES: Final = _compiled("passages")
_COMPARISONS: Final = [
    (
        name,
        re.compile(rf"{start} ({'|'.join(_SMALLER)}|later|younger), (.+) or (.+)", re.IGNORECASE),
    )
    for name, start in _DATA["comparisons"].items()
]


class _Plan(NamedTuple):
    """The names and relations in a question."""

    names: tuple[str, ...]
    """Entities in the question: one, or two to compare; the question itself in other words."""
    relations: tuple[str, ...] = ()
    """Relations to read for each name, hop by hop; empty for a question in other words."""
    wants_smaller: bool = True
    """Whether the smaller year wins a comparison."""


class ScriptedSearcher:
    """Play one episode after another; call `reset` at the start of each.

    Args:
        max_turns: Turns of an episode; the searcher answers in the last one at the latest.
        golden_answers: The right answers, for demonstrations: the first that a passage contains is
            given. Empty: unknown.
    """

    def __init__(self, max_turns: int = 4, golden_answers: Sequence[str] = ()) -> None:
        self._max_turns = max_turns
        self._golden_answers = tuple(golden_answers)
        self.reset("", "")

    def reset(self, instruction: str, text: str) -> None:
        """Start an episode; the question is the instruction, the first text is not used."""
        del text
        self._question = " ".join(instruction.split())
        self._plan = _parse_question(self._question)
        self._known: dict[str, str] = {}
        """Passages of the episode by the key of their title; the first of a title counts."""
        self._found: list[tuple[str, str]] = []
        """Title and passage of the last results that were not empty."""
        self._tried: set[str] = set()
        self._own_action = ""
        self._turns_left = self._max_turns

    def act(
        self, text: str, admissible_actions: Sequence[str] = (), last_action: str | None = None
    ) -> str:
        """Return the next action.

        Args:
            text: The text of the last observation.
            admissible_actions: Not used.
            last_action: The action of the previous turn, if it was not the searcher's own.

        Returns:
            `search[..]` or `answer[..]`.
        """
        del admissible_actions
        self._found = _DOCUMENT.findall(text) or self._found
        for title, passage in self._found:
            self._known.setdefault(_key(title.strip()), passage)
        self._tried.add(self._own_action if last_action is None else last_action.strip())
        ends = [self._follow(name) for name in self._plan.names]
        gold = self._gold_answer()
        action = f"answer[{gold or self._answer(ends)}]"
        if self._turns_left > 1 and not gold:
            missing = (name for _, name in ends if name)
            searches = (f"search[{query}]" for name in missing for query in (name, self._question))
            action = next((s for s in searches if s not in self._tried), action)
        self._turns_left -= 1
        self._own_action = action
        return action

    def _follow(self, name: str) -> tuple[str, str]:
        """Follow the relations from a name, as far as the passages are known.

        Returns:
            The value read last, and the name whose passage is missing or does not state the
            relation; empty if there is none.
        """
        if not self._plan.relations:
            return "", "" if self._found else name
        value = ""
        for relation in self._plan.relations:
            read = _read(relation, [self._known.get(_key(name), "")])
            if not read:
                return value, name
            name = value = read
        return value, ""

    def _answer(self, ends: Sequence[tuple[str, str]]) -> str:
        """Return the answer, or the best guess."""
        plan = self._plan
        if len(ends) > 1:
            years = ["" if missing else value for value, missing in ends]
            first_wins = not all(years) or (years[0] <= years[1]) == plan.wants_smaller
            return plan.names[0 if first_wins else 1]
        [(value, missing)] = ends
        if plan.relations and not missing:
            return value
        read = (
            _read(plan.relations[-1], [text for _, text in self._found]) if plan.relations else ""
        )
        title = next((title.strip() for title, _ in self._found if title.strip()), "")
        return read or value or title or self._question or "unknown"

    def _gold_answer(self) -> str:
        """Return the first gold answer that a passage of the last search contains, else empty."""
        if not self._golden_answers:
            return ""  # without reading the passages, which takes time
        texts = [f" {normalize_answer(f'{title} {text}')} " for title, text in self._found]
        words = {answer: normalize_answer(answer) for answer in self._golden_answers}
        held = (a for a, w in words.items() if w and any(f" {w} " in text for text in texts))
        return next(held, "")


def _key(title: str) -> str:
    """Return the form in which titles and names are compared."""
    return title.casefold().removeprefix("the ")


def _read(relation: str, passages: Iterable[str]) -> str:
    """Return the value of the relation in the first passage that states it; else empty."""
    patterns = [pattern for name, pattern in _PASSAGES if name == relation]
    matches = (pattern.search(passage) for passage in passages for pattern in patterns)
    return next((match[1] for match in matches if match), "")


def _parse_question(question: str) -> _Plan:
    asked = question.rstrip(" ?")
    for relation, pattern in _COMPARISONS:
        if match := pattern.fullmatch(asked):
            names = (match[2].removeprefix("the "), match[3].removeprefix("the "))
            return _Plan(names, (relation,), match[1].lower() in _SMALLER)
    for relation, pattern in _QUESTIONS:
        if match := pattern.fullmatch(asked):
            inner = ((earlier, phrase.fullmatch(match[1])) for earlier, phrase in _PHRASES)
            hops = [(found[1], (earlier, relation)) for earlier, found in inner if found]
            name, relations = hops[0] if hops else (match[1], (relation,))
            # `Halden Brook` for `the Halden Brook`; `The Silent Lantern` stays.
            return _Plan((name.removeprefix("the "),), relations)
    return _Plan((question,))
