"""One run: collect, score, weigh, update - and everything that makes it safe to stop.

All randomness of a step follows from the run's seed and the step's number, so a run that is resumed
from a checkpoint goes on bit for bit (same machine, same number of threads).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atod_train.atod import clipped_policy_loss, loss_normalizer, masked
from atod_train.baselines import (
    Advantages,
    Signals,
    auxiliary_loss,
    compute_advantages,
    needs_teacher,
    turn_limit,
)
from atod_train.batching import make_batch, split_minibatches
from atod_train.checkpoint import (
    CheckpointState,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from atod_train.config import RunConfig
from atod_train.dialogue import DialogueEncoder
from atod_train.evaluate import evaluate
from atod_train.generation import Generator
from atod_train.interrupts import interruptible
from atod_train.intervals import EvaluationMode
from atod_train.metrics import (
    Evaluation,
    MetricsWriter,
    PhaseTimes,
    TrajectoryRecord,
)
from atod_train.policy import Policy
from atod_train.progress import progress
from atod_train.rollout import EnvPool, collect, seed_for, tasks_for_step
from atod_train.run_folder import (
    CONFIG_FILE,
    RunFolderError,
    read_config,
    write_config,
    write_manifest,
    write_summary,
)
from atod_train.step_records import batch_metrics, trajectories_to_show
from atod_train.teacher import LocalTeacher
from atod_train.training_state import (
    model_tensors,
    optimizer_tensors,
    restore_model,
    restore_optimizer,
)
from atod_train.types import Batch, Trajectory

_CHECKPOINTS_KEPT = 2
_WEIGHT_DECAY, _MAX_GRAD_NORM = 0.01, 1.0  # as published


class StoppedByUser(Exception):
    """Ctrl-C: the step was finished and saved; the message says how to go on."""


@dataclass
class Progress:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    minutes: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    best_step: int = 0
    best_success: float = -1.0


class Trainer:
    """Trains one student with one method and one seed.

    Args:
        config: the settings.
        run_dir: the run's folder.
        student: the start; it is changed.
        teacher: frozen; None for a method that needs none.
        train_pool: environments of the training split.
        eval_pools: environments of the evaluation splits.
        known: evaluations of the start and the teacher that were made already.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        student: Policy,
        teacher: Policy | None,
        train_pool: EnvPool,
        eval_pools: Sequence[EnvPool],
        known: Sequence[Evaluation] = (),
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.student = student
        self.teacher: LocalTeacher | None = None
        if needs_teacher(config.algorithm.method) and teacher is not None:
            budget = config.train.tokens_per_microbatch
            self.teacher = LocalTeacher(teacher, student, tokens_per_microbatch=budget)
        self._train_pool, self._eval_pools, self._known = train_pool, eval_pools, known
        self._dialogue = DialogueEncoder(
            student.tokenizer, config.env.prompt_style, config.env.template_options
        )
        self._optimizer = torch.optim.AdamW(
            [weight for weight in student.model.parameters() if weight.requires_grad],
            lr=config.train.lr,
            weight_decay=_WEIGHT_DECAY,
            foreach=True,
        )
        self._times = PhaseTimes()
        self.done = Progress()

    # -- the run -----------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> None:
        """Trains up to `train.steps` steps, evaluating and saving on the way.

        Raises:
            StoppedByUser: after Ctrl-C; a checkpoint of the last finished step is there.
            CheckpointError, RunFolderError: files that cannot be read or written.
        """
        resumed = self._open(resume)
        settings = self.config.train
        label = f"{self.config.algorithm.method}, seed {settings.seed}"
        with (
            MetricsWriter(self.run_dir, resume_step=self.done.step if resumed else None) as writer,
            interruptible() as interrupted,
            progress(settings.steps, label) as advance,
        ):
            advance(self.done.step)
            if self.done.step == 0:
                for evaluation in self._known:
                    writer.write_evaluation(evaluation)
            while self.done.step < settings.steps:
                began = time.perf_counter()
                step = self.done.step + 1
                metrics, shown = self._step(step)
                self.done.step = step
                last = step == settings.steps
                evaluations: list[Evaluation] = []
                if last or (settings.eval_every and step % settings.eval_every == 0):
                    with self._times.phase("evaluation"):
                        evaluations = self._evaluate(step, last)
                    for trajectory in shown:
                        writer.write_trajectory(trajectory)
                metrics.update(self._times.take())
                writer.write(metrics)
                for evaluation in evaluations:
                    writer.write_evaluation(evaluation)
                self.done.minutes += (time.perf_counter() - began) / 60
                if last or interrupted or step % max(1, settings.save_every) == 0:
                    self._save()
                advance(note=_note(metrics))
                if interrupted and not last:
                    raise StoppedByUser(
                        f"stopped after step {step} of {settings.steps}; the same command with "
                        "--study.resume goes on from there"
                    )
        self.student.save(self.run_dir / "models" / "last")
        write_summary(
            self.run_dir,
            steps=self.done.step,
            minutes=self.done.minutes,
            tokens=self.done.tokens,
            trajectories=self.done.trajectories,
            extra={"best_step": self.done.best_step, "finished": True},
        )

    def _open(self, resume: bool) -> bool:
        """Writes config and manifest, or restores the last checkpoint; True if it resumes."""
        exists = (self.run_dir / CONFIG_FILE).is_file()
        if exists and not resume:
            raise RunFolderError(
                f"{self.run_dir} holds a run already; add --study.resume to go on with it, or "
                "choose another folder with --study.out"
            )
        if exists:
            self._check_same_settings(read_config(self.run_dir))
        write_config(self.run_dir, self.config)
        teacher = self.teacher.policy if self.teacher else None
        write_manifest(
            self.run_dir,
            method=self.config.algorithm.method,
            env_id=self.config.env.id,
            data=self._train_pool.data,
            data_hash=self._train_pool.content_hash,
            seeds={"train": self.config.train.seed},
            student_parameters=_parameters(self.student),
            teacher_parameters=_parameters(teacher) if teacher else None,
            device=str(self.student.device),
        )
        checkpoint = latest_checkpoint(self.run_dir)
        if checkpoint is not None:
            tensors = model_tensors(self.student.model)
            state = load_checkpoint(checkpoint, model=tensors)
            restore_model(self.student.model, state.tensors)
            restore_optimizer(self._optimizer, self.student.model, state.tensors)
            self.done = Progress(**state.metadata["progress"])
        return exists

    def _check_same_settings(self, saved: RunConfig) -> None:
        free = {"steps", "threads", "eval_every", "save_every"}
        for part in ("env", "model", "algorithm", "train"):
            old, new = asdict(getattr(saved, part)), asdict(getattr(self.config, part))
            for name in new:
                if name not in free and old[name] != new[name]:
                    raise RunFolderError(
                        f"{self.run_dir} was run with {part}.{name}={old[name]!r}, not "
                        f"{new[name]!r}; resume with the same settings, or choose another folder "
                        "with --study.out"
                    )

    def _save(self) -> None:
        with self._times.phase("checkpoint"):
            state = CheckpointState(
                {
                    **model_tensors(self.student.model),
                    **optimizer_tensors(self._optimizer, self.student.model),
                },
                {"progress": asdict(self.done), "seed": self.config.train.seed},
            )
            save_checkpoint(checkpoint_folder(self.run_dir, self.done.step), state)
            prune_checkpoints(self.run_dir, _CHECKPOINTS_KEPT)

    def _evaluate(self, step: int, last: bool) -> list[Evaluation]:
        modes: tuple[EvaluationMode, ...] = ("greedy", "sampled") if last else ("greedy",)
        evaluations = [
            Evaluation(step, "student", evaluate(self.student, pool, self.config, mode))
            for mode in modes
            for pool in self._eval_pools
        ]
        greedy = [e.result for e in evaluations if e.result.mode == "greedy"]
        if not greedy:
            return evaluations
        solved = sum(result.successes for result in greedy)
        success = solved / sum(len(result.tasks) for result in greedy)
        if success > self.done.best_success:
            self.done.best_success, self.done.best_step = success, step
            self.student.save(self.run_dir / "models" / "best")
        return evaluations

    # -- one step ----------------------------------------------------------------------------------

    def _step(self, step: int) -> tuple[dict[str, Any], list[TrajectoryRecord]]:
        """One optimiser cycle: rollout, scores, advantages, updates."""
        trajectories = self._collect(step)
        batch = make_batch(trajectories, self.student.pad_id)
        budget = self.config.train.tokens_per_microbatch
        with self._times.phase("update"):
            old = self.student.completion_logprobs(batch, budget).cpu()
        teacher_logprobs = None
        if self.teacher is not None:
            with self._times.phase("teacher"):
                teacher_logprobs = self.teacher.score(batch)
        advantages = self._advantages(batch, trajectories, old, teacher_logprobs, step)
        with self._times.phase("update"):
            update = self._update(batch, old, teacher_logprobs, advantages, step)
        self.done.tokens += int(batch.completion_mask.sum())
        self.done.trajectories += len(trajectories)
        metrics = {
            "step": step,
            **batch_metrics(batch, trajectories, old, advantages),
            **update,
        }
        shown = trajectories_to_show(
            step, batch, trajectories, advantages, self.teacher is not None
        )
        return metrics, shown

    def _collect(self, step: int) -> list[Trajectory]:
        settings = self.config.train
        generator = Generator(
            self.student,
            self._dialogue,
            temperature=settings.temperature,
            max_completion_tokens=settings.max_completion_tokens,
            max_context=min(self.config.model.max_context, self.student.max_positions),
            generator=torch.Generator().manual_seed(seed_for(settings.seed, step, "rollout")),
        )
        groups = collect(
            self._train_pool,
            generator,
            tasks_for_step(self._train_pool.task_ids, step, settings.tasks_per_step, settings.seed),
            group_size=settings.group_size,
            turn_limit=turn_limit(self.config.algorithm, step, self.config.env.max_turns),
            times=self._times,
        )
        return [trajectory for group in groups for trajectory in group.trajectories]

    def _advantages(
        self,
        batch: Batch,
        trajectories: Sequence[Trajectory],
        old: Tensor,
        teacher_logprobs: Tensor | None,
        step: int,
    ) -> Advantages:
        signals = Signals(
            old_logprobs=old,
            teacher_logprobs=teacher_logprobs,
            completion_mask=batch.completion_mask,
            trajectory_index=batch.trajectory_index,
            turn_index=batch.turn_index,
            turn_rewards=batch.turn_rewards,
            returns=batch.returns,
            group_index=batch.group_index,
            turn_penalties=torch.tensor([u.penalty for t in trajectories for u in t.turns]),
        )
        return compute_advantages(signals, self.config.algorithm, step)

    def _update(
        self,
        batch: Batch,
        old: Tensor,
        teacher_logprobs: Tensor | None,
        advantages: Advantages,
        step: int,
    ) -> dict[str, float]:
        """One pass over the batch in mini-batches; means of what happened."""
        settings, algorithm = self.config.train, self.config.algorithm
        device = self.student.device
        order = torch.Generator().manual_seed(seed_for(settings.seed, step, "minibatches"))
        sums: dict[str, float] = {}
        parts = split_minibatches(batch, settings.minibatches, order)
        for part in parts:
            mask = part.batch.completion_mask
            normalizer = loss_normalizer(mask, algorithm.aggregation, part.batch.trajectory_index)
            self._optimizer.zero_grad(set_to_none=True)
            for micro in self.student.microbatches(part.batch, settings.tokens_per_microbatch):
                rows = part.rows[micro.rows]
                here = mask[micro.rows].to(device)
                scale = normalizer[micro.rows].to(device)
                loss, stats = clipped_policy_loss(
                    micro.logprobs,
                    old[rows].to(device),
                    advantages.values[rows].to(device),
                    here,
                    clip_low=algorithm.clip[0],
                    clip_high=algorithm.clip[1],
                    dual_clip=algorithm.dual_clip,
                    normalizer=scale,
                )
                extra = auxiliary_loss(
                    algorithm.method,
                    micro.logprobs,
                    None if teacher_logprobs is None else teacher_logprobs[rows].to(device),
                    here,
                    normalizer=scale,
                )
                loss = loss if extra is None else loss + extra
                tokens = float(here.sum())
                entropy = masked(micro.entropies, here).sum()
                if algorithm.entropy_bonus:
                    loss = loss - algorithm.entropy_bonus * entropy / mask.sum().clamp(min=1)
                loss.backward()
                for name, value in (
                    ("loss", float(loss.detach()) / len(parts)),
                    ("entropy", float(entropy.detach())),
                    ("clip_fraction", float(stats.clip_fraction) * tokens),
                    ("tokens", tokens),
                ):
                    sums[name] = sums.get(name, 0.0) + value
            norm = torch.nn.utils.clip_grad_norm_(self.student.model.parameters(), _MAX_GRAD_NORM)
            sums["grad_norm"] = sums.get("grad_norm", 0.0) + float(norm) / len(parts)
            self._optimizer.step()
        tokens = max(1.0, sums["tokens"])
        return {
            **sums,
            "entropy": sums["entropy"] / tokens,
            "clip_fraction": sums["clip_fraction"] / tokens,
        }


def _parameters(policy: Policy) -> int:
    return sum(parameter.numel() for parameter in policy.model.parameters())


def _note(metrics: dict[str, Any]) -> str:
    return f"success {metrics['train_success']:.2f}, turns {metrics['turns']:.1f}"
