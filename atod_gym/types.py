"""The public types of environments and wrappers: what observation, info and message hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class TurnRecord(TypedDict):
    """One past turn, as the history wrapper keeps it."""

    text: str
    """What the environment had said before the action."""
    action: str
    """What the agent then did."""


class TurnObservation(TypedDict):
    """The turn-structured observation that every environment returns."""

    instruction: str
    """The task in one sentence; the same during the whole episode."""
    text: str
    """What the environment says this turn."""
    admissible_actions: tuple[str, ...]
    """Actions that are possible now, sorted; empty where the task has no such list."""
    turn_index: int
    """Number of actions taken so far: 0 after reset."""


class HistoryObservation(TurnObservation):
    """`TurnObservation` plus the last turns, as the history wrapper returns it."""

    history: tuple[TurnRecord, ...]
    """The last `window` turns, oldest first."""


class StepInfo(TypedDict, total=False):
    """The `info` of reset and step; `episode` is there on the last step only."""

    task_id: str
    task_type: str
    split: str
    data: str
    """Which data is played: `official`, `generated` or the path that was given."""
    success: bool
    """Whether the goal is reached now."""
    score: float
    """The benchmark's own number now; for ALFWorld 1.0 on success, else 0.0."""
    action: str
    """The action that the environment executed last; empty after reset."""
    is_action_valid: bool
    """Strict validity: the action was admissible when it was taken. True after reset."""
    parse_error: str
    """Why the completion did not parse; empty when it did (format validity)."""
    turn_index: int
    episode: dict[str, float]
    """At the end: `r` (return), `l` (turns), `t` (seconds), as RecordEpisodeStatistics has it."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What a completion says: the action to execute and the thought before it."""

    action: str
    thought: str
    is_valid: bool
    """Format validity: the completion had the expected form."""
    error: str
    """Why it is not valid, for people; empty when valid."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a dialogue with a chat model."""

    role: Role
    content: str
