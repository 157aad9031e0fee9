"""ATOD and the methods it is compared with: one loop, other advantages.

Every method is A_t = kappa * w * delta_t + rho * A_i with its own coefficients and weights:

    method  kappa     rho       w                              besides
    atod    schedule  schedule  T-DUR, or an ablated variant
    grpo    0         1         -                              no teacher
    opd     1         0         1
    mix     1         1         1
    sod     1         1         `sod_weights`                  arXiv:2605.07725
    tcod    1         0         1                              `turn_limit`, arXiv:2604.24005
    sdar    0         1         -                              `auxiliary_loss`, arXiv:2605.15155

With opd_signal=exact the teacher's term is the reverse KL over the vocabulary instead of the
sampled token's log-ratio: `divergence_loss` with the weights kappa * w, beside the policy loss of
rho * A_i. T-DUR then takes the divergence for d_k; h_k stays the NLL of the student's own samples
(ours, open).

The trainer calls `compute_advantages`, `needs_teacher`, `has_exact_signal`, `turn_limit` and the
losses, and never asks which method it runs. Settings of the schedule and of the turn weights act
on atod only.

Not settled by any source (open): whether A_i is taken over the group's trajectories (the paper) or
over all its turn rows (the code the paper builds on) is the setting `advantage_over`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from atod_train.algorithm.atod import (
    Schedule,
    aggregate_tokens,
    atod_advantages,
    group_advantages,
    loss_normalizer,
    masked,
    mean_over_tokens,
    sampled_log_ratio,
    segment_sum,
    turn_statistics,
    turn_weights,
)
from atod_train.algorithm.weight_variants import (
    keep_top_fraction,
    preserve_mean,
    smooth_weights,
    token_weights,
)
from atod_train.config import AlgorithmConfig

SOD_EPS = 1e-6
SOD_MAX_WEIGHT = 1.2
TCOD_STEPS_PER_TURN = 6
SDAR_COEFFICIENT = 0.01
SDAR_GATE_SHARPNESS = 5.0

_FIXED_COEFFICIENTS: dict[str, tuple[float, float]] = {
    "grpo": (0.0, 1.0),
    "opd": (1.0, 0.0),
    "mix": (1.0, 1.0),
    "sod": (1.0, 1.0),
    "tcod": (1.0, 0.0),
    "sdar": (0.0, 1.0),
}
"""(kappa, rho) of the methods without a schedule."""


@dataclass(frozen=True, slots=True)
class Signals:
    """What a batch of R turn rows from N trajectories says, before the update."""

    old_logprobs: Tensor
    """[R, T] student, recomputed before the update; nats."""
    teacher_logprobs: Tensor | None
    """[R, T] teacher, nats; None for methods without one."""
    completion_mask: Tensor
    """[R, T] bool, True exactly on sampled tokens."""
    trajectory_index: Tensor
    """[R] int64 in 0..N-1."""
    turn_index: Tensor
    """[R] int64, position of the turn in its trajectory."""
    turn_rewards: Tensor
    """[R] rewards after scaling and invalid-action penalty."""
    returns: Tensor
    """[N] sum of turn rewards."""
    group_index: Tensor
    """[N] integer label of the trajectory's group."""
    divergences: Tensor | None = None
    """[R, T] exact reverse KL from the teacher, nats; where given, it stands for -delta_t."""
    turn_penalties: Tensor | None = None
    """[R] what was subtracted from each turn's reward (>= 0); needed for advantage_over="turns",
    because turn_rewards alone do not tell a penalty from a reward."""


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of a batch and where they come from; all tensors detached."""

    values: Tensor
    """[R, T], 0 on padding; the sum of the two terms, or rl_term where divergences were given."""
    opd_term: Tensor
    """[R, T] the teacher's term; kappa * w * -divergence where divergences were given."""
    rl_term: Tensor
    """[R, T] the reward's term."""
    turn_weights: Tensor
    """[R] weight of the teacher's share; token-level variant: mean over the turn's tokens."""
    disagreement: Tensor
    """[R] mean |delta| in nats per token; 0 without a teacher."""
    uncertainty: Tensor
    """[R] mean NLL of the student's own samples, nats per token."""
    kappa: float
    rho: float
    divergence_weights: Tensor | None = None
    """[R, T] kappa * w for `divergence_loss`; None where no divergences were given."""


def needs_teacher(method: str) -> bool:
    """Whether the method scores completions with the teacher.

    Raises:
        ValueError: the method is unknown.
    """
    if method != "atod" and method not in _FIXED_COEFFICIENTS:
        known = ", ".join(("atod", *_FIXED_COEFFICIENTS))
        raise ValueError(f"unknown method {method!r}; choose one of {known}")
    return method != "grpo"


