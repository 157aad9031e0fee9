"""THE episode: prompt -> completion -> env.step -> record, turn by turn until it ends.

Rollouts, evaluations, demonstrations and the adapters for other trainers all use it. `EnvPool`
starts episodes and plays their turns; a policy, an expert or another trainer writes completions:

    [episode] = pool.start([task_id])
    while episode.stop_reason is None and episode.next_prompt(encoder, limits):
        pool.play([episode], [text], [completion])
    record = episode.trajectory()

In chat style a prompt consists of the new messages since the last completion; in window style it is
complete. If prompt and longest completion do not fit, the oldest turns are left out and a line
in the prompt reports it. In window style the prompt is rendered with fewer past turns. In chat
style a new sequence begins with the task, that line, and the latest turns with their completions as
sampled. An episode ends if even the shortest prompt does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from atod_gym.dialogue import AgentDialogue
from atod_gym.envs.turn_env import TurnEnv
from atod_gym.parsing import invalid_reason
from atod_gym.prompts import left_out_note
from atod_gym.types import Message, ParsedAction, TurnObservation
from atod_train.config import EnvConfig
from atod_train.records import USUAL_ENDS, StopReason, TokenizedTurn, Trajectory, Turn

if TYPE_CHECKING:  # agents that play by text do not need torch
    from atod_train.models.dialogue import DialogueEncoder
    from atod_train.models.generation import SampledTokens

_SHARE_KEPT = 0.5
"""Share of the remaining tokens that earlier turns may take in a restarted dialogue, so that
it is not restarted at each turn."""
_TEXT_ONLY = TokenizedTurn((), (), (), "stop", extends_previous=False)


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of prompts, in tokens."""

    completion: int
    """Tokens kept free after each prompt."""
    context: int
    """Limit for prompt and completion; in chat style for the whole dialogue."""
    first_prompt: int = 0
    """Longest first prompt of a dialogue; the rest may then take `context - first_prompt`.
    0: no separate limit."""
    can_restart: bool = True
    """Whether a dialogue that is too long is restarted with its latest turns; otherwise it ends."""


@dataclass(frozen=True, slots=True)
class EpisodePrompt:
    """Token ids to feed, with their messages and context."""

    ids: Sequence[int]
    """The ids that are new in this turn."""
    messages: tuple[Message, ...]
    """The messages that are new in this turn; the complete prompt in window style."""
    context: Sequence[int] = ()
    """The ids before them: prompts and completions so far; empty at the start of a sequence."""
    turns_left_out: int = 0
    """Number of earlier turns that were left out because they do not fit."""

    @property
    def whole(self) -> list[int]:
        """Return all ids of the prompt, context included."""
        return [*self.context, *self.ids]


