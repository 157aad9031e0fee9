"""ATOD's advantages on the rows of other trainers, which hold whole dialogues or single turns."""

from __future__ import annotations

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


def mixed_advantages(
    advantages: Tensor,
    student_logprobs: Tensor | None,
    teacher_logprobs: Tensor | None,
    mask: Tensor,
    episode: Tensor,
    *,
    kappa: float,
    rho: float,
    variant: Variant,
    is_low_precision: bool,
) -> tuple[Tensor, dict[str, float]]:
    """Compute Eq. 8, kappa w_k delta_t + rho A, where A is another trainer's advantage.

    Args:
        advantages: [B] or [B, T], the return's part.
        student_logprobs: [B, T], before the update; None: there is no teacher's part.
        teacher_logprobs: [B, T], at temperature 1; None: there is no teacher's part.
        mask: [B, T] bool, True exactly on sampled tokens. A turn is a run of them in a row, so
            something must stand between the turns of a dialogue, as it always does.
        episode: [B] int64, which episode a row belongs to, counted from 0.
        kappa: coefficient of the teacher's part.
        rho: coefficient of the return's part.
        variant: of the turn weights.
        is_low_precision: whether student or teacher computes in less than float32, which makes the
            smallest disagreement that counts larger.

    Returns:
        [B, T] advantages, detached, with a teacher's part 0 outside the mask; and what to log: the
        coefficients and, over the sampled tokens, the means of |delta_t| and w_k.

    Raises:
        ValueError: as `atod_train.algorithm.atod.sampled_log_ratio`.
    """
    base = advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages
    metrics = {"atod/kappa": kappa, "atod/rho": rho}
    if student_logprobs is None or teacher_logprobs is None:
        return (rho * base).expand(mask.shape), metrics
    log_ratio = sampled_log_ratio(student_logprobs, teacher_logprobs, mask)
    starts = mask & ~torch.nn.functional.pad(mask[:, :-1], (1, 0))
    turn = starts.flatten().cumsum(0)[mask.flatten()] - 1  # of each sampled token, over all rows
    gaps = log_ratio[mask].abs()
    tokens = segment_sum(torch.ones_like(gaps), turn)
    token_weights = turn_weights(
        segment_sum(gaps, turn) / tokens,
        segment_sum(-student_logprobs[mask], turn) / tokens,
        min_disagreement=LOW_PRECISION_DISAGREEMENT if is_low_precision else MIN_DISAGREEMENT,
        variant=variant,
        trajectory_index=episode[starts.nonzero()[:, 0]],
    )[turn]
    weights = torch.zeros_like(log_ratio).masked_scatter(mask, token_weights.to(log_ratio.dtype))
    count = mask.sum().clamp(min=1)
    metrics["atod/log_ratio"] = float(log_ratio.abs().sum() / count)
    metrics["atod/weight"] = float(weights.sum() / count)
    return masked(kappa * (weights * log_ratio) + rho * base, mask).detach(), metrics
