"""Define ATOD and its baselines: one loop with other coefficients, weights and losses.

Every method is A_t = kappa * w * delta_t + rho * A_i (Eq. 8):

    method  kappa     rho       w                              besides
    atod    schedule  schedule  T-DUR, or an ablated variant   arXiv:2606.27814
    grpo    0         1         -                              no teacher
    opd     1         0         1
    mix     1         1         1
    sod     1         1         `sod_weights`                  arXiv:2605.07725
    tcod    1         0         1                              `turn_limit`, arXiv:2604.24005
    sdar    0         1         -                              `auxiliary_loss`, arXiv:2605.15155

The file is in the order of use: methods, advantages, losses. Schedules and their table are in
`schedules.py`; weights of the teacher's term are in `weights.py`. Names and
shapes as in `atod.py`; results are detached, except the losses. The trainer never branches on
the name of a method.

With opd_signal exact or top-k, delta_t is the negative reverse KL over the vocabulary instead of
the log-ratio of the sampled token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from atod_train.algorithm.atod import (
    MIN_DISAGREEMENT,
    aggregate_tokens,
    atod_advantages,
    group_advantages,
    masked,
    mean_over_tokens,
    sampled_log_ratio,
    turn_statistics,
    turn_weights,
)
from atod_train.algorithm.schedules import has_state, schedule_of
from atod_train.algorithm.weights import (
    keep_top_fraction,
    parse_turn_weights,
    preserve_mean,
    sod_weights,
    token_weights,
)
from atod_train.config import AlgorithmConfig
from atod_train.records import Batch, TokenScores

TCOD_STEPS_PER_TURN = 6
SDAR_COEFFICIENT = 0.01
SDAR_GATE_SHARPNESS = 5.0
LOW_PRECISION_DISAGREEMENT = 0.05
"""Nats per token: in bfloat16 the log-probs of two equal models differ by 0.046 on average
(SmolLM2-135M), above `MIN_DISAGREEMENT`."""

# -- methods ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table above."""

    kappa: float | None
    """Coefficient of the teacher's term; None: the schedule's."""
    rho: float | None
    """Coefficient of the reward's term; None: the schedule's."""
    weights: Literal["chosen", "uniform", "sod"] = "uniform"
    """Weights of the teacher's term; chosen: by the setting `turn_weights`."""
    needs_teacher: bool = True


METHODS = {
    "atod": Method(None, None, weights="chosen"),
    "grpo": Method(0.0, 1.0, needs_teacher=False),
    "opd": Method(1.0, 0.0),
    "mix": Method(1.0, 1.0),
    "sod": Method(1.0, 1.0, weights="sod"),
    "tcod": Method(1.0, 0.0),
    "sdar": Method(0.0, 1.0),
}