class Episode:
    """One episode of an `EnvPool`.

    Attributes:
        number: of the environment in its pool.
        env: the environment; in a vector environment it is played with others.
        dialogue: renders the prompts and reads the completions.
        observation: of the last turn.
        info: of the last turn, with `action` and `parse_error`.
        messages: the messages that the last turn adds to the prompt; in window style all of them.
        turns: the record of the turns played.
        stop_reason: why the episode has ended; None while it is running.
    """

    def __init__(
        self,
        number: int,
        env: Any,
        dialogue: AgentDialogue,
        config: EnvConfig,
        observation: TurnObservation,
        info: Mapping[str, Any],
    ) -> None:
        self.number, self.env, self.dialogue = number, env, dialogue
        self.observation, self.info = observation, info
        self.messages = new_messages(dialogue.reset(observation, info))
        self.turns: list[Turn] = []
        self.stop_reason: StopReason | None = None
        self._config = config
        self._prompt = EpisodePrompt((), self.messages)

    @property
    def actions(self) -> tuple[str, ...]:
        """The listed actions, without placeholders."""
        listed = self.observation["admissible_actions"]
        return tuple([action for action in listed if not TurnEnv.is_placeholder(action)])

    # -- prompts -----------------------------------------------------------------------------------

    def next_prompt(self, encoder: DialogueEncoder, limits: Limits) -> EpisodePrompt | None:
        """Return the prompt of the next turn; None, ending the episode, if no prompt fits."""
        if self.dialogue.style == "window":
            prompt, room = self._window_prompt(encoder, limits)
        else:
            prompt, room = self._chat_prompt(encoder, limits)
        if len(prompt.ids) > room:
            self.stop_reason = "context_limit"
            return None
        self._prompt = prompt
        return prompt

    def _window_prompt(self, encoder: DialogueEncoder, limits: Limits) -> tuple[EpisodePrompt, int]:
        """Return the prompt with as many past turns as fit, and its limit in tokens."""
        room = limits.context - limits.completion
        messages, left_out = self.messages, 0
        ids = encoder.first(messages)
        while len(ids) > room and left_out < self.dialogue.past_turns:
            left_out += 1
            messages = new_messages(self.dialogue.shortened(left_out))
            ids = encoder.first(messages)
        return EpisodePrompt(ids, messages, turns_left_out=left_out), room

    def _chat_prompt(self, encoder: DialogueEncoder, limits: Limits) -> tuple[EpisodePrompt, int]:
        """Return the continuation of the dialogue or a new dialogue, and its token limit."""
        turns, messages = self.turns, self.messages
        room = limits.context - limits.completion
        if not turns:
            prompt = EpisodePrompt(encoder.first(messages), messages)
            return prompt, min(room, limits.first_prompt or room)
        if limits.first_prompt:
            room += len(turns[0].tokens.prompt_ids) - limits.first_prompt
        context: list[int] = []
        for turn in turns:
            if not turn.tokens.extends_previous:
                context.clear()
            context += [*turn.tokens.prompt_ids, *turn.tokens.completion_ids]
        ids = encoder.continuation(messages, turns[-1].tokens.finish_reason)
        left = room - len(context)
        if len(ids) <= left or not limits.can_restart:
            return EpisodePrompt(ids, messages, context, turns[-1].turns_left_out), left
        return self._new_dialogue(encoder, room), room

    def _new_dialogue(self, encoder: DialogueEncoder, room: int) -> EpisodePrompt:
        """Return the dialogue from the earliest turn that leaves room for some more turns."""
        turns = self.turns
        # From the last turn backwards, each adds its completion and the messages after it.
        after: list[int] = []
        following = self.messages
        best = encoder.first(self._opening(self.messages, len(turns)))
        left_out = len(turns)
        most = len(best) + _SHARE_KEPT * (room - len(best))
        for turn in reversed(turns[1:]):
            tokens = turn.tokens
            continued = encoder.continuation(following, tokens.finish_reason)
            after = [*tokens.completion_ids, *continued, *after]
            ids = [*encoder.first(self._opening(turn.prompt, turn.index)), *after]
            if len(ids) > most:
                break
            best, left_out, following = ids, turn.index, turn.prompt
        return EpisodePrompt(best, self.messages, turns_left_out=left_out)

    def _opening(self, messages: tuple[Message, ...], left_out: int) -> tuple[Message, ...]:
        """Merge a turn's messages into the first prompt: some templates refuse two in a row."""
        *before, task = self.turns[0].prompt
        parts = (task.content, left_out_note(left_out), *(message.content for message in messages))
        return (*before, replace(task, content="\n\n".join(parts)))

    # -- turns -------------------------------------------------------------------------------------

    def record(
        self,
        text: str,
        parsed: ParsedAction,
        result: tuple[Any, ...],
        sampled: SampledTokens | None,
    ) -> None:
        """Record a turn that was played.

        Args:
            text: the completion.
            parsed: its action, which was executed.
            result: what `env.step` returned.
            sampled: the completion's tokens, sampled from the last `next_prompt`; None: unknown,
                as are those of the prompt.
        """
        self.observation, reward, terminated, truncated, info = result
        self.info = {**info, "action": parsed.action, "parse_error": parsed.error}
        prompt, tokens = self._prompt, _TEXT_ONLY
        if sampled is not None:
            tokens = TokenizedTurn(
                prompt_ids=tuple(prompt.ids),
                completion_ids=sampled.ids,
                sampling_logprobs=sampled.logprobs,
                finish_reason=sampled.finish_reason,
                extends_previous=bool(prompt.context),
            )
        penalty = self._config.invalid_action_penalty if parsed.error else 0.0
        reason = invalid_reason(self.info)
        turn = Turn(
            index=len(self.turns),
            prompt=prompt.messages,
            completion=text,
            action=parsed.action,
            reward=float(reward) - penalty,
            is_action_valid=not reason,
            tokens=tokens,
            penalty=penalty,
            invalid_reason=reason,
            turns_left_out=prompt.turns_left_out,
        )
        self.turns.append(turn)
        self.messages = new_messages(self.dialogue.step(text, parsed, self.observation, self.info))
        self._prompt = EpisodePrompt((), self.messages)
        if terminated or truncated:
            self.stop_reason = "terminated" if terminated else "turn_limit"

    def trajectory(self, group_id: int = 0) -> Trajectory:
        """Return the record of the finished episode."""
        assert self.stop_reason is not None
        return Trajectory(
            group_id=group_id,
            task_id=self.info["task_id"],
            task_type=self.info["task_type"],
            turns=tuple(self.turns),
            terminated=self.stop_reason == "terminated",
            truncated=self.stop_reason != "terminated",
            stop_reason=self.stop_reason,
            success=bool(self.info["success"]) and self.stop_reason in USUAL_ENDS,
            score=float(self.info["score"]),
        )


def new_messages(messages: Sequence[Mapping[str, str]]) -> tuple[Message, ...]:
    """Return the messages after the last assistant message, which the prompt adds."""
    new: list[Message] = []
    for message in reversed(messages):
        if message["role"] == "assistant":
            break
        new.append(Message(message["role"], message["content"]))  # type: ignore[arg-type]
    return tuple(reversed(new))
