"""ATOD's advantages on the rows of other trainers, which hold whole dialogues or single turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atod_train.algorithm.atod import (
    MIN_DISAGREEMENT,
    masked,
    sampled_log_ratio,
    segment_sum,
    turn_weights,
)
from atod_train.algorithm.methods import LOW_PRECISION_DISAGREEMENT

Variant = Literal["soft_or", "uniform", "disagreement", "uncertainty"]
"""The turn weights that other trainers can have, see `atod_train.algorithm.atod.turn_weights`."""


@dataclass(frozen=True)
class MixedAdvantages:
    """Results of `mixed_advantages`: detached, 0 outside the mask."""

    advantages: Tensor
    """[B, T]."""
    log_ratio: Tensor
    """[B, T]: teacher's log-probs minus student's."""
    weights: Tensor
    """[B, T]: T-DUR's weight of each token's turn."""

    def metrics(self, mask: Tensor) -> dict[str, float]:
        """Means over the tokens: of the absolute log-ratio, and of the weights."""
        tokens = mask.sum().clamp(min=1)
        return {
            "log_ratio": float(self.log_ratio.abs().sum() / tokens),
            "weight": float(self.weights.sum() / tokens),
        }


def mixed_advantages(
    advantages: Tensor,
    student_logprobs: Tensor,
    teacher_logprobs: Tensor,
    mask: Tensor,
    episode: Tensor,
    *,
    kappa: float,
    rho: float,
    variant: Variant = "soft_or",
    is_low_precision: bool = False,
) -> MixedAdvantages:
    """Eq. 8, kappa w_k delta_t + rho A, where A is another trainer's advantage.

    Args:
        advantages: [B] or [B, T], the return's part.
        student_logprobs: [B, T], before the update.
        teacher_logprobs: [B, T], at temperature 1.
        mask: [B, T] bool, True exactly on sampled tokens. A turn is a run of them in a row, so
            something must stand between the turns of a dialogue, as it always does.
        episode: [B] int64, which episode a row belongs to, counted from 0.
        kappa: coefficient of the teacher's part.
        rho: coefficient of the return's part.
        variant: of the turn weights.
        is_low_precision: whether student or teacher computes in less than float32, which makes the
            smallest disagreement that counts larger.

    Raises:
        ValueError: as `atod_train.algorithm.atod.sampled_log_ratio`.
    """
    log_ratio = sampled_log_ratio(student_logprobs, teacher_logprobs, mask)
    least = LOW_PRECISION_DISAGREEMENT if is_low_precision else MIN_DISAGREEMENT
    weights = _token_weights(student_logprobs, teacher_logprobs, mask, episode, variant, least)
    base = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    mixed = kappa * (weights * log_ratio) + rho * base
    return MixedAdvantages(masked(mixed, mask).detach(), log_ratio, weights)


def _token_weights(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    episode: Tensor,
    variant: Variant,
    min_disagreement: float,
) -> Tensor:
    """Return [B, T] T-DUR weights; every token is visited once, however many turns there are."""
    starts = mask & ~torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
    turn = starts.flatten().cumsum(0)[mask.flatten()] - 1  # of each sampled token, over all rows
    gaps = (teacher - student)[mask].abs()
    tokens = segment_sum(torch.ones_like(gaps), turn)
    weights = turn_weights(
        segment_sum(gaps, turn) / tokens,
        segment_sum(-student[mask], turn) / tokens,
        min_disagreement=min_disagreement,
        variant=variant,
        trajectory_index=episode[starts.nonzero()[:, 0]],
    )
    spread = torch.zeros(mask.shape, dtype=weights.dtype, device=mask.device)
    return spread.masked_scatter(mask, weights[turn])
