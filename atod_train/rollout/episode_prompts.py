"""What an episode's model is fed before its next completion, and what is left out where it is long.

In chat style that is what is new since the last completion; in window style it is a whole prompt.
Where prompt and longest completion would not fit the model's context, the oldest turns are left out
and a line in the prompt says so: in window style the prompt is rendered with fewer past turns; in
chat style a new sequence begins that holds the task, that line, and the latest turns with their
completions as they were sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from atod_gym.dialogue import AgentDialogue
from atod_gym.prompts import left_out_note
from atod_gym.types import Message
from atod_train.models.dialogue import DialogueEncoder
from atod_train.records import Turn
from atod_train.rollout.env_pool import new_messages

_SHARE_KEPT = 0.5
"""Of the room beside the task that earlier turns may take in a dialogue that begins anew, so that
it does not begin anew at each turn."""


@dataclass(frozen=True, slots=True)
class EpisodePrompt:
    """Token ids to feed, and where they come from."""

    ids: tuple[int, ...]
    messages: tuple[Message, ...]
    """New in this turn; all of the prompt in window style."""
    extends_previous: bool
    """The ids follow what the model holds of this episode; else they are all it gets to see."""
    turns_left_out: int = 0
    """Earlier turns that the model does not see for want of room."""


class Room(Protocol):
    """What a prompt has to fit into, such as a `Generator`."""

    @property
    def dialogue(self) -> DialogueEncoder:
        """Encodes messages."""

    @property
    def max_completion_tokens(self) -> int:
        """Tokens that are kept free after a prompt."""

    @property
    def max_context(self) -> int:
        """Tokens of prompt and completion."""

    def fits(self, row: int, new_ids: Sequence[int]) -> bool:
        """Whether new ids of an episode fit behind those it has."""


def next_prompt(
    agent: AgentDialogue,
    messages: tuple[Message, ...],
    turns: Sequence[Turn],
    room: Room,
    row: int,
) -> EpisodePrompt:
    """The prompt of an episode's next turn; the shortest there is if none fits.

    Args:
        agent: renders the episode's prompts.
        messages: what is new in this turn; all of the prompt in window style.
        turns: those played so far.
        room: says what fits.
        row: the episode's number in it.
    """
    dialogue = room.dialogue
    if dialogue.style == "window":
        return _window_prompt(agent, messages, room, row)
    if not turns:
        return EpisodePrompt(tuple(dialogue.first(messages)), messages, False)
    ids = dialogue.continuation(messages, turns[-1].tokens.finish_reason)
    if room.fits(row, ids):
        return EpisodePrompt(tuple(ids), messages, True, turns[-1].turns_left_out)
    return _restarted(messages, turns, room)


def _window_prompt(
    agent: AgentDialogue, messages: tuple[Message, ...], room: Room, row: int
) -> EpisodePrompt:
    ids = room.dialogue.first(messages)
    left_out = 0
    while not room.fits(row, ids) and left_out < agent.past_turns:
        left_out += 1
        messages = new_messages(agent.shortened(left_out))
        ids = room.dialogue.first(messages)
    return EpisodePrompt(tuple(ids), messages, False, left_out)


def _restarted(messages: tuple[Message, ...], turns: Sequence[Turn], room: Room) -> EpisodePrompt:
    """The dialogue from a later turn on: from the earliest that leaves room for some more."""
    dialogue = room.dialogue
    most_ids = room.max_context - room.max_completion_tokens
    # From the last turn backwards, each turn adds its completion and what was said after it.
    after: list[int] = []
    following = messages
    best = dialogue.first(_opening(turns, messages, len(turns)))
    left_out = len(turns)
    most = len(best) + _SHARE_KEPT * (most_ids - len(best))
    for turn in reversed(turns[1:]):
        tokens = turn.tokens
        continued = dialogue.continuation(following, tokens.finish_reason)
        after = [*tokens.completion_ids, *continued, *after]
        ids = [*dialogue.first(_opening(turns, turn.prompt, turn.index)), *after]
        if len(ids) > most:
            break
        best, left_out, following = ids, turn.index, turn.prompt
    return EpisodePrompt(tuple(best), messages, False, left_out)


def _opening(
    turns: Sequence[Turn], messages: tuple[Message, ...], left_out: int
) -> tuple[Message, ...]:
    """The first prompt with a later turn's message in it: some templates refuse two in a row."""
    *before, task = turns[0].prompt
    parts = (task.content, left_out_note(left_out), *(message.content for message in messages))
    return (*before, replace(task, content="\n\n".join(parts)))