def method_of(name: str) -> Method:
    """Return the record of a method; ValueError for an unknown one."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]


def needs_teacher(method: str) -> bool:
    """Return whether a method scores completions with the teacher; ValueError as `method_of`."""
    return method_of(method).needs_teacher


def coefficients(
    settings: AlgorithmConfig, step: int, progress: float = 0.0
) -> tuple[float, float]:
    """Return kappa and rho of optimiser cycle `step`, counted from 1.

    Args:
        settings: method, coefficients and schedule.
        step: optimiser cycle.
        progress: of a schedule with a state, in [0, 1]; others use `step`.
    """
    method = method_of(settings.method)
    if method.kappa is not None and method.rho is not None:
        return method.kappa, method.rho
    schedule = schedule_of(settings)
    return (
        schedule.coefficients_at(progress) if has_state(settings) else schedule.coefficients(step)
    )


def scores_teacher(settings: AlgorithmConfig, step: int, progress: float = 0.0) -> bool:
    """Return whether a step scores completions with the teacher; arguments as `coefficients`.

    A schedule withdraws the teacher when kappa is 0: its scores would have no effect.
    """
    method = method_of(settings.method)
    is_withdrawn = method.kappa is None and coefficients(settings, step, progress)[0] == 0.0
    return method.needs_teacher and not is_withdrawn


def exact_top_k(settings: AlgorithmConfig) -> int | None:
    """Return the number of tokens that `opd_signal` compares; 0: all; None: sampled tokens only.

    A number means the exact signal: the teacher's term is a divergence that the loss uses directly.
    ValueError for an unknown signal, and for a method that supports sampled tokens only (sdar).
    """
    name, _, number = settings.opd_signal.partition(":")
    if name == "sampled" and not number:
        return None
    if name == "exact" and not number:
        top_k = 0
    elif name == "top-k" and number.isdecimal() and int(number) > 0:
        top_k = int(number)
    else:
        raise ValueError(
            f"opd_signal is {settings.opd_signal!r}; choose sampled, exact, or top-k with a "
            "number of tokens, such as top-k:64"
        )
    if not needs_teacher(settings.method):
        return None
    if settings.method == "sdar":
        raise ValueError("method sdar compares sampled tokens only; use opd_signal=sampled")
    return top_k


def turn_limit(settings: AlgorithmConfig, step: int, max_turns: int) -> int:
    """Return the turn limit of an episode in optimiser cycle `step` (counted from 1).

    tcod: min(1 + floor(step / 6), max_turns), its forward curriculum; others: max_turns.
    """
    if settings.method != "tcod":
        return max_turns
    return min(1 + step // TCOD_STEPS_PER_TURN, max_turns)


# -- advantages ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Advantages:
    """Advantages of a batch and their terms; all tensors detached."""

    values: Tensor
    """[R, T], 0 on padding; the sum of the two terms, or rl_term if divergences are given."""
    opd_term: Tensor
    """[R, T] the teacher's term; kappa * w * -divergence if divergences are given."""
    rl_term: Tensor
    """[R, T] the reward's term."""
    turn_weights: Tensor
    """[R] weight of the teacher's term; token-level variant: mean over the turn's tokens."""
    disagreement: Tensor
    """[R] mean |delta| in nats per token; 0 without a teacher."""
    uncertainty: Tensor
    """[R] mean NLL of the student's own samples, nats per token."""
    kappa: float
    rho: float
    divergence_weights: Tensor | None = None
    """[R, T] or [R, 1] kappa * w; None if no divergences are given.

    Then the teacher's term is a separate loss: the mean of these weights times the divergences of
    the current student. Its gradient is that of the sampled-token term kappa * w * delta_t of the
    policy loss, averaged over all tokens that the student could have sampled, before any update."""


def compute_advantages(
    batch: Batch,
    scores: TokenScores,
    settings: AlgorithmConfig,
    step: int,
    progress: float = 0.0,
    min_disagreement: float = MIN_DISAGREEMENT,
) -> Advantages:
    """Compute the per-token advantages of the method in `settings` at optimiser cycle `step`.

    Args:
        batch: R turn rows of N trajectories.
        scores: of the student before the update and, as `reference_logprobs`, of the teacher.
            If `divergences` are given, they replace -delta_t. Padding may contain
            any values.
        settings: method, coefficients and variants.
        step: optimiser cycle, counted from 1.
        progress: of a schedule with a state, in [0, 1]; others use `step`.
        min_disagreement: nats per token below which the teacher's weights are 1; larger if a
            model is scored in low precision, whose rounding is not disagreement.

    Raises:
        ValueError: an unknown method; no reference_logprobs in a step that needs them; a
            log-probability of student or teacher that is not finite on a sampled token (names the
            turn rows: such a token would give an infinite advantage and NaN gradients); a return
            that is not finite.
    """
    mask, student = batch.completion_mask, scores.logprobs
    teacher = scores.reference_logprobs
    if teacher is None:
        if scores_teacher(settings, step, progress):
            raise ValueError(f"method {settings.method} needs reference_logprobs; they are None")
        teacher = student  # delta = 0 and d = 0
    with torch.no_grad():
        log_ratio = sampled_log_ratio(student, teacher, mask)
        disagreement, uncertainty = turn_statistics(student, teacher, mask)
        is_exact = scores.divergences is not None
        if scores.divergences is not None:
            log_ratio = masked(-scores.divergences, mask)
            disagreement = mean_over_tokens(log_ratio.abs(), mask)
        kappa, rho = coefficients(settings, step, progress)
        weights = _weights(
            batch, student, settings, log_ratio, disagreement, uncertainty, min_disagreement
        )
        per_token = weights if weights.dim() == 2 else weights[:, None]
        row_advantages = _row_advantages(batch, settings).to(log_ratio.dtype)
        opd_term = atod_advantages(log_ratio, weights, row_advantages, kappa, 0.0, mask)
        rl_term = atod_advantages(log_ratio, weights, row_advantages, 0.0, rho, mask)
        return Advantages(
            values=rl_term if is_exact else opd_term + rl_term,
            opd_term=opd_term,
            rl_term=rl_term,
            turn_weights=weights if weights.dim() == 1 else mean_over_tokens(weights, mask),
            disagreement=disagreement,
            uncertainty=uncertainty,
            kappa=kappa,
            rho=rho,
            divergence_weights=kappa * per_token if is_exact else None,
        )


