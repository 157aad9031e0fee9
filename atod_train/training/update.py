"""What happens between a rollout and the next: scores, and one pass over the batch.

All processes call these functions with the same batch; each works on its share of the sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from atod_train.algorithm.atod import clipped_policy_loss, loss_normalizer, masked
from atod_train.algorithm.baselines import (
    Advantages,
    auxiliary_loss,
    divergence_loss,
    has_exact_signal,
)
from atod_train.batch import Minibatch, select_sequences, split_minibatches
from atod_train.config import AlgorithmConfig, RunConfig
from atod_train.models.policy import Reference
from atod_train.models.scores import MicroBatch, TokenScores
from atod_train.records import Batch
from atod_train.reports.metrics import PhaseTimes
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.training.learner import Learner, share_of_sequences


def score_batch(
    learner: Learner,
    teacher: Teacher | None,
    batch: Batch,
    config: RunConfig,
    times: PhaseTimes,
) -> TokenScores:
    """The student's log-probs and entropies before the update, and what the teacher says.

    Args:
        learner: its student is scored.
        teacher: None for methods without one.
        batch: R rows; on the CPU.
        config: method and budgets.
        times: takes the seconds of the phases `update` and `teacher`.

    Returns:
        [R, T] on the CPU; `reference_logprobs` are the teacher's, `divergences` are there where
        the method takes the exact signal.
    """
    budget = config.train.tokens_per_microbatch
    own = share_of_sequences(batch, learner.processes)
    if not len(own):  # fewer sequences than processes
        mine = None
    elif len(own) == len(batch.input_ids):
        mine = Minibatch(batch, torch.arange(len(batch.start)))
    else:
        mine = select_sequences(batch, own)
    empty = torch.zeros(batch.completion_ids.shape)
    found = {"logprobs": empty, "entropies": empty.clone()}
    if teacher is not None:
        found["reference_logprobs"] = empty.clone()
    exact = teacher is not None and has_exact_signal(config.algorithm)
    if exact:
        found["divergences"] = empty.clone()
    if mine is not None:
        with (
            times.phase("teacher" if exact else "update"),
            _reference(teacher, config.algorithm) as reference,
        ):
            scores = learner.student.score(
                mine.batch, budget, with_entropy=True, reference=reference
            )
        if teacher is not None and not exact:
            with times.phase("teacher"):
                scores = replace(scores, reference_logprobs=teacher.score(mine.batch))
        for name, whole in found.items():
            whole[mine.rows] = getattr(scores, name).cpu()
    learner.processes.add(list(found.values()))
    return TokenScores(**found)


def update_policy(
    learner: Learner,
    teacher: Teacher | None,
    batch: Batch,
    scores: TokenScores,
    advantages: Advantages,
    config: RunConfig,
    order: torch.Generator,
) -> dict[str, float]:
    """One pass over the batch in mini-batches.

    Args:
        learner: it is trained.
        teacher: as in `score_batch`.
        batch: R rows; on the CPU.
        scores: from `score_batch`.
        advantages: of the batch.
        config: the settings.
        order: decides which sequences share a mini-batch; alike in all processes.

    Returns:
        Means over the updates made: loss, clip_fraction, grad_norm (NaN where none was made); the
        number of tokens; and `skipped_updates`, how many had a gradient that was not finite and so
        moved nothing.
    """
    parts = split_minibatches(batch, config.train.minibatches, order)
    sums = torch.zeros(3, dtype=torch.float64)  # loss, clipped tokens, tokens
    norms: list[float] = []
    with _reference(teacher, config.algorithm) as reference:
        for part in parts:
            mask = part.batch.completion_mask
            part_sums = torch.zeros_like(sums)
            normalizer = loss_normalizer(
                mask, config.algorithm.aggregation, part.batch.trajectory_index
            )
            for micro in learner.microbatches(
                part.batch,
                config.train.tokens_per_microbatch,
                with_entropy=config.algorithm.entropy_bonus > 0,
                reference=reference,
            ):
                loss, seen = _loss(micro, part, normalizer, scores, advantages, config.algorithm)
                learner.backward(loss)
                part_sums += seen
            norm = learner.step()
            if math.isfinite(norm):
                norms.append(norm)
                sums += part_sums
    learner.processes.add([sums])
    loss_sum, clipped, tokens = sums.tolist()
    made = len(norms)
    return {
        "loss": loss_sum / made if made else math.nan,
        "clip_fraction": clipped / max(1.0, tokens),
        "tokens": float(batch.completion_mask.sum()),
        "grad_norm": sum(norm / made for norm in norms) if made else math.nan,
        "skipped_updates": len(parts) - made,
    }


def _loss(
    micro: MicroBatch,
    part: Minibatch,
    normalizer: Tensor,
    scores: TokenScores,
    advantages: Advantages,
    algorithm: AlgorithmConfig,
) -> tuple[Tensor, Tensor]:
    """A micro-batch's share of its mini-batch's loss, and [3]: it, clipped tokens, tokens."""
    device = micro.logprobs.device
    rows = part.rows[micro.rows]
    whole = part.batch.completion_mask
    mask, scale = whole[micro.rows].to(device), normalizer[micro.rows].to(device)
    loss, stats = clipped_policy_loss(
        micro.logprobs,
        scores.logprobs[rows].to(device),
        advantages.values[rows].to(device),
        mask,
        clip_low=algorithm.clip[0],
        clip_high=algorithm.clip[1],
        dual_clip=algorithm.dual_clip,
        normalizer=scale,
    )
    teacher_logprobs = scores.reference_logprobs
    extra = auxiliary_loss(
        algorithm.method,
        micro.logprobs,
        None if teacher_logprobs is None else teacher_logprobs[rows].to(device),
        mask,
        normalizer=scale,
    )
    if extra is not None:
        loss = loss + extra
    if advantages.divergence_weights is not None:
        assert micro.divergences is not None
        weights = advantages.divergence_weights[rows].to(device)
        loss = loss + divergence_loss(micro.divergences, weights, mask, scale)
    if micro.entropies is not None:
        entropy = masked(micro.entropies, mask).sum()
        loss = loss - algorithm.entropy_bonus * entropy / whole.sum().clamp(min=1)
    tokens = float(mask.sum())
    seen = (float(loss.detach()), float(stats.clip_fraction) * tokens, tokens)
    return loss, torch.tensor(seen, dtype=torch.float64)


@contextmanager
def _reference(teacher: Teacher | None, algorithm: AlgorithmConfig) -> Iterator[Reference | None]:
    """The teacher where whole distributions are compared, else None."""
    if isinstance(teacher, LocalTeacher) and has_exact_signal(algorithm):
        with teacher.reference(algorithm.opd_top_k) as reference:
            yield reference
    else:
        yield None
