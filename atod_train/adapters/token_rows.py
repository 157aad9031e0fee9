"""Episodes whose completions another trainer samples, and the rows that it trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import SampledTokens, StopRule
from atod_train.records import Trajectory
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.episode import Episode, Limits


@dataclass(frozen=True)
class RowTokens:
    """Tokens of one row of a trainer: an episode in chat style, a turn in window style."""

    prompt_ids: list[int]
    response_ids: list[int]
    """Completions, and in chat style the environment's tokens between them."""
    mask: list[int]
    """1 exactly on sampled tokens."""
    logprobs: list[float] | None
    """While sampling; 0.0 where the mask is 0. None if the sampler gave none."""


class TokenPlayer:
    """Plays episodes whose completions are sampled elsewhere."""

    def __init__(self, pool: EnvPool, encoder: DialogueEncoder, limits: Limits) -> None:
        self.pool, self.encoder, self.limits = pool, encoder, limits
        self._stop_rule = StopRule(encoder, pool.completion_format)

    def next_prompt(self, episode: Episode) -> list[int] | None:
        """Return all ids to sample the next completion from; None, and it has ended, if too many.

        In window style past turns are left out where they do not fit.
        """
        prompt = episode.next_prompt(self.encoder, self.limits)
        return None if prompt is None else prompt.whole

    def play(
        self,
        episodes: Sequence[Episode],
        completions: Sequence[Sequence[int]],
        logprobs: Sequence[Sequence[float] | None] | None,
    ) -> None:
        """Play one turn of some episodes.

        Args:
            episodes: each once.
            completions: token ids as sampled, for each episode; those after the action are left
                out, as our own sampler stops there.
            logprobs: of these tokens while sampling; None if the sampler gave none.
        """
        sampled = []
        for given, scores in zip(completions, logprobs or [None] * len(completions), strict=True):
            ids = list(given)
            ids = ids[: self._stop_rule.kept(ids)]
            has_end = bool(ids) and ids[-1] in self.encoder.stop_ids
            kept = tuple(scores or ())[: len(ids)]
            sampled.append(SampledTokens(tuple(ids), kept, "stop" if has_end else "length"))
        texts = [self.encoder.decode(completion.ids) for completion in sampled]
        self.pool.play(episodes, texts, sampled)


def outcome(record: Trajectory) -> dict[str, float]:
    """Return the numbers that other trainers log: success, score and turns."""
    return {
        "success": float(record.success),
        "score": float(record.score),
        "turns": float(len(record.turns)),
    }


def rows_of(record: Trajectory, filler: int) -> list[RowTokens]:
    """Return one row for each turn in window style, else one.

    Other trainers want a row of every episode. Where nothing was played, it consists of the token
    `filler`, and nothing of it is trained on.
    """
    rows: list[RowTokens] = []
    for turn in record.turns:
        tokens = turn.tokens
        prompt, response = list(tokens.prompt_ids), list(tokens.completion_ids)
        mask = [1] * len(response)
        known = len(tokens.sampling_logprobs) == len(response)
        logprobs = list(tokens.sampling_logprobs) if known else None
        if tokens.extends_previous:
            last = rows.pop()
            response = [*last.response_ids, *prompt, *response]
            mask = [*last.mask, *[0] * len(prompt), *mask]
            if logprobs is not None and last.logprobs is not None:
                logprobs = [*last.logprobs, *[0.0] * len(prompt), *logprobs]
            else:
                logprobs = None
            prompt = last.prompt_ids
        rows.append(RowTokens(prompt, response, mask, logprobs))
    return rows or [RowTokens([filler], [filler], [0], None)]
