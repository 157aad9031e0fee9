"""One run: collect, score, weigh, update - and everything that makes it safe to stop.

All randomness of a step follows from the run's seed and the step's number, so a run that is resumed
from a checkpoint goes on bit for bit (same machine, same number of threads).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from atod_train.algorithm.adaptive import moved_on
from atod_train.algorithm.baselines import (
    Advantages,
    Signals,
    compute_advantages,
    is_adaptive,
    needs_teacher,
    turn_limit,
)
from atod_train.batch import make_batch
from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.memory import give_back
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.scores import TokenScores
from atod_train.progress import progress
from atod_train.records import Batch, Trajectory
from atod_train.reports.metrics import (
    Evaluation,
    MetricsWriter,
    PhaseTimes,
    TrajectoryRecord,
    read_evaluations,
)
from atod_train.reports.run_folder import (
    CONFIG_FILE,
    SUMMARY_FILE,
    RunFolderError,
    check_same_settings,
    write_config,
    write_manifest,
    write_summary,
)
from atod_train.reports.statistics import EvaluationMode
from atod_train.reports.step_records import batch_metrics, rendering_drift, trajectories_to_show
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, nothing_fits, seed_for, tasks_for_step
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.training.checkpoint import (
    CheckpointState,
    checkpoint_folder,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from atod_train.training.interrupts import interruptible
from atod_train.training.learner import Learner
from atod_train.training.training_state import model_tensors
from atod_train.training.update import score_batch, update_policy

_CHECKPOINTS_KEPT = 2


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
    annealing: dict[str, Any] = field(default_factory=dict)
    """Of an adaptive schedule, under the key `progress`."""

    @property
    def anneal_progress(self) -> float:
        """Where an adaptive schedule stands, 0 to 1; see `atod_train.algorithm.adaptive`."""
        return float(self.annealing.get("progress", 0.0))


class Trainer:
    """Trains one student with one method and one seed.

    Args:
        config: the settings.
        run_dir: the run's folder; all processes see it, the main one writes.
        student: the start; it is changed.
        teacher: frozen; None for a method that needs none.
        train_pool: environments of the training split.
        eval_pools: environments of the evaluation splits.
        known: evaluations of the start and the teacher that were made already.
        processes: this process among those that train the student.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        student: Policy,
        teacher: Teacher | None,
        train_pool: EnvPool,
        eval_pools: Sequence[EnvPool],
        known: Sequence[Evaluation] = (),
        processes: Processes | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.student = student
        self.teacher = teacher if needs_teacher(config.algorithm.method) else None
        self.processes = processes or Processes()
        self.learner = Learner(student, config.train.lr, self.processes)
        self._train_pool, self._eval_pools, self._known = train_pool, eval_pools, known
        self._dialogue = DialogueEncoder(
            student.tokenizer, config.env.prompt_style, config.env.template_options
        )
        self._times = PhaseTimes()
        self.done = Progress()

    # -- the run -----------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> None:
        """Trains up to `train.steps` steps, evaluating and saving on the way.

        Raises:
            StoppedByUser: after Ctrl-C; a checkpoint of the last finished step is there.
            CheckpointError, RunFolderError: files that cannot be read or written.
            AtodError: no first prompt of the first step fits the model's context.
        """
        resumed = self._open(resume)
        settings = self.config.train
        name = self.config.study.label or self.config.algorithm.method
        with (
            self._writer(resumed) as writer,
            interruptible() as interrupted,
            progress(settings.steps, f"{name}, seed {settings.seed}") as advance,
        ):
            advance(self.done.step)
            while self.done.step < settings.steps:
                began = time.perf_counter()
                step = self.done.step + 1
                metrics, shown = self._step(step)
                give_back()
                self.done.step = step
                last = step == settings.steps
                evaluations: list[Evaluation] = []
                if last or (settings.eval_every and step % settings.eval_every == 0):
                    with self._times.phase("evaluation"):
                        evaluations = self._evaluate(step, last)
                metrics.update(self._times.take())
                if writer is not None:
                    writer.write(metrics)
                    for evaluation in evaluations:
                        writer.write_evaluation(evaluation)
                    for trajectory in shown if evaluations else ():
                        writer.write_trajectory(trajectory)
                self.done.minutes += (time.perf_counter() - began) / 60
                stop = self.processes.any(bool(interrupted))
                if last or stop or step % max(1, settings.save_every) == 0:
                    self._save()
                advance(note=_note(metrics))
                if stop and not last:
                    raise StoppedByUser(f"stopped after step {step} of {settings.steps}")
        if self.processes.is_main:
            self._finish()
        self.processes.wait()

    def _finish(self) -> None:
        self.student.save(self.run_dir / "models" / "last")
        write_summary(
            self.run_dir,
            steps=self.done.step,
            minutes=self.done.minutes,
            tokens=self.done.tokens,
            trajectories=self.done.trajectories,
            extra={"best_step": self.done.best_step, "finished": True},
        )
        prune_checkpoints(self.run_dir, keep=1)  # the one before is needed no more

    @contextmanager
    def _writer(self, resumed: bool) -> Iterator[MetricsWriter | None]:
        """Writes metrics and evaluations, in the main process."""
        if not self.processes.is_main:
            yield None
            return
        with MetricsWriter(self.run_dir, resume_step=self.done.step if resumed else None) as writer:
            if self.done.step == 0:
                there = {evaluation.board for evaluation in read_evaluations(self.run_dir)}
                for evaluation in self._known:
                    if evaluation.board not in there:
                        writer.write_evaluation(evaluation)
            yield writer

    def _open(self, resume: bool) -> bool:
        """Writes config and manifest, or restores the last checkpoint; True if it resumes."""
        # Nobody looks later than the main process writes.
        exists = self.processes.any((self.run_dir / CONFIG_FILE).is_file())
        if exists and not resume:
            raise RunFolderError(
                f"{self.run_dir} holds a run already; add --study.resume to go on with it, or "
                "choose another folder with --study.out"
            )
        if exists:
            check_same_settings(self.run_dir, self.config)
        self.processes.wait()
        if self.processes.is_main:
            self._describe()
        checkpoint = latest_checkpoint(self.run_dir)
        if checkpoint is not None:
            state = load_checkpoint(checkpoint, model=model_tensors(self.student.model))
            self.learner.restore(state.tensors)
            self.done = Progress(**state.metadata["progress"])
        self.processes.wait()
        return exists

    def _describe(self) -> None:
        """Writes config and manifest; a run that goes on is not finished until it ends again."""
        (self.run_dir / SUMMARY_FILE).unlink(missing_ok=True)
        write_config(self.run_dir, self.config)
        teacher = self.teacher.policy if isinstance(self.teacher, LocalTeacher) else None
        write_manifest(
            self.run_dir,
            method=self.config.study.label or self.config.algorithm.method,
            env_id=self.config.env.id,
            data=self._train_pool.data,
            data_hash=self._train_pool.content_hash,
            seeds={"train": self.config.train.seed},
            student_parameters=_parameters(self.student),
            teacher_parameters=_parameters(teacher) if teacher else None,
            device=str(self.student.device),
            processes=self.processes.count,
        )

    def _save(self) -> None:
        with self._times.phase("checkpoint"):
            tensors = self.learner.tensors()
            if self.processes.is_main:
                state = CheckpointState(
                    tensors, {"progress": asdict(self.done), "seed": self.config.train.seed}
                )
                save_checkpoint(checkpoint_folder(self.run_dir, self.done.step), state)
                prune_checkpoints(self.run_dir, _CHECKPOINTS_KEPT)
            self.processes.wait()

    def _evaluate(self, step: int, last: bool) -> list[Evaluation]:
        modes: tuple[EvaluationMode, ...] = ("greedy", "sampled") if last else ("greedy",)
        evaluations = [
            Evaluation(
                step, "student", evaluate(self.student, pool, self.config, mode, self.processes)
            )
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
            if self.processes.is_main:
                self.student.save(self.run_dir / "models" / "best")
        return evaluations

    # -- one step ----------------------------------------------------------------------------------

    def _step(self, step: int) -> tuple[dict[str, Any], list[TrajectoryRecord]]:
        """One optimiser cycle: rollout, scores, advantages, updates."""
        trajectories = self._collect(step)
        give_back()
        self.done.trajectories += len(trajectories)
        if not any(trajectory.turns for trajectory in trajectories):
            return self._empty_step(step), []
        batch = make_batch(trajectories, self.student.pad_id)
        scores = score_batch(self.learner, self.teacher, batch, self.config, self._times)
        advantages = self._advantages(batch, trajectories, scores, step)
        order = torch.Generator().manual_seed(seed_for(self.config.train.seed, step, "minibatches"))
        with self._times.phase("update"):
            update = update_policy(
                self.learner, self.teacher, batch, scores, advantages, self.config, order
            )
        self.done.tokens += int(batch.completion_mask.sum())
        metrics = {
            "step": step,
            **batch_metrics(batch, trajectories, scores, advantages),
            **update,
        }
        if is_adaptive(self.config.algorithm):
            metrics["anneal_progress"] = self.done.anneal_progress
            self.done.annealing = {
                "progress": moved_on(self.done.anneal_progress, metrics["solved_groups"])
            }
        drift = rendering_drift(trajectories, self._dialogue)
        if drift is not None:
            metrics["rollout/rendering_drift"] = drift
        has_teacher = self.teacher is not None
        shown = trajectories_to_show(step, batch, trajectories, advantages, has_teacher)
        return metrics, shown

    def _empty_step(self, step: int) -> dict[str, Any]:
        """The numbers of a step in which no episode could be begun."""
        if step == 1:
            raise nothing_fits()
        return {"step": step, "train_success": 0.0, "turns": 0.0, "tokens": 0}

    def _collect(self, step: int) -> list[Trajectory]:
        """The episodes of all processes; each plays its share of the groups."""
        settings = self.config.train
        generator = Generator(
            self.student,
            self._dialogue,
            temperature=settings.temperature,
            max_completion_tokens=settings.max_completion_tokens,
            completion_format=self._train_pool.completion_format,
            max_context=min(self.config.model.max_context, self.student.max_positions),
            generator=torch.Generator().manual_seed(seed_for(settings.seed, step, "rollout")),
        )
        tasks = tasks_for_step(
            self._train_pool.task_ids, step, settings.tasks_per_step, settings.seed
        )
        share = self.processes.share(len(tasks))
        groups = collect(
            self._train_pool,
            generator,
            tasks[share.start : share.stop],
            group_size=settings.group_size,
            turn_limit=turn_limit(self.config.algorithm, step, self.config.env.max_turns),
            times=self._times,
            first_episode=share.start * settings.group_size,
            episodes_in_all=len(tasks) * settings.group_size,
        )
        return self.processes.gather([t for group in groups for t in group.trajectories])

    def _advantages(
        self,
        batch: Batch,
        trajectories: Sequence[Trajectory],
        scores: TokenScores,
        step: int,
    ) -> Advantages:
        signals = Signals(
            old_logprobs=scores.logprobs,
            teacher_logprobs=scores.reference_logprobs,
            completion_mask=batch.completion_mask,
            trajectory_index=batch.trajectory_index,
            turn_index=batch.turn_index,
            turn_rewards=batch.turn_rewards,
            returns=batch.returns,
            group_index=batch.group_index,
            divergences=scores.divergences,
            turn_penalties=torch.tensor([u.penalty for t in trajectories for u in t.turns]),
        )
        return compute_advantages(signals, self.config.algorithm, step, self.done.anneal_progress)


def _parameters(policy: Policy) -> int:
    return sum(parameter.numel() for parameter in policy.model.parameters())


def _note(metrics: dict[str, Any]) -> str:
    return f"success {metrics['train_success']:.2f}, turns {metrics['turns']:.1f}"
