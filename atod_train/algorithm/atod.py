"""ATOD, annealed turn-aware on-policy distillation (arXiv:2606.27814), as pure tensor functions.

A student plays multi-turn episodes; a frozen teacher scores its tokens, and the environment gives
one sparse return per episode. ATOD adds both signals at the advantage level, shifts the mix from
teacher to return (`Schedule`), and weights the teacher's term by turn (T-DUR: `turn_weights`). The
functions are in the order of use and take plain tensors: R turn rows, T tokens of the longest
completion, N trajectories, G in a group; log-probabilities in nats. Results are detached, except
the loss.

    paper       here                        shape    meaning
    s           step                        -        optimiser cycle, counted from 1
    kappa, rho  kappa, rho                  -        coefficients of teacher and return, Eq. 10-12
    log pi_S    old_logprobs                [R, T]   student, recomputed before the update
    log pi_T    teacher_logprobs            [R, T]   teacher: same prompt, tokens; temperature 1
    delta_t     log_ratio                   [R, T]   teacher_logprobs - old_logprobs
    d_k, h_k    disagreement, uncertainty   [R]      means of |delta_t| and -log pi_S over turn k
    w_k         weights                     [R]      of the teacher's term in turn k, Eq. 13-16
    A_i         group_advantage             [R]      normalised return of the row's trajectory
    A_t         advantages                  [R, T]   kappa w_k delta_t + rho A_i, Eq. 8
    -           mask, completion_mask       [R, T]   bool, True exactly on sampled tokens
    -           trajectory_index            [R]      int64, trajectory (0..N-1) of every row

Values on padding (mask False) have no effect, not even NaN; results are 0 there.

Deviations from the paper, and points that no source settles (open):
- The log-ratio of new to old policy is clamped to +-20, so that exp() stays finite.
- Schedule shapes cosine, constant and handoff are additions.
- A group of one, or of returns equal up to rounding, gives exactly 0, not NaN or noise / eps.
- A range of statistics no larger than rounding counts as no range (`min_max`).
- The ablations (token-level, top-fraction, smoothing, mean-preserving) are in weights.py.
- Sums use `index_add`, on CUDA bit-reproducible only under `use_deterministic_algorithms(True)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # bound of |logprobs - old_logprobs| before exp()
MIN_RANGE = 1e-8  # min-max over a range no larger than this, or than rounding, gives 0.5 everywhere
MIN_DISAGREEMENT = 0.01  # nats per token; below it T-DUR's weights are 1 throughout a trajectory


@dataclass(frozen=True, slots=True)
class Schedule:
    """Compute kappa and rho over the steps, from teacher to return (Eq. 10-12).

    `shape` is linear (the paper), cosine (half a wave between the same end points), handoff
    (kappa_init and no return for `anneal_steps` steps, then rho_init and no teacher) or constant
    (the initial values). `anneal_steps` <= 0 is constant, too. ValueError for anything else, for
    a negative coefficient, and for end points in the wrong order.
    """

    kappa_init: float = 1.0
    kappa_min: float = 0.1
    rho_init: float = 1.0
    rho_max: float = 2.0
    anneal_steps: int = 80
    shape: Literal["linear", "cosine", "constant", "handoff"] = "linear"

    def __post_init__(self) -> None:
        if self.shape not in ("linear", "cosine", "constant", "handoff"):
            raise ValueError(f"shape is {self.shape!r}; choose linear, cosine, constant or handoff")
        if not (0.0 <= self.kappa_min <= self.kappa_init and 0.0 <= self.rho_init <= self.rho_max):
            raise ValueError(
                f"{self}: kappa falls and rho rises; choose 0 <= kappa_min <= kappa_init "
                "and 0 <= rho_init <= rho_max"
            )

    def progress(self, step: int) -> float:
        """Return the progress in [0, 1]: 0 at the initial and 1 at the final coefficients."""
        if self.shape == "constant" or self.anneal_steps <= 0:
            return 0.0
        if self.shape == "handoff":
            return float(step > self.anneal_steps)
        elapsed = min(max(step / self.anneal_steps, 0.0), 1.0)
        return elapsed if self.shape == "linear" else (1.0 - math.cos(math.pi * elapsed)) / 2.0

    def coefficients_at(self, progress: float) -> tuple[float, float]:
        """Return (kappa, rho) at a progress in [0, 1], which may not depend on `step`."""
        if self.shape == "handoff":
            return (self.kappa_init, 0.0) if progress < 1.0 else (0.0, self.rho_init)
        kappa = self.kappa_init - (self.kappa_init - self.kappa_min) * progress
        rho = self.rho_init + (self.rho_max - self.rho_init) * progress
        return max(self.kappa_min, kappa), rho

    def coefficients(self, step: int) -> tuple[float, float]:
        """Return (kappa, rho) of optimiser cycle `step`, counted from 1."""
        return self.coefficients_at(self.progress(step))


def sampled_log_ratio(
    student_logprobs: Tensor, teacher_logprobs: Tensor, completion_mask: Tensor
) -> Tensor:
    """Return delta_t [R, T], the sampled-token signal of the reverse KL; not clipped or whitened.

    ValueError for differing shapes, and if a log-probability of a sampled token is not finite
    (a model that cannot produce the token, a broken forward pass): it names the rows.
    """
    for name, logprobs in (("student", student_logprobs), ("teacher", teacher_logprobs)):
        _require_same_shape(completion_mask, **{f"{name}_logprobs": logprobs})
        _require_finite(f"{name}_logprobs", logprobs, completion_mask)
    difference = _at_least_float32(teacher_logprobs) - _at_least_float32(student_logprobs)
    return masked(difference, completion_mask).detach()


def turn_statistics(
    student_logprobs: Tensor, teacher_logprobs: Tensor, completion_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Return disagreement d_k and student uncertainty h_k, each [R] in nats per token (Eq. 13-14).

    Both are 0 for a row without sampled tokens. Raises as `sampled_log_ratio`.
    """
    log_ratio = sampled_log_ratio(student_logprobs, teacher_logprobs, completion_mask)
    disagreement = mean_over_tokens(log_ratio.abs(), completion_mask)
    return disagreement, mean_over_tokens(-student_logprobs.detach(), completion_mask)