def _row_advantages(batch: Batch, settings: AlgorithmConfig) -> Tensor:
    """Compute A_i of every turn row, [R].

    Over trajectories, the group's returns are normalised (penalties are part of a return) and all
    turns of a trajectory share the result. Over turns, a row's value is its trajectory's return
    without all penalties, minus the row's own penalty; the values of all turn rows of the
    group are normalised together, so that long trajectories weigh more in mean and deviation.
    """
    index, returns = batch.trajectory_index, batch.returns
    if settings.advantage_over == "trajectories":
        return group_advantages(returns, group_index=batch.group_index)[index]
    penalties = batch.turn_penalties.to(returns.dtype)
    taken_back = torch.zeros_like(returns).index_add(0, index, penalties)
    row_values = (returns + taken_back)[index] - penalties
    return group_advantages(row_values, group_index=batch.group_index[index])


# -- weights of the teacher's term -----------------------------------------------------------------


def _weights(
    batch: Batch,
    student: Tensor,
    settings: AlgorithmConfig,
    log_ratio: Tensor,
    disagreement: Tensor,
    uncertainty: Tensor,
    min_disagreement: float,
) -> Tensor:
    """Return the weights of the teacher's term: [R], or [R, T] for the variant token of atod."""
    index, mask = batch.trajectory_index, batch.completion_mask
    chosen = method_of(settings.method).weights
    if chosen == "sod":
        return sod_weights(disagreement, index, batch.turn_index)
    if chosen == "uniform":
        return torch.ones_like(disagreement)
    variant, amount = parse_turn_weights(settings.turn_weights)
    if variant == "token":
        return token_weights(log_ratio, student, mask, min_disagreement=min_disagreement)
    weights = turn_weights(
        disagreement,
        uncertainty,
        min_disagreement=min_disagreement,
        variant="soft_or" if variant in ("mean_preserving", "top", "smooth") else variant,  # type: ignore[arg-type]
        trajectory_index=index,
    )
    if variant == "top":
        return keep_top_fraction(weights, amount, index)
    if variant == "smooth":
        return (1.0 - amount) * weights + amount
    return preserve_mean(weights, mask, index) if variant == "mean_preserving" else weights


# -- auxiliary loss --------------------------------------------------------------------------------


def auxiliary_loss(
    method: str,
    logprobs: Tensor,
    teacher_logprobs: Tensor | None,
    mask: Tensor,
    normalizer: Tensor,
) -> Tensor | None:
    """Return the 0-d term that a method adds to the policy loss; None for all except sdar.

    sdar: 0.01 * mean(gate * (teacher_logprobs - logprobs)) with the detached gate
    sigmoid(5 * (teacher_logprobs - logprobs)). Its gradient is that of -gate * logprobs: it raises
    the sampled tokens that the teacher finds more likely than the student, and has little effect on
    the others. This plain log-ratio form is the one in public copies of the code of
    arXiv:2605.15155. The other reading, a policy-gradient surrogate -(delta * ratio), would lower
    rejected tokens, which the gate is meant to avoid. (open) The published teacher is
    the student itself with privileged context; here it is the teacher model.

    Args:
        method: name of the method.
        logprobs: [R, T] current student, nats; the only path of the gradient.
        teacher_logprobs: [R, T], finite on sampled tokens, as `compute_advantages` checks.
        mask: [R, T] bool.
        normalizer: [R] rows of `atod.loss_normalizer` over the whole mini-batch.

    Raises:
        ValueError: sdar without teacher_logprobs.
    """
    if method != "sdar":
        return None
    if teacher_logprobs is None:
        raise ValueError("method sdar needs teacher_logprobs; they are None")
    gap = masked(teacher_logprobs.detach() - logprobs, mask)
    gate = torch.sigmoid(SDAR_GATE_SHARPNESS * gap.detach())
    return SDAR_COEFFICIENT * aggregate_tokens(gate * gap, mask, normalizer)