def has_exact_signal(settings: AlgorithmConfig) -> bool:
    """Whether the teacher's part is the exact divergence, which the loss takes directly.

    Raises:
        ValueError: the method takes only sampled tokens (sdar), or opd_top_k is negative.
    """
    if settings.opd_signal != "exact" or not needs_teacher(settings.method):
        return False
    if settings.method == "sdar":
        raise ValueError("method sdar compares sampled tokens only; use opd_signal=sampled")
    if settings.opd_top_k < 0:
        raise ValueError(f"opd_top_k is {settings.opd_top_k}; choose 0 (all tokens) or more")
    return True


def turn_limit(settings: AlgorithmConfig, step: int, max_turns: int) -> int:
    """Turns an episode may take in optimiser cycle `step` (counted from 1).

    tcod: min(1 + floor(step / 6), max_turns), its forward curriculum; others: max_turns.
    """
    if settings.method != "tcod":
        return max_turns
    return min(1 + step // TCOD_STEPS_PER_TURN, max_turns)


def schedule_of(settings: AlgorithmConfig) -> Schedule:
    """The schedule of method atod; where it adapts itself, only its end points count.

    Raises:
        ValueError: as `Schedule`.
    """
    shape = "linear" if settings.shape == "adaptive" else settings.shape
    return Schedule(*settings.kappa, *settings.rho, anneal_steps=settings.anneal_steps, shape=shape)


def is_adaptive(settings: AlgorithmConfig) -> bool:
    """Whether progress comes from the run itself, see `atod_train.algorithm.adaptive`."""
    return settings.method == "atod" and settings.shape == "adaptive"


def compute_advantages(
    signals: Signals, settings: AlgorithmConfig, step: int, progress: float = 0.0
) -> Advantages:
    """Per-token advantages of the method in `settings` at optimiser cycle `step`.

    Args:
        signals: the batch; padding may hold anything.
        settings: method, coefficients and variants.
        step: optimiser cycle, counted from 1.
        progress: of an adaptive schedule, in [0, 1]; others take `step`.

    Raises:
        ValueError: an unknown method; no teacher_logprobs for a method that needs them; a
            log-probability of student or teacher that is not finite on a sampled token (names the
            turn rows: such a token would give an infinite advantage and NaN gradients); a return
            that is not finite; advantage_over="turns" without turn_penalties.
    """
    mask = signals.completion_mask
    teacher_logprobs = signals.teacher_logprobs
    if teacher_logprobs is None:
        if needs_teacher(settings.method):
            raise ValueError(f"method {settings.method} needs teacher_logprobs; they are None")
        teacher_logprobs = signals.old_logprobs  # delta = 0 and d = 0
    with torch.no_grad():
        log_ratio = sampled_log_ratio(signals.old_logprobs, teacher_logprobs, mask)
        disagreement, uncertainty = turn_statistics(signals.old_logprobs, teacher_logprobs, mask)
        if signals.divergences is not None:
            log_ratio = masked(-signals.divergences, mask)
            disagreement = mean_over_tokens(log_ratio.abs(), mask)
        kappa, rho = _coefficients(settings, step, progress)
        weights = _weights(signals, settings, log_ratio, disagreement, uncertainty)
        reward_part = _row_advantages(signals, settings).to(log_ratio.dtype)
        rl_term = atod_advantages(log_ratio, weights, reward_part, 0.0, rho, mask)
        values, divergence_weights = rl_term, None
        if signals.divergences is None:
            values = atod_advantages(log_ratio, weights, reward_part, kappa, rho, mask)
        else:
            per_token = weights if weights.dim() == 2 else weights[:, None].expand(mask.shape)
            divergence_weights = kappa * per_token
        return Advantages(
            values=values,
            opd_term=atod_advantages(log_ratio, weights, reward_part, kappa, 0.0, mask),
            rl_term=rl_term,
            turn_weights=weights if weights.dim() == 1 else mean_over_tokens(weights, mask),
            disagreement=disagreement,
            uncertainty=uncertainty,
            kappa=kappa,
            rho=rho,
            divergence_weights=divergence_weights,
        )


def sod_weights(disagreement: Tensor, trajectory_index: Tensor, turn_index: Tensor) -> Tensor:
    """SOD's turn weights: w_1 = 1, w_k = min(prod_{u<k} (d_u + eps) / (d_{u+1} + eps), 1.2).

    The product telescopes to (d_1 + eps) / (d_k + eps): a turn counts less the further the
    student has drifted from the teacher since the trajectory's first turn (arXiv:2605.07725).

    Args:
        disagreement: [R] d_k, nats per token.
        trajectory_index: [R] int64.
        turn_index: [R] int64; the smallest of a trajectory marks its first turn.

    Returns:
        [R] weights in (0, 1.2].
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


def divergence_loss(
    divergences: Tensor, weights: Tensor, mask: Tensor, normalizer: Tensor
) -> Tensor:
    """The teacher's part as a loss of its own: weighted mean of the exact divergences, 0-d.

    Its gradient is that of the sampled-token part kappa * w * delta_t of the policy loss, averaged
    over what the student could have sampled in each place, before any update.

    Args:
        divergences: [R, T] KL of the current student from the teacher, differentiable; nats.
        weights: [R, T] `Advantages.divergence_weights`.
        mask: [R, T] bool.
        normalizer: [R] rows of `atod.loss_normalizer` over the whole mini-batch.
    """
    return aggregate_tokens(weights * divergences, mask, normalizer)


def auxiliary_loss(
    method: str,
    logprobs: Tensor,
    teacher_logprobs: Tensor | None,
    mask: Tensor,
    *,
    normalizer: Tensor | None = None,
    coefficient: float = SDAR_COEFFICIENT,
    gate_sharpness: float = SDAR_GATE_SHARPNESS,
) -> Tensor | None:
    """What a method adds to the policy loss, its coefficient included; None for all but sdar.

    sdar: coefficient * mean(gate * (teacher_logprobs - logprobs)) with the detached gate
    sigmoid(gate_sharpness * (teacher_logprobs - logprobs)). Its gradient is that of -gate *
    logprobs: it raises the sampled tokens that the teacher finds likelier than the student does,
    and nearly leaves the others alone. This plain log-ratio form is the one found in public
    copies of the code of arXiv:2605.15155. The other reading, a policy-gradient surrogate -(delta *
    ratio), would push rejected tokens down, which is what the gate is there to avoid. (open) The
    published teacher is the student itself with privileged context; here it is the teacher model.

    Args:
        method: name of the method.
        logprobs: [R, T] current student, nats; the only path of the gradient.
        teacher_logprobs: [R, T], finite on sampled tokens as `compute_advantages` has checked.
        mask: [R, T] bool.
        normalizer: [R] rows of `atod.loss_normalizer` over the whole mini-batch, so
            that micro-batches add up; None: mean over this call's tokens.
        coefficient: factor of the whole term.
        gate_sharpness: slope of the gate per nat.

    Returns:
        0-d loss to be added to the policy loss, or None.

    Raises:
        ValueError: sdar without teacher_logprobs.
    """
    if method != "sdar":
        return None
    if teacher_logprobs is None:
        raise ValueError("method sdar needs teacher_logprobs; they are None")
    normalizer = loss_normalizer(mask) if normalizer is None else normalizer
    gap = masked(teacher_logprobs.detach() - logprobs, mask)
    gate = torch.sigmoid(gate_sharpness * gap.detach())
    return coefficient * aggregate_tokens(gate * gap, mask, normalizer)


def _coefficients(settings: AlgorithmConfig, step: int, progress: float) -> tuple[float, float]:
    if settings.method != "atod":
        needs_teacher(settings.method)  # refuses unknown names
        return _FIXED_COEFFICIENTS[settings.method]
    schedule = schedule_of(settings)
    if is_adaptive(settings):
        return schedule.coefficients_at(progress)
    return schedule.coefficients(step)


def _weights(
    signals: Signals,
    settings: AlgorithmConfig,
    log_ratio: Tensor,
    disagreement: Tensor,
    uncertainty: Tensor,
) -> Tensor:
    """Weights of the teacher's part: [R], or [R, T] for the token-level variant of atod."""
    index, mask = signals.trajectory_index, signals.completion_mask
    if settings.method == "sod":
        return sod_weights(disagreement, index, signals.turn_index)
    if settings.method != "atod":
        return torch.ones_like(disagreement)
    if settings.turn_weights == "token":
        weights = token_weights(log_ratio, signals.old_logprobs, mask)
    elif settings.turn_weights == "top_fraction":
        soft_or = turn_weights(disagreement, uncertainty, trajectory_index=index)
        weights = keep_top_fraction(soft_or, settings.top_fraction, index)
    else:
        weights = turn_weights(
            disagreement, uncertainty, variant=settings.turn_weights, trajectory_index=index
        )
    weights = smooth_weights(weights, settings.weight_smoothing)
    return preserve_mean(weights, mask, index) if settings.mean_preserving else weights


def _row_advantages(signals: Signals, settings: AlgorithmConfig) -> Tensor:
    """A_i of every turn row, [R].

    Over trajectories, the group's returns are normalised (penalties are part of a return) and all
    turns of a trajectory share the result. Over turns, a row's value is its trajectory's return
    with all penalties taken back, less the row's own penalty; the values of all turn rows of the
    group are normalised together, so that long trajectories weigh more in mean and deviation.
    """
    index = signals.trajectory_index
    if settings.advantage_over == "trajectories":
        return group_advantages(signals.returns, group_index=signals.group_index)[index]
    if signals.turn_penalties is None:
        raise ValueError('advantage_over="turns" needs turn_penalties; they are None')
    penalties = signals.turn_penalties.to(signals.returns.dtype)
    taken_back = torch.zeros_like(signals.returns).index_add(0, index, penalties)
    row_values = (signals.returns + taken_back)[index] - penalties
    return group_advantages(row_values, group_index=signals.group_index[index])