def turn_weights(
    disagreement: Tensor,
    uncertainty: Tensor,
    *,
    min_turns: int = 3,
    min_disagreement: float = MIN_DISAGREEMENT,
    variant: Literal["soft_or", "uniform", "disagreement", "uncertainty"] = "soft_or",
    trajectory_index: Tensor | None = None,
) -> Tensor:
    """Compute T-DUR: the weight in [0, 1] of the teacher's term in every turn (Eq. 15-16).

    Takes and returns [K] for one trajectory; or [R] for many, distinguished by `trajectory_index`.
    Both statistics are min-max scaled over the turns of the trajectory (0.5 if they do not
    vary). Variant soft_or combines them to 1 - (1 - d)(1 - h); disagreement and uncertainty use one
    only; uniform is 1. Guards: the weight is 1 throughout a trajectory with fewer than
    `min_turns` turns, or whose largest d_k (nats) is below `min_disagreement`. ValueError for
    differing shapes and unknown variants.
    """
    one_trajectory = torch.zeros_like(disagreement, dtype=torch.int64)
    index = one_trajectory if trajectory_index is None else trajectory_index
    _require_same_shape(disagreement, uncertainty=uncertainty, trajectory_index=index)
    disagreement, uncertainty = disagreement.detach(), uncertainty.detach()
    scaled_d, scaled_h = min_max(disagreement, index), min_max(uncertainty, index)
    choices = {
        "soft_or": 1.0 - (1.0 - scaled_d) * (1.0 - scaled_h),
        "uniform": torch.ones_like(disagreement),
        "disagreement": scaled_d,
        "uncertainty": scaled_h,
    }
    if variant not in choices:
        raise ValueError(f"turn weights have no variant {variant!r}")
    turns = segment_sum(torch.ones_like(disagreement), index)
    unweighted = (turns < min_turns) | (_extreme(disagreement, index, "amax") < min_disagreement)
    return choices[variant].masked_fill(unweighted[index], 1.0)


