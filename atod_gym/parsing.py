"""Parse the action in a model's completion, by one of four profiles.

An environment names the tags of its actions. The tag `action` contains an action as it is; another
tag, such as `search`, contains the part in the brackets of the action `search[..]`.

| profile | a valid completion | executed when it is not valid |
|---|---|---|
| `plain` | the action itself, without surrounding white space | nothing (an empty action) |
| `tags` | optionally one `<think>..</think>`, then exactly one block `<tag>..</tag>` | nothing |
| `react` | optionally one `Thought: ..`, then exactly one line `Action: ..` | nothing |
| `compat` | as in published runs, see `_read_compat` | the same as in published runs |

With `tags` and `react` one completion is one turn. A second thought, a second action or an
observation (`<information>`, `Observation: ..`) makes it invalid; the error names the first.
Tags inside an open thought belong to the thought; a `</think>` without `<think>` before it closes a
thought that the prompt has opened. Plain text between thought and action or after the action is
ignored.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from atod_gym.errors import InvalidSettingError
from atod_gym.types import ParsedAction

ParseProfile = Literal["plain", "tags", "react", "compat"]
PARSE_PROFILES: tuple[ParseProfile, ...] = get_args(ParseProfile)

LAST_CHARACTERS = 30
"""Trailing characters of a completion without tags that published ALFWorld runs executed."""

ACTION_TAGS = ("action",)
"""Tags of an environment that does not name any."""

EMPTY_REPLY = "empty reply"
"""The error of a completion without text."""

_ENVIRONMENT_TAGS = ("information", "observation", "result", "tool_response")
"""Tags in which environments answer."""

_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_VERB = re.compile("[A-Za-z]+")
_CJK = re.compile("[\u4e00-\u9fff]")
_BRACKETS = re.compile(r"\s*(\w+)\s*\[(.*)\]\s*", re.DOTALL)
_LABEL = re.compile(
    r"^[ \t]*(thought|act(?:ion)?|obs(?:ervation)?)[ \t]*\d*[ \t]*:", re.IGNORECASE | re.MULTILINE
)
"""Begins a part of a `react` completion, as ReAct, AgentGym, AgentBench and AgentBoard write it:
`Action: look`, `Act 2: look`, `Action 1: Search[x]`."""


@dataclass(frozen=True, slots=True)
class CompletionFormat:
    """The format of the completions of one environment.

    Attributes:
        profile: see the table of this module.
        tags: those of the environment's actions.
        last_characters: `compat` with the tag `action` only: number of trailing characters that are
            the action if there is no block (30 for ALFWorld, 20 for WebShop in published runs).

    Raises:
        InvalidSettingError: an unknown profile or a negative number of characters.
    """

    profile: ParseProfile = "tags"
    tags: tuple[str, ...] = ACTION_TAGS
    last_characters: int = LAST_CHARACTERS

    def __post_init__(self) -> None:
        if self.profile not in PARSE_PROFILES:
            raise InvalidSettingError(
                f"Unknown parse profile {self.profile!r}; known: {', '.join(PARSE_PROFILES)}."
            )
        if self.last_characters < 0:
            raise InvalidSettingError(f"last_characters must be >= 0, not {self.last_characters}.")

    @classmethod
    def of(
        cls, metadata: Mapping[str, Any], profile: ParseProfile, last_characters: int | None = None
    ) -> CompletionFormat:
        """Make the format of an environment, whose `metadata` names the tags of its actions.

        `last_characters=None` takes the number of the environment's published runs.
        """
        if last_characters is None:
            last_characters = int(metadata.get("last_characters", LAST_CHARACTERS))
        return cls(profile, action_tags(metadata), last_characters)

    def parse(self, completion: str) -> ParsedAction:
        """Parse a completion without special tokens; any text gives a result.

        Raises:
            TypeError: the completion is not a `str`.
        """
        if not isinstance(completion, str):
            raise TypeError(f"a completion is a str, not {type(completion).__name__}")
        if self.profile == "compat":
            action, thought, error = self._read_compat(completion)
        elif self.profile == "plain" or not completion.strip():
            action, thought = completion.strip(), ""
            error = "" if action else EMPTY_REPLY
        else:
            read = self._read_tags if self.profile == "tags" else self._read_react
            action, thought, error = read(completion)
        return ParsedAction(action, thought, is_valid=not error, error=error)

    def format(self, action: str) -> str:
        """Write the shortest completion that `parse` reads as this action.

        Raises:
            InvalidSettingError: no completion is read as this action, such as one with a closing
                tag or, in `react`, with two lines.
        """
        if self.profile == "plain":
            return action
        tag, content = self._bracketed(action) or ("action", action)
        if self.profile == "react":
            completion = f"Action: {action}"
        elif tag in self.tags:
            completion = f"<think></think><{tag}>{content}</{tag}>"
        else:
            known = " nor ".join(f"{tag}[..]" for tag in self.tags)
            raise InvalidSettingError(f"The action {action[:100]!r} is neither {known}.")
        parsed = self.parse(completion)
        read, given = ("".join(text.split()).lower() for text in (parsed.action, action))
        if read != given:
            found = parsed.error or f"it is read as {parsed.action[:100]!r}"
            raise InvalidSettingError(
                f"The profile {self.profile} cannot write the action {action[:100]!r}: {found}."
            )
        return completion

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The strings that end sampling; empty: only the end-of-turn token does.

        `compat` has none: published runs sampled to the end.
        """
        if self.profile == "tags":
            return tuple(f"</{tag}>" for tag in self.tags)
        return ("\nObservation:",) if self.profile == "react" else ()

    def is_in_thought(self, text: str) -> bool:
        """Return whether a completion ends in a thought that it opened."""
        return self._split(text)[3]

    def closed(self, text: str) -> str:
        """Add the closing tag that a server stopped at and left out."""
        if self.profile == "tags":
            rest = self._split(text)[2]
            for mark in [*self._actions(rest)][-1:]:
                if f"</{mark[2]}>" not in rest[mark.end() :]:
                    return f"{text}</{mark[2]}>"
        return text

    def end_of_action(self, text: str, in_thought: bool = False) -> int | None:
        """Return where the action of a completion ends; text after it is not part of the turn.

        Args:
            text: the completion, complete or partial.
            in_thought: the prompt ends in an open thought.

        Returns:
            `tags`: the index behind the first closing action tag outside the thought; `react`: the
            index of the line break before the first observation. None: the action has not ended,
            or the profile has no such end.
        """
        if not self.stop_strings or (in_thought and _THINK_CLOSE not in text):
            return None
        rest = self._split(text)[2]
        if self.profile == "tags":
            ends = (mark.end() for mark in self._actions(rest, "/"))
        else:
            labels = (mark for mark in _LABEL.finditer(rest) if mark[1][0] in "oO")
            ends = (mark.start() - 1 for mark in labels if mark.start())
        return next((len(text) - len(rest) + end for end in ends), None)

    def _split(self, text: str) -> tuple[str, str, str, bool]:
        """Return the text before the thought, the thought, the rest, and whether it is open.

        A `<think>` after the first action does not begin a thought.
        """
        head, opened, inner = text.partition(_THINK_OPEN)
        if not opened or _THINK_CLOSE in head:
            head, opened, inner = "", "", text
        thought, closed, rest = inner.partition(_THINK_CLOSE)
        acts = _LABEL.search(head) if self.profile == "react" else next(self._actions(head), None)
        if acts or not (opened or closed):
            return "", "", text, False
        return head, thought.strip(), rest, not closed

    def _actions(self, text: str, slash: str = "") -> Iterator[re.Match[str]]:
        """Find the opening or, with a slash, the closing action tags."""
        return (m for m in _marks(self.tags).finditer(text) if m[1] == slash and m[2] in self.tags)

    def _bracketed(self, action: str) -> tuple[str, str] | None:
        """Return tag and content of an action such as `search[..]`; None: it has no such tag."""
        match = _BRACKETS.fullmatch(action)
        return (match[1].lower(), match[2]) if match and match[1].lower() in self.tags else None

    @property
    def _block(self) -> str:
        return f"{' or '.join(f'<{tag}>..</{tag}>' for tag in self.tags)} block"

    def _read_tags(self, text: str) -> tuple[str, str, str]:
        """Read one thought and one block, in order."""
        head, thought, rest, is_open = self._split(text)
        if is_open:
            return "", thought, f"no {_THINK_CLOSE}"
        first = next(self._actions(rest), None)
        if first is None:
            inside = next(self._actions(thought), None)
            error = f"{inside[0]} stands in the thought" if inside else f"no {self._block}"
            return "", thought, error
        tag = first[2]
        content, closing, after = rest[first.end() :].partition(f"</{tag}>")
        error = (
            self._misplaced(head, "before", tag)
            or self._misplaced(rest[: first.start()], "before", tag)
            or ("" if closing else f"no {self._block}")
            or self._misplaced(content, "inside", tag)
            or self._misplaced(after, "after", tag)
            or ("" if content.strip() else f"the {tag} is empty")
        )
        return "" if error else _action(tag, content.strip()), thought, error

    def _misplaced(self, text: str, where: str, block: str) -> str:
        """Return an error for the first misplaced tag around or inside the block; else empty."""
        for mark in _marks(self.tags).finditer(text):
            tag, is_ours = mark[2], mark[2] in ("think", *self.tags)
            if where == "inside" and not is_ours:
                continue
            if where == "before" and tag == block:
                return f"{mark[0]} stands before <{block}>"
            if where == "before" and tag == "think":
                return "a second thought"
            if tag in self.tags and not mark[1]:
                return f"more than one {self._block}"
            reason = "" if is_ours else ", which only the environment writes"
            return f"{mark[0]} {where} the <{block}> block{reason}"
        return ""

    def _read_react(self, text: str) -> tuple[str, str, str]:
        """Parse one thought and one action, in order; the first line after the label counts."""
        _, thought, rest, is_open = self._split(text)
        if is_open:
            return "", thought, f"no {_THINK_CLOSE}"
        _, *parts = _LABEL.split(rest)
        action = seen = ""
        for label, part in zip(parts[::2], parts[1::2], strict=True):
            kind, content = label[0].lower(), part.strip()
            if kind == "a" and "a" in seen:
                return "", thought, "more than one action"
            if kind == "t" and seen:
                error = "a thought after the action" if "a" in seen else "a second thought"
                return "", thought, error
            # A label alone is where the model leaves the turn to the environment.
            if kind == "o" and content:
                return "", thought, "an observation, which only the environment writes"
            if kind == "a":
                action = content.partition("\n")[0].strip()
            elif kind == "t":
                thought = content
            seen += kind
        if not action:
            return "", thought, "the action is empty" if "a" in seen else "no Action line"
        found = self._bracketed(action)
        return f"{found[0]}[{found[1]}]" if found else action, thought, ""

    def _read_compat(self, text: str) -> tuple[str, str, str]:
        """Apply the rules of published runs exactly.

        ALFWorld and WebShop (the tag `action` alone): the action is lower-cased. It stands between
        the first opening and the first closing tag, whatever their case. Without such tags the end
        of the completion is executed and the turn is invalid. It is also invalid without `<think>`
        and `</think>` (in lower case, anywhere) and with a Chinese character anywhere; then the
        action found is executed all the same.

        Search-QA: executed is the first block of the first tag that has one, whatever the case of
        the tags: `<search>` before `<answer>`. A completion with more than one opening tag, even in
        the thought, is invalid; without any block it is invalid and nothing is executed.
        """
        thought = text.partition(_THINK_OPEN)[2].partition(_THINK_CLOSE)[0].strip()
        if self.tags == ACTION_TAGS:
            lowered = text.lower()
            start, end = lowered.find("<action>"), lowered.find("</action>")
            if start < 0 or end < 0:
                action = lowered[-self.last_characters :] if self.last_characters else ""
                return action, thought, f"no {self._block}"
            error = "Chinese characters" if _CJK.search(text) else ""
            if _THINK_OPEN not in text or _THINK_CLOSE not in text:
                error = f"no {_THINK_OPEN}..{_THINK_CLOSE} block"
            return lowered[start + len("<action>") : end].strip(), thought, error
        for tag in self.tags:
            block = re.search(f"<{tag}>(.*?)</{tag}>", text, re.IGNORECASE | re.DOTALL)
            if block:
                opened = re.findall(f"<(?:{'|'.join(self.tags)})>", text, re.IGNORECASE)
                error = f"more than one {self._block}" if len(opened) > 1 else ""
                return _action(tag, block[1].strip()), thought, error
        return "", thought, f"no {self._block}"


def action_verb(action: str) -> str:
    """Return the first word of an action, such as `go`, `click` or `search`; empty without one."""
    found = _VERB.match(action)
    return found[0].lower() if found else ""


def action_tags(metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the action tags in an environment's `metadata`."""
    return tuple(metadata.get("action_tags", ACTION_TAGS))


def invalid_reason(info: Mapping[str, Any]) -> str:
    """Return why a turn is invalid, by the `info` that it ended with; empty if it is valid."""
    return info["parse_error"] or ("" if info["is_action_valid"] else "not admissible")


@functools.cache
def _marks(tags: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern of all meaningful tags: group 1 is the slash, group 2 the name."""
    names = "|".join(map(re.escape, ("think", *tags, *_ENVIRONMENT_TAGS)))
    return re.compile(f"<(/?)({names})>")


def _action(tag: str, content: str) -> str:
    return content if tag == "action" else f"{tag}[{content}]"
