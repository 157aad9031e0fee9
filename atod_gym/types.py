"""Define the public types of environments and wrappers: observation, info and message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict

Role = Literal["system", "user", "assistant"]


class TurnRecord(TypedDict):
    """One past turn in the history wrapper."""

    text: str
    """The environment's text before the action."""
    action: str
    """The agent's action."""


class TurnObservation(TypedDict):
    """The turn-structured observation that every environment returns."""

    instruction: str
    """The task in one sentence; the same during the whole episode."""
    text: str
    """The environment's text of this turn."""
    admissible_actions: tuple[str, ...]
    """Actions that are possible now, sorted; empty where the task has no such list."""
    turn_index: int
    """Number of actions taken so far: 0 after reset."""


class HistoryObservation(TurnObservation):
    """`TurnObservation` plus the last turns, as the history wrapper returns it."""

    history: tuple[TurnRecord, ...]
    """The last `window` turns, oldest first."""


class StepInfo(TypedDict, total=False):
    """The `info` of reset and step.

    No key is one of Gymnasium's (`episode`, `final_obs`, `final_info`), so that its wrappers work.
    """

    task_id: str
    task_type: str
    split: str
    data: str
    """The data that is played: `official` (only if its content hash is the published one),
    `generated` or the path of other data."""
    success: bool
    """Whether the goal is reached."""
    score: float
    """The benchmark's current score; for ALFWorld 1.0 on success, else 0.0; for WebShop the
    original's score of the purchase, 0 to 1, and 0.0 before it; for Search-QA 1.0 for an answer
    that matches a gold answer exactly, else 0.0."""
    action: str
    """The action that the environment executed last; empty after reset."""
    is_action_valid: bool
    """Strict validity: the action was admissible when it was taken. True after reset."""
    parse_error: str
    """Why the completion did not parse; empty when it did (format validity)."""
    turn_index: int
    message: str
    """Why the action had no effect and what to do instead, for people and agents; usually empty."""


class RewardDetails(TypedDict, total=False):
    """The parts of the reward of a purchase in WebShop; names as in the original.

    reward = (r_att w_att + r_option w_option + r_price w_price) r_type
    """

    reward: float
    r_type: float
    r_att: float
    """Share of the goal's attributes that the product has."""
    w_att: float
    r_option: float
    """Share of the goal's options that were chosen; absent if the goal has none."""
    w_option: float
    """Absent if the goal has no options."""
    r_price: bool
    """Whether the price is within the goal's limit."""
    w_price: float
    query_match: bool
    category_match: bool
    title_score: float
    """Agreement of the nouns of both titles, 0 to 1."""


class WebShopInfo(StepInfo, total=False):
    """The `info` of WebShop; has `reward_details` on a purchase only."""

    noun_tagger: str
    """Method that finds nouns in titles for the reward: `spacy` (the original) or `words`."""
    reward_details: RewardDetails


class SearchQAInfo(StepInfo, total=False):
    """The `info` of Search-QA; has `golden_answers` on the last turn only.

    A truncation by `gym.make` alone (`max_episode_steps`) is no last turn to the environment.
    """

    f1: float
    """Token F1 of the answer with the best gold answer, 0 to 1; 0.0 before the answer."""
    answer: str
    """The given answer; empty before it."""
    golden_answers: tuple[str, ...]
    """All right answers."""
    query: str
    """The query of this turn; empty if there was none."""
    retrieved: tuple[str, ...]
    """Ids of the passages that this turn's text shows, the best first."""
    searches: int
    """Number of searches of the episode so far."""
    retriever: str
    """The server's retriever: `bm25`, `dense`, `hybrid`, or `unknown`."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """The content of a completion: the action to execute and the thought before it."""

    action: str
    thought: str
    is_valid: bool
    """Format validity: the completion had the expected form."""
    error: str
    """Why it is invalid, for people; empty when valid."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a dialogue with a chat model."""

    role: Role
    content: str