def group_advantages(
    returns: Tensor, eps: float = 1e-6, group_index: Tensor | None = None
) -> Tensor:
    """Compute (R_i - mean) / (std + eps) over the group, with the unbiased deviation (GRPO).

    Takes and returns [G] for one group; or [N] for many, distinguished by the labels `group_index`.
    Exactly 0 in a group of one or of equal returns; `eps` has the unit of the returns. ValueError
    for a return that is not finite, and for differing shapes.
    """
    returns = _at_least_float32(returns.detach())
    if not bool(torch.isfinite(returns).all()):
        raise ValueError("returns must be finite; check the environment's rewards")
    index = torch.zeros_like(returns, dtype=torch.int64)
    if group_index is not None:
        index = torch.unique(group_index, return_inverse=True)[1]
    _require_same_shape(returns, group_index=index)
    count = segment_sum(torch.ones_like(returns), index)
    centred = returns - (segment_sum(returns, index) / count)[index]
    variance = segment_sum(centred.square(), index) / (count - 1.0).clamp(min=1.0)
    # Rounding errors, in the mean and in sums of the same rewards in another order, must not count
    # as differences: they can be as large as eps.
    lowest, highest = _extreme(returns, index, "amin"), _extreme(returns, index, "amax")
    tolerance = 8.0 * torch.finfo(returns.dtype).eps * lowest.abs().maximum(highest.abs())
    is_equal = highest - lowest <= tolerance
    return (centred / (variance.sqrt() + eps)[index]).masked_fill(is_equal[index], 0.0)


