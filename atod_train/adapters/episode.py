"""An episode whose completions somebody else samples: prompts, actions, rows, token for token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atod_train.config import EnvConfig
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import StopRule
from atod_train.records import FinishReason
from atod_train.rollout.env_pool import EnvEpisode, EnvPool
from atod_train.rollout.episode_prompts import next_prompt


@dataclass(frozen=True)
class PromptRoom:
    """How long prompts may be.

    Attributes:
        dialogue: encodes messages.
        max_completion_tokens: of a turn.
        max_context: prompt and completion of a turn; in chat style of the whole episode.
        max_prompt: of the first prompt, where it has a limit of its own; the rest of a dialogue
            may then take `max_context - max_prompt`. 0: it has none.
    """

    dialogue: DialogueEncoder
    max_completion_tokens: int
    max_context: int
    max_prompt: int = 0

    def fits(self, row: int, new_ids: Sequence[int]) -> bool:
        """Whether a whole prompt leaves room for a completion."""
        return len(new_ids) + self.max_completion_tokens <= self.max_context


@dataclass(frozen=True)
class RowTokens:
    """What a trainer takes for one row: an episode in chat style, a turn in window style."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Completions, and in chat style what the environment says between them."""
    mask: list[int]
    """1 exactly on sampled tokens."""
    logprobs: list[float] | None
    """While sampling; 0.0 where the mask is 0. None if the sampler gave none."""


class Episode:
    """Plays one task.

    Args:
        env: an episode of an `EnvPool` that has just started.
        config: rewards and penalties.
        room: encodes the prompts and limits them.

    Attributes:
        over: nothing more is to be played.
        episode_return: sum of the rewards, scaled and lessened by penalties as `config` says.
    """

    def __init__(self, env: EnvEpisode, config: EnvConfig, room: PromptRoom) -> None:
        self.env = env
        self.over = False
        self.episode_return = 0.0
        self._config = config
        self._room = room
        self._stop_rule = StopRule(room.dialogue, env.dialogue.completion_format)
        # What was fed before each completion: in window style all of it, else what was new.
        self._prompts: list[list[int]] = []
        self._completions: list[list[int]] = []
        self._logprobs: list[Sequence[float] | None] = []
        self._finish_reason: FinishReason = "stop"

    @property
    def turns(self) -> int:
        """Turns played."""
        return len(self._completions)

    @property
    def outcome(self) -> dict[str, float]:
        """The numbers that others log: success, score and turns."""
        return {
            "success": float(self.env.info["success"]),
            "score": float(self.env.info["score"]),
            "turns": float(self.turns),
        }

    def next_prompt(self) -> list[int] | None:
        """All ids to sample the next completion from; None, and the episode is over, if too many.

        In window style past turns are left out where they do not fit.
        """
        dialogue = self._room.dialogue
        held: list[int] = []
        if dialogue.style == "window":
            new = list(next_prompt(self.env.dialogue, self.env.messages, (), self._room, 0).ids)
        elif self.turns:
            new = dialogue.continuation(self.env.messages, self._finish_reason)
            held = _joined(self._prompts, self._completions)
        else:
            new = dialogue.first(self.env.messages)
        if not self._fits(len(held), len(new)):
            self.over = True
            return None
        self._prompts.append(new)
        return held + new

    def _fits(self, held: int, new: int) -> bool:
        room = self._room
        limit = room.max_context
        if room.max_prompt and held:
            limit += len(self._prompts[0]) - room.max_prompt
        elif room.max_prompt and new > room.max_prompt:
            return False
        return held + new + room.max_completion_tokens <= limit

    def ended(self, completion_ids: Sequence[int]) -> list[int]:
        """Return a completion without what was sampled after its action."""
        ids = list(completion_ids)
        return ids[: self._stop_rule.kept(ids)]

    def text(self, completion_ids: Sequence[int]) -> str:
        """A completion as the environment gets it."""
        return self._room.dialogue.decode(completion_ids)

    def record(
        self, completion_ids: Sequence[int], logprobs: Sequence[float] | None = None
    ) -> None:
        """Record the turn that a completion has played, see `play`."""
        env, config = self.env, self._config
        ids = list(completion_ids)
        self._completions.append(ids)
        self._logprobs.append(logprobs)
        has_end = bool(ids) and ids[-1] in self._room.dialogue.stop_ids
        self._finish_reason = "stop" if has_end else "length"
        penalty = config.invalid_action_penalty if env.info["parse_error"] else 0.0
        self.episode_return += env.reward * config.success_reward - penalty
        self.over = env.terminated or env.truncated

    def rows(self) -> list[RowTokens]:
        """One row for each turn in window style, else one; none if nothing was played."""
        turns = list(zip(self._prompts, self._completions, self._logprobs, strict=True))
        if self._room.dialogue.style == "window":
            return [_row([turn]) for turn in turns]
        return [_row(turns)] if turns else []


def play(
    pool: EnvPool,
    episodes: Sequence[Episode],
    completions: Sequence[Sequence[int]],
    logprobs: Sequence[Sequence[float] | None],
) -> None:
    """Play one turn of some episodes of a pool.

    Args:
        pool: that the episodes belong to.
        episodes: each once.
        completions: token ids as sampled, for each episode; those after the action are left out,
            as in our own trainer, whose sampler stops there.
        logprobs: of these tokens while sampling; None if the sampler gave none.
    """
    ended = [episode.ended(ids) for episode, ids in zip(episodes, completions, strict=True)]
    texts = [episode.text(ids) for episode, ids in zip(episodes, ended, strict=True)]
    pool.play([episode.env for episode in episodes], texts)
    for episode, ids, scores in zip(episodes, ended, logprobs, strict=True):
        episode.record(ids, None if scores is None else scores[: len(ids)])


_PlayedTurn = tuple[list[int], list[int], Sequence[float] | None]


def _row(turns: Sequence[_PlayedTurn]) -> RowTokens:
    ids: list[int] = []
    mask: list[int] = []
    scores: list[float] = []
    for number, (prompt, completion, logprobs) in enumerate(turns):
        between = prompt if number else []
        ids += [*between, *completion]
        mask += [0] * len(between) + [1] * len(completion)
        scores += [0.0] * len(between) + list(logprobs or ())
    has_scores = all(logprobs is not None for _, _, logprobs in turns)
    return RowTokens(turns[0][0], ids, mask, scores if has_scores else None)


def _joined(prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> list[int]:
    parts = zip(prompts, completions, strict=True)
    return [token for prompt, completion in parts for token in (*prompt, *completion)]
