"""Weights of the teacher's part other than T-DUR's: the ablations of ATOD (arXiv:2606.27814).

Shapes and names as in `atod.py`; results are detached. Not settled by any source (open):

- Token-level weights have no guards: their min-max runs over the batch, not over a trajectory.
- Top-fraction gives weight 1 to a trajectory's highest soft-OR turns, ties included, and 0 to the
  rest. The paper says neither what the rest gets nor which fraction it took.
- Mean-preserving reads "ratio" as the scale factor 1 / mean. The factor is clipped, so the mean is
  1 only where the factor lies within the bounds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from atod_train.algorithm.atod import masked, min_max, segment_sum


def token_weights(
    log_ratio: Tensor, student_logprobs: Tensor, mask: Tensor, *, quantile: float = 0.98
) -> Tensor:
    """Token-level weights: soft OR of |delta| and NLL, each min-max scaled over the batch.

    Args:
        log_ratio: [R, T] delta_t.
        student_logprobs: [R, T] old log-probabilities of the student.
        mask: [R, T] bool.
        quantile: the NLL is clipped at this quantile of the batch (linear interpolation).

    Returns:
        [R, T] weights in [0, 1], 0 on padding.
    """
    disagreement = log_ratio.detach()[mask].abs()
    uncertainty = -student_logprobs.detach()[mask]
    weights = torch.zeros_like(log_ratio)
    if disagreement.numel() == 0:
        return weights
    # torch.quantile refuses more than 2**24 elements, which one large batch exceeds.
    position = quantile * (uncertainty.numel() - 1)
    ordered = uncertainty.sort().values
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    uncertainty = uncertainty.minimum(torch.lerp(below, above, position % 1.0))
    index = torch.zeros_like(disagreement, dtype=torch.int64)
    soft_or = 1.0 - (1.0 - min_max(disagreement, index)) * (1.0 - min_max(uncertainty, index))
    weights[mask] = soft_or.to(weights.dtype)
    return weights


def keep_top_fraction(weights: Tensor, fraction: float, trajectory_index: Tensor) -> Tensor:
    """1 for the ceil(fraction * K) highest weights of each trajectory and their ties, else 0.

    Args:
        weights: [R] T-DUR weights. Equal ones, as the guards leave them, are all kept.
        fraction: share of the trajectory's K turns, in (0, 1].
        trajectory_index: [R] int64.

    Returns:
        [R] of 0 and 1.

    Raises:
        ValueError: `fraction` is not in (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"top_fraction is {fraction}; choose a value above 0, up to 1")
    if weights.numel() == 0:
        return weights
    # Rows by trajectory, and from the highest weight down within one.
    order = weights.argsort(descending=True, stable=True)
    order = order[trajectory_index[order].argsort(stable=True)]
    turns = torch.bincount(trajectory_index)
    # The small number keeps a product such as 3.0000001 from counting as 4.
    kept = (turns * fraction - 1e-4).ceil().long().clamp(min=1)
    last_kept = (turns.cumsum(0) - turns + kept - 1).clamp(max=weights.numel() - 1)
    return (weights >= weights[order][last_kept][trajectory_index]).to(weights.dtype)


def smooth_weights(weights: Tensor, amount: float) -> Tensor:
    """Pull weights of any shape towards 1: (1 - amount) * weights + amount, amount in [0, 1].

    Raises:
        ValueError: `amount` is not in [0, 1].
    """
    if not 0.0 <= amount <= 1.0:
        raise ValueError(f"weight_smoothing is {amount}; choose a value from 0 to 1")
    return (1.0 - amount) * weights + amount


def preserve_mean(
    weights: Tensor,
    mask: Tensor,
    trajectory_index: Tensor,
    *,
    lowest_factor: float = 0.5,
    highest_factor: float = 2.0,
) -> Tensor:
    """Scale each trajectory's weights to a token-weighted mean of 1, by a factor within bounds.

    Args:
        weights: [R] per turn, or [R, T] per token.
        mask: [R, T] bool.
        trajectory_index: [R] int64.
        lowest_factor: bound of 1 / mean.
        highest_factor: bound of 1 / mean.

    Returns:
        Scaled weights of the same shape; a trajectory without sampled tokens is left alone.
    """
    per_token = weights.unsqueeze(-1).expand(mask.shape) if weights.dim() == 1 else weights
    total = segment_sum(masked(per_token, mask).sum(-1), trajectory_index)
    tokens = segment_sum(mask.sum(-1).to(total.dtype), trajectory_index)
    # A total of 0 gives an infinite factor, which the upper bound catches.
    factor = (tokens / total).clamp(lowest_factor, highest_factor).masked_fill(tokens == 0, 1.0)
    row_factor = factor[trajectory_index]
    return weights * (row_factor if weights.dim() == 1 else row_factor.unsqueeze(-1))