def atod_advantages(
    log_ratio: Tensor,
    weights: Tensor,
    group_advantage: Tensor,
    kappa: float,
    rho: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute A_t = kappa * w_k * delta_t + rho * A_i, [R, T] (Eq. 8).

    `log_ratio` [R, T]; `weights` [R], or [R, T] for one weight per token; `group_advantage` [R].
    Outside `mask`, if given, the result is 0.
    """
    per_token = weights.unsqueeze(-1) if weights.dim() == 1 else weights
    advantages = kappa * (per_token * log_ratio) + rho * group_advantage.unsqueeze(-1)
    return (advantages if mask is None else masked(advantages, mask)).detach()


@dataclass(frozen=True, slots=True)
class LossStats:
    """Statistics of `clipped_policy_loss`: detached 0-d tensors, over the tokens of one call.

    To combine micro-batches, weight the means by `tokens`.
    """

    clip_fraction: Tensor
    """Share of tokens with the clipped term as the smaller one, which has no gradient."""
    approx_kl: Tensor
    """mean(ratio - 1 - log ratio), nats: estimates KL(old || new) and is never negative."""
    tokens: Tensor
    """Number of sampled tokens."""


def loss_normalizer(
    mask: Tensor,
    aggregation: Literal["token-mean", "trajectory-mean"] = "token-mean",
    trajectory_index: Tensor | None = None,
) -> Tensor:
    """Return the divisor of each row's token losses that makes their sum the mean; [R] int64.

    token-mean: all tokens. trajectory-mean (over a trajectory's tokens, then over trajectories):
    tokens of the row's trajectory times the number of trajectories with tokens.
    Gradient accumulation: compute it once for the whole mini-batch and pass its rows to every
    micro-batch; their losses add up to the mini-batch loss, even if a trajectory's rows are split.
    ValueError for an unknown aggregation, or trajectory-mean without trajectory_index.
    """
    row_tokens = mask.sum(-1)
    if aggregation == "token-mean":
        return row_tokens.sum().clamp(min=1).expand(row_tokens.shape)
    if aggregation != "trajectory-mean" or trajectory_index is None:
        raise ValueError(
            f"aggregation is {aggregation!r}; choose token-mean, or trajectory-mean together "
            "with trajectory_index"
        )
    tokens = segment_sum(row_tokens, trajectory_index)
    return (tokens * (tokens > 0).sum()).clamp(min=1)[trajectory_index]


def aggregate_tokens(values: Tensor, mask: Tensor, normalizer: Tensor) -> Tensor:
    """Sum over rows of (sum of `values` [R, T] inside `mask`) / `normalizer` [R]; 0-d."""
    return (masked(values, mask).sum(-1) / normalizer).sum()


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    aggregation: Literal["token-mean", "trajectory-mean"] = "token-mean",
    trajectory_index: Tensor | None = None,
    normalizer: Tensor | None = None,
) -> tuple[Tensor, LossStats]:
    """Compute PPO's clipped surrogate with dual clip, negated and aggregated to a 0-d loss.

    Per token: -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A), and at most
    dual_clip * |A| where A < 0 (math.inf: no dual clip). Gradient flows through `logprobs`
    [R, T] only. Without tokens the loss is 0.
    `normalizer` [R]: this call's rows of `loss_normalizer` over the whole mini-batch, if the
    call has only a part of it; it replaces `aggregation` and `trajectory_index`. ValueError for
    differing shapes, dual_clip <= 1, and as `loss_normalizer`.
    """
    _require_same_shape(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    if dual_clip <= 1.0:
        raise ValueError(f"dual_clip is {dual_clip}; choose a value above 1, or inf for none")
    if normalizer is None:
        normalizer = loss_normalizer(mask, aggregation, trajectory_index)
    difference = _at_least_float32(logprobs) - _at_least_float32(old_logprobs).detach()
    log_ratio = masked(difference, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    advantages = masked(advantages.detach(), mask)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    is_clipped = clipped < unclipped
    objective = torch.where(is_clipped, clipped, unclipped)
    is_dual_clipped = (advantages < 0.0) & (objective < dual_clip * advantages)
    objective = torch.where(is_dual_clipped, dual_clip * advantages, objective)
    loss = aggregate_tokens(-objective, mask, normalizer)
    with torch.no_grad():
        tokens = mask.sum()
        count = tokens.clamp(min=1)
        stats = LossStats(
            clip_fraction=is_clipped.sum() / count,
            approx_kl=masked(torch.expm1(log_ratio) - log_ratio, mask).sum() / count,
            tokens=tokens,
        )
    return loss, stats


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Return `values` with 0 outside `mask`; not a product, as 0 * NaN is NaN, in gradients too."""
    return torch.where(mask, values, values.new_zeros(()))


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `values` [R, T] over each row's sampled tokens, 0 without tokens; [R]."""
    return masked(_at_least_float32(values), mask).sum(-1) / mask.sum(-1).clamp(min=1)


def segment_sum(values: Tensor, index: Tensor) -> Tensor:
    """Sum `values` [R] over the rows that share an `index` [R]; [largest index + 1]."""
    return values.new_zeros(_segments(index)).index_add(0, index, values)


def min_max(values: Tensor, index: Tensor) -> Tensor:
    """Scale `values` [R] to [0, 1] over the rows that share an `index`; equal ones to 0.5."""
    lowest, highest = _extreme(values, index, "amin"), _extreme(values, index, "amax")
    rounding = 8.0 * torch.finfo(values.dtype).eps * lowest.abs().maximum(highest.abs())
    is_flat = (highest - lowest <= rounding.clamp(min=MIN_RANGE))[index]
    span = (highest - lowest)[index].masked_fill(is_flat, 1.0)
    return ((values - lowest[index]) / span).masked_fill(is_flat, 0.5)


def _segments(index: Tensor) -> int:
    return int(index.max()) + 1 if index.numel() else 0


def _extreme(values: Tensor, index: Tensor, which: Literal["amin", "amax"]) -> Tensor:
    start = values.new_zeros(_segments(index))
    return start.scatter_reduce(0, index, values, which, include_self=False)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _require_same_shape(reference: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != reference.shape:
            raise ValueError(f"{name} has shape {[*tensor.shape]}, not {[*reference.shape]}")


def _require_finite(name: str, logprobs: Tensor, mask: Tensor) -> None:
    broken = (~torch.isfinite(logprobs) & mask).any(-1)
    if bool(broken.any()):
        rows = broken.nonzero().flatten().tolist()
        raise ValueError(
            f"{name} is not finite on sampled tokens of {len(rows)} turn row(s), first {rows[:5]}: "
            "this model cannot produce the token (other vocabulary or action mask), or its forward "
            "pass is broken; score both models on the same tokens"
        )
