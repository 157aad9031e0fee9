"""Weights of the teacher's term besides T-DUR's: SOD's, and the ablations of ATOD.

Names and shapes as in `atod.py`; results are detached. (open) Top-fraction gives weight 1 to a
trajectory's highest soft-OR turns, ties included, and 0 to the rest.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from atod_train.algorithm.atod import MIN_DISAGREEMENT, masked, min_max, segment_sum

SOD_EPS = 1e-6
SOD_MAX_WEIGHT = 1.2

TurnWeights = Literal[
    "soft_or", "uniform", "disagreement", "uncertainty", "token", "mean_preserving", "top", "smooth"
]
"""Names of the setting `turn_weights`; top and smooth take a number, such as top:0.5."""


def parse_turn_weights(text: str) -> tuple[TurnWeights, float]:
    """Return the variant in the setting `turn_weights`, and its number (0 for none).

    Raises:
        ValueError: an unknown variant, or a number that is missing, not taken or out of range.
    """
    name, separator, number = text.partition(":")
    takes_number = name in ("top", "smooth")
    try:
        amount = float(number) if separator else 0.0
    except ValueError:
        amount = math.nan
    is_known = name in get_args(TurnWeights) and bool(separator) == takes_number
    if not is_known or (takes_number and not 0.0 < amount <= 1.0):
        known = [f"{n}:0.5" if n in ("top", "smooth") else n for n in get_args(TurnWeights)]
        raise ValueError(
            f"turn_weights is {text!r}; choose one of {', '.join(known)}; numbers are above 0, up "
            "to 1"
        )
    return name, amount  # type: ignore[return-value]


def sod_weights(disagreement: Tensor, trajectory_index: Tensor, turn_index: Tensor) -> Tensor:
    """Compute SOD's weights: w_1 = 1, w_k = min(prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1.2).

    The product telescopes to (d_1 + eps) / (d_k + eps): the weight falls as the student drifts from
    the teacher after the trajectory's first turn (arXiv:2605.07725).
    Takes d_k [R] in nats per token, `trajectory_index` [R] and `turn_index` [R], whose smallest
    value in a trajectory marks its first turn. Returns [R] in (0, 1.2].
    """
    if disagreement.numel() == 0:
        return disagreement
    trajectories = int(trajectory_index.max()) + 1
    first_turn = turn_index.new_zeros(trajectories).scatter_reduce(
        0, trajectory_index, turn_index, "amin", include_self=False
    )
    is_first = turn_index == first_turn[trajectory_index]
    at_start = segment_sum(disagreement * is_first, trajectory_index)[trajectory_index]
    weights = ((at_start + SOD_EPS) / (disagreement + SOD_EPS)).clamp(max=SOD_MAX_WEIGHT)
    return weights.masked_fill(is_first, 1.0)


def token_weights(
    log_ratio: Tensor,
    student_logprobs: Tensor,
    mask: Tensor,
    *,
    quantile: float = 0.98,
    min_disagreement: float = MIN_DISAGREEMENT,
) -> Tensor:
    """Compute token-level weights: soft OR of |delta| and NLL, each min-max scaled over the batch.

    Takes delta_t and the old log-probabilities of the student, [R, T] each; the NLL is clipped at
    its `quantile` of the batch (linear interpolation). If no token of the batch disagrees by
    `min_disagreement` nats, all weights are 1. Returns [R, T] in [0, 1], 0 on padding.
    """
    disagreement = log_ratio.detach()[mask].abs()
    uncertainty = -student_logprobs.detach()[mask]
    weights = torch.zeros_like(log_ratio)
    if disagreement.numel() == 0:
        return weights
    if float(disagreement.max()) < min_disagreement:
        return masked(torch.ones_like(log_ratio), mask)
    # torch.quantile supports at most 2**24 elements, fewer than a large batch has.
    position = quantile * (uncertainty.numel() - 1)
    ordered = uncertainty.sort().values
    below, above = ordered[math.floor(position)], ordered[math.ceil(position)]
    uncertainty = uncertainty.minimum(torch.lerp(below, above, position % 1.0))
    index = torch.zeros_like(disagreement, dtype=torch.int64)
    soft_or = 1.0 - (1.0 - min_max(disagreement, index)) * (1.0 - min_max(uncertainty, index))
    weights[mask] = soft_or.to(weights.dtype)
    return weights


def keep_top_fraction(weights: Tensor, fraction: float, trajectory_index: Tensor) -> Tensor:
    """Return 1 for the ceil(fraction * K) highest weights of each trajectory and ties, else 0.

    Takes and returns [R]; `fraction` is in (0, 1]. Equal weights, as the guards return them, are
    all kept.
    """
    if weights.numel() == 0:
        return weights
    # Rows by trajectory, and from the highest weight down within one.
    order = weights.argsort(descending=True, stable=True)
    order = order[trajectory_index[order].argsort(stable=True)]
    turns = torch.bincount(trajectory_index)
    # The small number prevents that a product such as 3.0000001 counts as 4.
    kept = (turns * fraction - 1e-4).ceil().long().clamp(min=1)
    last_kept = (turns.cumsum(0) - turns + kept - 1).clamp(max=weights.numel() - 1)
    return (weights >= weights[order][last_kept][trajectory_index]).to(weights.dtype)


def preserve_mean(weights: Tensor, mask: Tensor, trajectory_index: Tensor) -> Tensor:
    """Rescale each trajectory's weights [R] to a token-weighted mean of 1.

    The ratio of a weight to the mean is clipped to [0.5, 2]; then the mean is set to 1 again, so
    that a weight may leave that range. Weights are 1 in a trajectory without sampled tokens.
    """
    tokens = mask.sum(-1).to(weights.dtype)

    def over_mean(values: Tensor) -> Tensor:
        total = segment_sum(values * tokens, trajectory_index)
        mean = total / segment_sum(tokens, trajectory_index).clamp(min=1.0)
        return values / mean.clamp(min=1e-8)[trajectory_index]

    ratios = over_mean(over_mean(weights).clamp(0.5, 2.0))
    is_empty = segment_sum(tokens, trajectory_index) == 0
    return ratios.masked_fill(is_empty[trajectory_index], 1.0)
