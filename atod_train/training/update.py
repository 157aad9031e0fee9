"""Score a batch and make one pass of updates over it, on one process or several.

All ranks call these functions with the same batch; each works on its share of the sequences.

`Learner` holds the optimiser and the trained weights: those of the student itself
or, with sharding (FSDP2), of a copy whose weights, gradients and moments are divided over the
ranks. After each update its weights are copied to the student, which samples and is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atod_train.algorithm.atod import aggregate_tokens, clipped_policy_loss, loss_normalizer, masked
from atod_train.algorithm.methods import Advantages, auxiliary_loss, exact_top_k
from atod_train.batch import (
    minibatch_count,
    select_sequences,
    share_of_sequences,
    split_minibatches,
)
from atod_train.config import AlgorithmConfig, RunConfig, TrainConfig
from atod_train.distributed import Processes
from atod_train.models.budgets import tokens_at_once
from atod_train.models.fast.prefix_trees import crossover_of, group_trees, sequences_of
from atod_train.models.policy import Policy
from atod_train.models.scores import Reference, score_completions, score_microbatches
from atod_train.progress import PhaseTimes
from atod_train.records import Batch, TokenScores
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.training.checkpoint import (
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)
from atod_train.training.sharding import copy_weights, shard, whole


def score_batch(
    learner: Learner,
    teacher: Teacher | None,
    batch: Batch,
    config: RunConfig,
    times: PhaseTimes,
) -> TokenScores:
    """Score the sampled tokens with student and teacher before the update.

    Args:
        learner: its student is scored.
        teacher: None for methods without one.
        batch: R rows, on the CPU.
        config: method and budgets.
        times: records the seconds of the phases `update` and `teacher`.

    Returns:
        [R, T] on the CPU: the student's log-probs and entropies; `reference_logprobs` with
        a teacher; `divergences` if the method uses the exact signal.
    """
    reference = _reference(teacher, config.algorithm)
    names = ["logprobs", "entropies"]
    names += ["reference_logprobs"] * (teacher is not None)
    names += ["divergences"] * (reference is not None)
    found = {name: torch.zeros(batch.completion_ids.shape) for name in names}
    mine = _share(batch, learner.processes)
    if mine is not None:
        with times.phase("update" if reference is None else "teacher"):
            scores = score_completions(
                learner.student,
                mine,
                config.train.tokens_per_microbatch,
                with_entropy=True,
                reference=reference,
            )
        if teacher is not None and reference is None:
            with times.phase("teacher"):
                scores = replace(scores, reference_logprobs=teacher.score(mine))
        for name, values in found.items():
            values[mine.rows] = getattr(scores, name).cpu()
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
    """Make one pass over the batch, an optimiser update for each mini-batch.

    Args:
        learner: its weights are trained.
        teacher: as in `score_batch`.
        batch: R rows, on the CPU.
        scores: from `score_batch`.
        advantages: of the batch.
        config: the settings.
        order: draws the sequences of each mini-batch; the same on all ranks.

    Returns:
        Means over the updates: loss, clip_fraction, approx_kl, grad_norm (NaN without updates);
        the number of tokens; and `skipped_updates`, whose gradient was not finite.
    """
    algorithm = config.algorithm
    count = minibatch_count(config.train.minibatches, len(batch.rows))
    minibatches = split_minibatches(batch, count, order)
    sums = torch.zeros(4, dtype=torch.float64)  # loss, clipped tokens, approximate KL, tokens
    norms: list[float] = []
    reference = _reference(teacher, algorithm)
    for part in minibatches:
        mask, index = part.completion_mask, part.trajectory_index
        normalizer = torch.zeros(len(batch.rows), dtype=torch.int64)
        normalizer[part.rows] = loss_normalizer(mask, algorithm.aggregation, index)
        tokens = int(mask.sum())
        parts: list[Tensor] = []
        for micro, found in learner.microbatches(
            part,
            config.train.tokens_per_microbatch,
            with_entropy=algorithm.entropy_bonus != 0,
            reference=reference,
        ):
            loss, counts = _loss(micro, found, normalizer, tokens, scores, advantages, algorithm)
            learner.backward(loss)
            parts.append(counts)
        norm = learner.step()
        if math.isfinite(norm):
            norms.append(norm)
            for part_sums in (counts.cpu().double() for counts in parts):
                part_sums[1:3] *= part_sums[3]
                sums += part_sums
    learner.processes.add([sums])
    loss_sum, clipped, kl, seen = sums.tolist()
    made = len(norms)
    return {
        "loss": loss_sum / made if made else math.nan,
        "clip_fraction": clipped / max(1.0, seen),
        "approx_kl": kl / max(1.0, seen),
        "tokens": float(batch.completion_mask.sum()),
        "grad_norm": sum(norm / made for norm in norms) if made else math.nan,
        "skipped_updates": len(minibatches) - made,
    }


def learning_rate(settings: TrainConfig, step: int) -> float:
    """Return the learning rate of a step, counted from 1: lr * min(1, step / warm-up steps)."""
    warmup = settings.lr_warmup * settings.steps
    return settings.lr * min(1.0, step / warmup) if warmup else settings.lr


def _loss(
    micro: Batch,
    found: TokenScores,
    normalizer: Tensor,
    tokens: int,
    scores: TokenScores,
    advantages: Advantages,
    algorithm: AlgorithmConfig,
) -> tuple[Tensor, Tensor]:
    """Return a micro-batch's share of its mini-batch's loss, and [4]: means over its tokens.

    They are the loss, the share of clipped tokens, the approximate KL and the number of tokens, on
    the model's device: this function does not wait for it.

    Args:
        micro: part of the step's batch; `normalizer`, `scores` and `advantages` have its R rows.
        found: scores of the micro-batch, with the graph.
        normalizer: [R] of the mini-batch, see `loss_normalizer`.
        tokens: sampled tokens of the mini-batch.
        scores: before the update.
        advantages: of the step's batch.
        algorithm: coefficients and variants.
    """

    def own(values: Tensor) -> Tensor:
        return values[micro.rows].to(found.logprobs.device)

    mask, scale = micro.completion_mask.to(found.logprobs.device), own(normalizer)
    loss, stats = clipped_policy_loss(
        found.logprobs,
        own(scores.logprobs),
        own(advantages.values),
        mask,
        clip_low=algorithm.clip[0],
        clip_high=algorithm.clip[1],
        dual_clip=algorithm.clip[2],
        normalizer=scale,
    )
    theirs = scores.reference_logprobs
    theirs = None if theirs is None else own(theirs)
    extra = auxiliary_loss(algorithm.method, found.logprobs, theirs, mask, scale)
    if extra is not None:
        loss = loss + extra
    if advantages.divergence_weights is not None:
        assert found.divergences is not None
        weighted = own(advantages.divergence_weights) * found.divergences
        loss = loss + aggregate_tokens(weighted, mask, scale)
    if found.entropies is not None:
        entropy = masked(found.entropies, mask).sum()
        loss = loss - algorithm.entropy_bonus * entropy / max(1, tokens)
    means = (loss.detach(), stats.clip_fraction, stats.approx_kl, stats.tokens)
    return loss, torch.stack([value.float() for value in means])


def _reference(teacher: Teacher | None, algorithm: AlgorithmConfig) -> Reference | None:
    """Return the teacher if whole distributions are compared, else None."""
    top_k = exact_top_k(algorithm)
    if isinstance(teacher, LocalTeacher) and top_k is not None:
        return Reference(teacher.policy, top_k)
    return None


_WEIGHT_DECAY, _MAX_GRAD_NORM = 0.01, 1.0  # as published


class Learner:
    """Train a student, together with other processes if there are any.

    Args:
        student: its weights are trained.
        lr: learning rate of AdamW.
        processes: this rank among those that train the student; all begin with rank 0's weights.
    """

    def __init__(self, student: Policy, lr: float, processes: Processes) -> None:
        self.student = student
        self.processes = processes
        with torch.no_grad():
            processes.same(list(student.model.parameters()))
        self.policy = student if processes.sharding is None else shard(student, processes)
        self.updates = 0
        """Number of updates of the weights that this object has begun."""
        is_on_gpu = student.device.type == "cuda"
        self._optimizer = torch.optim.AdamW(
            [weight for weight in self.policy.model.parameters() if weight.requires_grad],
            lr=lr,
            weight_decay=_WEIGHT_DECAY,
            fused=is_on_gpu,
            foreach=not is_on_gpu,
        )

    def microbatches(
        self, part: Batch, tokens_per_microbatch: int, **asked: Any
    ) -> Iterator[tuple[Batch, TokenScores]]:
        """Score this rank's share of a mini-batch; call `backward` on each part before the next.

        Arguments as `score_microbatches`; the mini-batch is the same on all ranks.
        """
        mine = _share(part, self.processes)
        missing = 0
        if self.processes.sharding is not None:
            model, sequences = self.policy.model, [] if mine is None else sequences_of(mine)
            budget = tokens_per_microbatch or tokens_at_once(self.policy)
            own = len(group_trees(sequences, budget, crossover_of(model)))
            missing = max(self.processes.gather([own])) - own
        if mine is not None:
            yield from score_microbatches(self.policy, mine, tokens_per_microbatch, **asked)
        # Dummy passes: every rank joins the same number of FSDP collectives.
        shortest = part.attention_mask.sum(dim=1).argmin()[None]
        for _ in range(missing):
            for _, scores in score_microbatches(self.policy, select_sequences(part, shortest)):
                (0.0 * scores.logprobs.sum()).backward()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a part of the loss."""
        # FSDP averages gradients over ranks instead of adding them.
        scale = self.processes.count if self.processes.sharding is not None else 1
        (loss * scale).backward()

    def set_lr(self, lr: float) -> None:
        """Change the learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self) -> float:
        """Sum the gradients over ranks, clip them and update the weights.

        An update whose gradient is not finite is skipped.

        Returns:
            The norm of the gradient before clipping; the same on all ranks.
        """
        weights = [weight for group in self._optimizer.param_groups for weight in group["params"]]
        if self.processes.count > 1 and self.processes.sharding is None:
            for weight in weights:
                if weight.grad is None:
                    weight.grad = torch.zeros_like(weight)
            self.processes.add([weight.grad for weight in weights])
        norm = float(whole(torch.nn.utils.clip_grad_norm_(weights, _MAX_GRAD_NORM)))
        if math.isfinite(norm):
            self.updates += 1  # first: a failed update may have changed some weights
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if math.isfinite(norm) and self.policy is not self.student:
            copy_weights(self.policy.model, self.student.model)
        return norm

    @property
    def can_save_alone(self) -> bool:
        """Return whether this rank can call `tensors` without the others."""
        return self.processes.is_main and self.policy is self.student

    def tensors(self) -> dict[str, Tensor]:
        """Return weights and optimiser state for a checkpoint; all ranks must call this.

        Rank 0 returns the same for any number of ranks, the others return nothing.
        """
        is_main = self.processes.is_main
        moments = optimizer_tensors(self._optimizer, self.policy.model, keep=is_main)
        return {**model_tensors(self.student.model), **moments} if is_main else {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the result of `tensors`, with any number of processes."""
        restore_model(self.student.model, tensors)
        if self.policy is not self.student:
            copy_weights(self.student.model, self.policy.model)
        restore_optimizer(self._optimizer, self.policy.model, tensors)


def _share(batch: Batch, processes: Processes) -> Batch | None:
    """Return this rank's sequences; None: there are fewer sequences than ranks."""
    own = share_of_sequences(batch, processes.index, processes.count)
    return select_sequences(batch, own) if len(own) else None
