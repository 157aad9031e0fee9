"""One run: collect, score, weigh, update, and everything that makes it safe to stop.

All randomness of a step follows from the run's seed and the step's number, so a run that is resumed
from a checkpoint continues bit for bit (same machine, same number of threads).

A step is finished when its numbers are written. Its checkpoint comes before its evaluation, and
whatever fails after a finished step, or before the next one changes weights, saves it on the way
out; a run that is resumed first makes an evaluation that is missing.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from atod_gym.errors import AtodError
from atod_train.algorithm.atod import MIN_DISAGREEMENT
from atod_train.algorithm.methods import (
    LOW_PRECISION_DISAGREEMENT,
    Advantages,
    Signals,
    compute_advantages,
    is_adaptive,
    moved_on,
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
    EvaluatedModel,
    Evaluation,
    MetricsWriter,
    PhaseTimes,
    TrajectoryRecord,
    read_evaluations,
    read_metrics,
)
from atod_train.reports.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SUMMARY_FILE,
    RunFolderError,
    check_same_settings,
    read_json,
    without_infinities,
    write_config,
    write_manifest,
    write_summary,
)
from atod_train.reports.statistics import EvaluationMode
from atod_train.reports.step_records import batch_metrics, rendering_drift, trajectories_to_show
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import collect, nothing_fits, seed_for, tasks_for_step
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.training.bookkeeping import interruptible, memory_errors
from atod_train.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_finite,
    checkpoint_path,
    load_latest,
    model_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from atod_train.training.checks import HiddenInputs
from atod_train.training.model_card import model_card
from atod_train.training.update import Learner, score_batch, update_policy

_CHECKPOINTS_KEPT = 2
_MOST_CUT = 0.5
"""Share of completions that are cut above which a line says so."""
_LESS_IN_ROLLOUTS = (
    "Start a new run with a smaller model.max_context, train.group_size or train.tasks_per_step."
)
_LESS_IN_UPDATES = (
    "Resume with a smaller --train.tokens-per-microbatch (now {}) or with "
    "--model.gradient-checkpointing: the results stay the same."
)
_SKIPPED_IN_A_ROW = 5
"""Updates without a finite gradient after which a run ends."""


class StoppedByUser(Exception):
    """Ctrl-C or SIGTERM: the step was finished and saved; the message says how to continue."""


class DivergedError(AtodError):
    """Gradients, weights or log-probs are not finite."""


@dataclass(frozen=True)
class Progress:
    """What a run has done so far; saved with every checkpoint."""

    step: int = 0
    minutes: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    annealing: dict[str, Any] = field(default_factory=dict)
    """Of an adaptive schedule, under the key `progress`."""

    @property
    def anneal_progress(self) -> float:
        """Where an adaptive schedule stands, 0 to 1; see `atod_train.algorithm.methods`."""
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
        self._began = time.perf_counter()
        self._saved_step = 0
        self._row: dict[str, Any] = {}
        """The numbers of the last finished step."""
        self._updates = 0
        """Updates of the weights up to the end of the last finished step."""
        self._skipped_in_a_row = 0
        self._has_warned = False

    # -- the run -----------------------------------------------------------------------------------

    def run(self, resume: bool = False) -> None:
        """Train up to `train.steps` steps, evaluating and saving on the way.

        Raises:
            StoppedByUser: after Ctrl-C or SIGTERM; the last finished step is saved.
            CheckpointError, RunFolderError: files that cannot be read or written.
            DivergedError: the student's numbers are no longer finite.
            AtodError: no first prompt of the first step fits the model's context.
        """
        resumed = self._open(resume)
        settings = self.config.train
        name = self.config.study.label or self.config.algorithm.method
        with (
            self._writer(resumed) as writer,
            interruptible() as interrupted,
            progress(settings.steps, f"{name}, seed {settings.seed}") as advance,
            self._saving_if_it_fails(),
        ):
            self._began = time.perf_counter()
            advance(self.done.step)
            self._evaluate_if_due(writer)
            while self.done.step < settings.steps:
                shown = self._step(self.done.step + 1)
                give_back()
                self._count_minutes()
                self._row |= self._times.take()
                if writer is not None:
                    writer.write(self._row)
                    self._warn_of_cut_completions()
                    for trajectory in shown if self._evaluation_is_due() else ():
                        writer.write_trajectory(trajectory)
                step = self.done.step
                if step == settings.steps or step % max(1, settings.save_every) == 0:
                    self._save()
                advance(note=_note(self._row))
                self._stop_if(bool(interrupted))
                self._evaluate_if_due(writer)
                self._stop_if(bool(interrupted))
        if self.processes.is_main:
            self._finish()
        self.processes.wait()

    def _warn_of_cut_completions(self) -> None:
        """Say once that most completions end at their limit."""
        share = self._row.get("completions_cut", 0.0)
        if share > _MOST_CUT and not self._has_warned:
            self._has_warned = True
            print(
                f"step {self.done.step}: {share:.0%} of the completions were cut at "
                f"train.max_completion_tokens={self.config.train.max_completion_tokens}; an action "
                "that does not fit is invalid. Raise it in a new run.",
                file=sys.stderr,
            )

    def _stop_if(self, interrupted: bool) -> None:
        """Save and stop if a signal arrived in any process and steps are left."""
        steps = self.config.train.steps
        if self.processes.any(interrupted) and self.done.step < steps:
            if self._saved_step < self.done.step:
                self._save()
            raise StoppedByUser(f"stopped after step {self.done.step} of {steps}")

    @contextmanager
    def _saving_if_it_fails(self) -> Iterator[None]:
        """Save the last finished step when something fails while its weights are still there."""
        try:
            yield
        except Exception:
            is_there = self.learner.updates == self._updates
            if is_there and self._saved_step < self.done.step and self.learner.can_save_alone:
                with suppress(AtodError, OSError):  # what failed first says more
                    self._save(alone=True)
            raise

    def _count_minutes(self) -> None:
        now = time.perf_counter()
        self.done = replace(self.done, minutes=self.done.minutes + (now - self._began) / 60)
        self._began = now

    def _finish(self) -> None:
        self._count_minutes()
        self._save_model("last", read_evaluations(self.run_dir))
        write_summary(
            self.run_dir,
            steps=self.done.step,
            minutes=self.done.minutes,
            tokens=self.done.tokens,
            trajectories=self.done.trajectories,
            extra={"best_step": self._best()[0], "finished": True},
        )
        prune_checkpoints(self.run_dir, keep=1)

    @contextmanager
    def _writer(self, resumed: bool) -> Iterator[MetricsWriter | None]:
        """Write metrics and evaluations, in the main process."""
        if not self.processes.is_main:
            yield None
            return
        resume_step: int | None = None
        if resumed:
            rows = read_metrics(self.run_dir)
            is_lost = bool(self._row) and self.done.step not in {row["step"] for row in rows}
            resume_step = self.done.step - is_lost
        with MetricsWriter(self.run_dir, resume_step=resume_step) as writer:
            if resumed and is_lost:
                writer.write(self._row)
            if self.done.step == 0:
                there = {evaluation.board for evaluation in read_evaluations(self.run_dir)}
                for evaluation in self._known:
                    if evaluation.board not in there:
                        writer.write_evaluation(evaluation)
            yield writer

    def _open(self, resume: bool) -> bool:
        """Write config and manifest, or restore the last checkpoint; True if it resumes."""
        # Barrier: every rank must have read the folder before rank 0 writes to it.
        exists = self.processes.any((self.run_dir / CONFIG_FILE).is_file())
        if exists and not resume:
            raise RunFolderError(
                f"{self.run_dir} holds a run already; add --study.resume to continue it, or "
                "choose another folder with --study.out"
            )
        if exists:
            check_same_settings(self.run_dir, self.config)
        self.processes.wait()
        if self.processes.is_main:
            self._describe()
        checkpoint, passed = load_latest(self.run_dir)
        if checkpoint is not None:
            self.learner.restore(checkpoint.tensors)
            self.done = Progress(**checkpoint.metadata["progress"])
            self._row = checkpoint.metadata["metrics"]
            self._saved_step = self.done.step
            for reason in passed if self.processes.is_main else ():
                print(f"{reason}; continuing from step {self.done.step}", file=sys.stderr)
        self.processes.wait()
        return exists

    def _describe(self) -> None:
        """Write config and manifest; a run that continues is not finished until it ends again."""
        inputs = HiddenInputs.of(self.student, self.teacher, self._dialogue)
        template = str(self.student.tokenizer.chat_template or "")
        warning = inputs.compared(read_json(self.run_dir / MANIFEST_FILE), template)
        if warning:
            print(warning, file=sys.stderr)
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
            inputs=asdict(inputs),
        )

    def _save_model(self, name: str, evaluations: Sequence[Evaluation]) -> None:
        card = model_card(self.run_dir, self.config, self.done.step, evaluations)
        self.student.save(self.run_dir / "models" / name, card)

    def _save(self, alone: bool = False) -> None:
        """Save the last finished step; `alone`: without the other processes."""
        with self._times.phase("checkpoint"):
            tensors = self.learner.tensors()
            if self.processes.is_main:
                metadata = {
                    "progress": asdict(self.done),
                    "seed": self.config.train.seed,
                    "metrics": without_infinities(self._row),
                }
                path = checkpoint_path(self.run_dir, self.done.step)
                save_checkpoint(path, Checkpoint(tensors, metadata))
                prune_checkpoints(self.run_dir, _CHECKPOINTS_KEPT)
            self._saved_step = self.done.step
            if not alone:
                self.processes.wait()

    # -- evaluations -------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        step, settings = self.done.step, self.config.train
        every = settings.eval_every
        return step > 0 and (step == settings.steps or bool(every and step % every == 0))

    def _evaluate_if_due(self, writer: MetricsWriter | None) -> None:
        """Evaluate the student where the last finished step asks for it and it is not there yet."""
        if not self._evaluation_is_due():
            return
        step = self.done.step
        last = step == self.config.train.steps
        modes: tuple[EvaluationMode, ...] = ("greedy", "sampled") if last else ("greedy",)
        # The main process decides: it alone writes.
        there = self._boards(step) if writer is not None else set()
        there = set(self.processes.gather(sorted(there)))
        found: list[Evaluation] = []
        with self._times.phase("evaluation"):
            for mode in modes:
                for pool in self._eval_pools:
                    if ("student", pool.split, mode) not in there:
                        with memory_errors(f"evaluating step {step}", _LESS_IN_ROLLOUTS):
                            result = evaluate(self.student, pool, self.config, mode, self.processes)
                        found.append(Evaluation(step, "student", result))
        if writer is None or not found:
            return
        if _greedy_success(found) > self._best()[1]:
            self._save_model("best", [*read_evaluations(self.run_dir), *found])
        for evaluation in found:
            writer.write_evaluation(evaluation)

    def _boards(self, step: int) -> set[tuple[EvaluatedModel, str, EvaluationMode]]:
        """What the student of a step was evaluated on."""
        made = read_evaluations(self.run_dir)
        return {e.board for e in made if (e.step, e.model) == (step, "student")}

    def _best(self) -> tuple[int, float]:
        """Step and greedy success of the best student so far; the earliest of equal ones."""
        by_step: dict[int, list[Evaluation]] = {}
        for evaluation in read_evaluations(self.run_dir):
            if evaluation.model == "student" and evaluation.step:
                by_step.setdefault(evaluation.step, []).append(evaluation)
        best = (0, -1.0)
        for step, evaluations in by_step.items():
            if (success := _greedy_success(evaluations)) > best[1]:
                best = (step, success)
        return best

    # -- one step ----------------------------------------------------------------------------------

    def _step(self, step: int) -> list[TrajectoryRecord]:
        """Make one optimiser cycle: rollout, scores, advantages, updates.

        Returns:
            Trajectories to show; the step's numbers are in `_row`.
        """
        with memory_errors(f"playing the episodes of step {step}", _LESS_IN_ROLLOUTS):
            trajectories = self._collect(step)
        give_back()
        done = replace(
            self.done, step=step, trajectories=self.done.trajectories + len(trajectories)
        )
        if not any(trajectory.turns for trajectory in trajectories):
            self._row, self.done = self._empty_step(step), done
            return []
        batch = make_batch(trajectories, self.student.pad_id)
        advice = _LESS_IN_UPDATES.format(self.config.train.tokens_per_microbatch)
        with memory_errors(f"scoring the tokens of step {step}", advice):
            scores = score_batch(self.learner, self.teacher, batch, self.config, self._times)
        _check_scores(scores, batch, step)
        try:
            advantages = self._advantages(batch, trajectories, scores, step)
        except ValueError as error:
            raise AtodError(f"Step {step}: {error}.") from error
        order = torch.Generator().manual_seed(seed_for(self.config.train.seed, step, "minibatches"))
        with (
            self._times.phase("update"),
            memory_errors(f"updating the weights in step {step}", advice),
        ):
            update = update_policy(
                self.learner, self.teacher, batch, scores, advantages, self.config, order
            )
            self._check_update(update, step)
        metrics = {
            "step": step,
            **batch_metrics(batch, trajectories, scores, advantages),
            **update,
        }
        if is_adaptive(self.config.algorithm):
            metrics["anneal_progress"] = done.anneal_progress
            moved = moved_on(done.anneal_progress, metrics["solved_groups"])
            done = replace(done, annealing={"progress": moved})
        drift = rendering_drift(trajectories, self._dialogue)
        if drift is not None:
            metrics["rollout/rendering_drift"] = drift
        has_teacher = self.teacher is not None
        shown = trajectories_to_show(step, batch, trajectories, advantages, has_teacher)
        self.done = replace(done, tokens=done.tokens + int(batch.completion_mask.sum()))
        self._row, self._updates = metrics, self.learner.updates
        return shown

    def _check_update(self, update: Mapping[str, float], step: int) -> None:
        """Refuse weights that are not finite, and more skipped updates in a row than happen.

        Raises:
            DivergedError: nothing of this step is saved.
        """
        skipped = int(update["skipped_updates"])
        none_made = math.isnan(update["grad_norm"])
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if none_made else 0
        last = f"The checkpoint of step {self._saved_step} is kept." if self._saved_step else ""
        if self._skipped_in_a_row >= _SKIPPED_IN_A_ROW:
            raise DivergedError(
                f"The gradients of {self._skipped_in_a_row} updates up to step {step} were not "
                "finite. Lower train.lr, or use --model.dtype float32, in a new run (--study.out). "
                f"{last}".rstrip()
            )
        try:
            check_finite(model_tensors(self.student.model), f"Step {step} left broken weights")
        except CheckpointError as error:
            raise DivergedError(
                f"{error}. Lower train.lr in a new run (--study.out). {last}".rstrip()
            ) from error

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
            temperature=1.0,
            max_completion_tokens=settings.max_completion_tokens,
            completion_format=self._train_pool.completion_format,
            max_context=self.config.model.max_context,
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
        return compute_advantages(
            signals,
            self.config.algorithm,
            step,
            self.done.anneal_progress,
            min_disagreement=self._rounding(),
        )

    def _rounding(self) -> float:
        """Return the disagreement, nats per token, that two equal models can have here."""
        scored = [self.student]
        if isinstance(self.teacher, LocalTeacher):
            scored.append(self.teacher.policy)
        is_low = any(policy.layer_dtype != torch.float32 for policy in scored)
        return LOW_PRECISION_DISAGREEMENT if is_low else MIN_DISAGREEMENT


def _parameters(policy: Policy) -> int:
    return sum(parameter.numel() for parameter in policy.model.parameters())


def _greedy_success(evaluations: Sequence[Evaluation]) -> float:
    """Share of the tasks of all splits that were solved greedily; -1 where none was played."""
    greedy = [e.result for e in evaluations if e.result.mode == "greedy"]
    tasks = sum(len(result.tasks) for result in greedy)
    return sum(result.successes for result in greedy) / tasks if tasks else -1.0


def _check_scores(scores: TokenScores, batch: Batch, step: int) -> None:
    """Refuse log-probs that are not finite before anything is computed from them.

    Raises:
        DivergedError: names whose they are.
    """
    models = {
        "student": ("logprobs", "entropies", "divergences"),
        "teacher": ("reference_logprobs",),
    }
    for model, names in models.items():
        for name in names:
            values = getattr(scores, name)
            if values is not None and not values[batch.completion_mask].isfinite().all():
                raise DivergedError(
                    f"Step {step}: {name} of the {model} are not finite. "
                    + (
                        "Lower train.lr in a new run (--study.out), or use --model.dtype float32."
                        if model == "student"
                        else "The teacher cannot score what the student sampled: check its weights "
                        "and its vocabulary."
                    )
                )


def _note(metrics: dict[str, Any]) -> str:
    return f"success {metrics['train_success']:.2f}, turns {metrics['turns']:.1f}"
