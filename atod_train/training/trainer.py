"""Train one student: rollout, scores, advantages, updates; evaluations, checkpoints and stopping.

The seed of the run and the number of the step determine all randomness of a step, so a run that is
resumed from a checkpoint continues bit for bit (same machine, same number of threads).

A step is saved before it is evaluated. If a failure, Ctrl-C or SIGTERM comes before the next step
changes weights, the last finished step is saved. Updates are finished first, and rollouts and
evaluations of several processes. A resumed run first makes an evaluation that is missing.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.accelerator import synchronize

from atod_gym.errors import AtodError
from atod_train.algorithm.atod import MIN_DISAGREEMENT
from atod_train.algorithm.methods import (
    LOW_PRECISION_DISAGREEMENT,
    compute_advantages,
    needs_teacher,
    scores_teacher,
    turn_limit,
)
from atod_train.algorithm.schedules import advanced, has_state, measures_teacher
from atod_train.batch import make_batch
from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.evaluation.evaluate import evaluate
from atod_train.memory import give_back, memory_errors
from atod_train.models.budgets import tokens_at_once
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.policy import Policy
from atod_train.progress import PhaseTimes, progress
from atod_train.records import Trajectory
from atod_train.reports.evaluations import Evaluation
from atod_train.reports.step_records import (
    batch_metrics,
    rendering_drift,
    rows_to_show,
    throughput,
)
from atod_train.rollout.env_pool import EnvPool
from atod_train.rollout.rollout import (
    collect,
    make_sampler,
    nothing_fits,
    seed_for,
    tasks_for_step,
)
from atod_train.teachers.local import LocalTeacher, Teacher
from atod_train.teachers.remote import RemoteTeacher
from atod_train.training.checks import check_scores, check_update
from atod_train.training.inputs import hidden_inputs
from atod_train.training.loggers import LogTo
from atod_train.training.run_record import RunRecord
from atod_train.training.stopping import StoppedByUser, interruptible
from atod_train.training.update import Learner, learning_rate, score_batch, update_policy

_MOST_CUT = 0.5
"""A larger share of cut completions is reported."""
_LESS_IN_ROLLOUTS = (
    "Start a new run with a smaller model.max_context, train.group_size or train.tasks_per_step."
)
_LESS_IN_UPDATES = (
    "Resume with a smaller --train.tokens-per-microbatch (now {}) or with "
    "--model.gradient-checkpointing: the results stay the same."
)


class Trainer:
    """Train one student with one method and one seed.

    Args:
        config: the settings.
        run_dir: folder of the run; all ranks see it, rank 0 writes.
        student: the start; it is changed.
        teacher: frozen; None for a method that needs none.
        train_pool: environments of the training split.
        eval_pools: environments of the evaluation splits.
        known: evaluations of the start and the teacher.
        processes: this rank among those that train the student.
        label: name of the run in tables and progress; empty: its method.
        log: where its numbers go besides the folder; None: TensorBoard.
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
        label: str = "",
        log: LogTo | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.student = student
        self.teacher = teacher if needs_teacher(config.algorithm.method) else None
        self.processes = processes or Processes()
        self.learner = Learner(student, config.train.lr, self.processes)
        self._train_pool, self._eval_pools, self._known = train_pool, eval_pools, known
        self._dialogue = self._dialogue_of(student)
        label = label or config.algorithm.method
        self._times = PhaseTimes(
            None if student.device.type == "cpu" else partial(synchronize, student.device)
        )
        self._record = RunRecord(
            config, run_dir, self.learner, self.processes, label, log or LogTo()
        )
        self._skipped_in_a_row = 0
        self._has_warned = False
        self._interrupted: list[float] = []
        self._can_stop = False

    def _dialogue_of(self, policy: Policy) -> DialogueEncoder:
        env = self.config.env
        return DialogueEncoder(policy.tokenizer, env.prompt_style, env.template_options)

    # -- the run -----------------------------------------------------------------------------------

    def run(self) -> None:
        """Train up to `train.steps` steps, evaluating and saving on the way.

        A run that the folder holds is continued.

        Raises:
            StoppedByUser: Ctrl-C or SIGTERM; the last finished step is saved.
            CheckpointError, RunFolderError: files that cannot be read or written.
            DivergedError: weights, gradients or log-probs are no longer finite.
            OutOfMemory: the message says which settings need less.
            AtodError: no first prompt of the first step fits the model's context.
        """
        settings, record = self.config.train, self._record
        teacher = self.teacher.policy if isinstance(self.teacher, LocalTeacher) else None
        pools = (self._train_pool, *self._eval_pools)
        inputs = hidden_inputs(self.student, self.teacher, self._dialogue, pools)
        with (
            interruptible(on_signal=self._on_signal) as self._interrupted,
            record.opened(inputs, self._train_pool, teacher, self._known),
            progress(
                settings.steps, f"{record.label}, seed {settings.seed}", initial=record.done.step
            ) as advance,
        ):
            if isinstance(self.teacher, RemoteTeacher):
                self.teacher.interrupted = self._interrupted
            if measures_teacher(self.config.algorithm) and not record.done.schedule.teacher_success:
                self._measure(teacher)
            self._times.take()  # what came before belongs to no step
            self._evaluate_if_due()
            while record.done.step < settings.steps:
                self._step(record.done.step + 1)
                give_back()
                step = record.done.step
                if self._is_evaluated_after(step) or step % settings.save_every == 0:
                    self._save()
                self._warn_of_cut_completions()
                row = record.row
                note = f"success {row['train_success']:.2f}, turns {row['turns']:.1f}"
                advance(note=note, tokens=int(row["tokens"]))
                self._evaluate_if_due()
        record.finish()

    def _save(self) -> None:
        with self._times.phase("checkpoint"):
            self._record.save()

    @contextmanager
    def _repeatable(self) -> Iterator[None]:
        """Let a signal stop the run in a block that changes nothing: a resumed run repeats it.

        Several processes stop before the block, all together: the others would wait for one.
        """
        self._can_stop = self.processes.count == 1
        try:
            if self.processes.any(bool(self._interrupted)):
                self._save()
                self._stop()
            yield
        finally:
            self._can_stop = False

    def _stop(self) -> NoReturn:
        step, steps = self._record.done.step, self.config.train.steps
        raise StoppedByUser(f"stopped after step {step} of {steps}")

    def _on_signal(self, number: int) -> None:
        if self._can_stop:
            self._stop()

    def _is_evaluated_after(self, step: int) -> bool:
        settings = self.config.train
        every = settings.eval_every
        return step > 0 and (step == settings.steps or bool(every and step % every == 0))

    def _evaluate_if_due(self) -> None:
        """Evaluate the last finished step if it is to be and is not yet."""
        step = self._record.done.step
        if not self._is_evaluated_after(step):
            return
        last = step == self.config.train.steps
        modes = self.config.env.eval_modes[: None if last else 1]
        evaluated = self._record.evaluated()
        found: list[Evaluation] = []
        with (
            self._repeatable(),
            self._times.phase("evaluation"),
            memory_errors(f"evaluating step {step}", _LESS_IN_ROLLOUTS),
        ):
            for mode in modes:
                for pool in self._eval_pools:
                    if (pool.split, mode) not in evaluated:
                        result = evaluate(
                            self.student,
                            pool,
                            self.config,
                            mode,
                            self.processes,
                            self.config.model.sampler,
                        )
                        found.append(Evaluation(step, "student", result))
        self._record.add_evaluations(found)

    def _warn_of_cut_completions(self) -> None:
        """Report once that most completions end at their token limit."""
        share = self._record.row.get("completions_cut", 0.0)
        if share > _MOST_CUT and self.processes.is_main and not self._has_warned:
            self._has_warned = True
            print(
                f"step {self._record.done.step}: {share:.0%} of the completions were cut at "
                f"train.max_completion_tokens={self.config.train.max_completion_tokens}; an action "
                "that does not fit is invalid. Raise it in a new run.",
                file=sys.stderr,
            )

    # -- one step ----------------------------------------------------------------------------------

    def _step(self, step: int) -> None:
        """Make one optimiser cycle: rollout, scores, advantages, updates, metrics."""
        config, record = self.config, self._record
        trajectories = self._collect(step)
        played = record.done.trajectories + len(trajectories)
        done = replace(record.done, step=step, trajectories=played)
        if not any(trajectory.turns for trajectory in trajectories):
            if step == 1:
                raise nothing_fits()
            row = {"step": step, "train_success": 0.0, "turns": 0.0, "tokens": 0}
            record.finish_step(done, row | self._times.take(), ())
            return
        batch = make_batch(trajectories, self.student.pad_id)
        algorithm, schedule = config.algorithm, done.schedule
        teacher = self.teacher if scores_teacher(algorithm, step, schedule.progress) else None
        budget = config.train.tokens_per_microbatch or tokens_at_once(self.student)
        advice = _LESS_IN_UPDATES.format(budget)
        with self._repeatable(), memory_errors(f"scoring the tokens of step {step}", advice):
            scores = score_batch(self.learner, teacher, batch, config, self._times)
        check_scores(scores, batch.completion_mask, step)
        try:
            advantages = compute_advantages(
                batch, scores, algorithm, step, schedule.progress, self._rounding()
            )
        except ValueError as error:
            raise AtodError(f"Step {step}: {error}.") from error
        order = torch.Generator().manual_seed(seed_for(config.train.seed, step, "minibatches"))
        self.learner.set_lr(learning_rate(config.train, step))
        with (
            self._times.phase("update"),
            memory_errors(f"updating the weights in step {step}", advice),
        ):
            update = update_policy(self.learner, teacher, batch, scores, advantages, config, order)
        skipped, is_none_made = int(update["skipped_updates"]), math.isnan(update["grad_norm"])
        self._skipped_in_a_row = self._skipped_in_a_row + skipped if is_none_made else 0
        check_update(self.student.model, self._skipped_in_a_row, step, record.saved_step)
        row = {"step": step, **batch_metrics(batch, trajectories, scores, advantages), **update}
        if has_state(algorithm):
            row["anneal_progress"] = schedule.progress
            if schedule.teacher_success is not None:
                row["teacher_success"] = schedule.teacher_success
            done = replace(done, schedule=advanced(schedule, algorithm, row))
        drift = rendering_drift(trajectories, self._dialogue)
        if drift is not None:
            row["rollout/rendering_drift"] = drift
        shown: Sequence[dict[str, Any]] = ()
        if self._is_evaluated_after(step):
            shown = rows_to_show(batch, trajectories, advantages, teacher is not None)
        tokens = int(batch.completion_mask.sum())
        done = replace(done, tokens=done.tokens + tokens)
        seconds = self._times.take()
        row |= {**seconds, "tokens_per_second": throughput(tokens, seconds)}
        record.finish_step(done, row, shown)

    def _rounding(self) -> float:
        """Return the disagreement, nats per token, that rounding can give two equal models."""
        is_exact = self.teacher is None or self.teacher.is_float32
        is_exact = is_exact and self.student.layer_dtype == torch.float32
        return MIN_DISAGREEMENT if is_exact else LOW_PRECISION_DISAGREEMENT

    def _measure(self, teacher: Policy | None) -> None:
        """Let the teacher play the tasks of the first step, and keep its success for schedule gap.

        Raises:
            AtodError: it solves none.
        """
        assert teacher is not None  # a server is refused before any work
        record = self._record
        episodes = self._collect(1, teacher)
        success = sum(episode.success for episode in episodes) / len(episodes)
        shown = f"{success:.1%} of {len(episodes)} episodes of training tasks"
        if not success:
            raise AtodError(
                f"The teacher solved {shown}: schedule gap has nothing to compare with. Use a "
                "better teacher, another --algorithm.schedule, or give its success (gap:0.62)."
            )
        if self.processes.is_main:
            print(f"{record.label}: the teacher solves {shown}", file=sys.stderr)
        schedule = replace(record.done.schedule, teacher_success=success)
        record.done = replace(record.done, schedule=schedule)

    def _collect(self, step: int, player: Policy | None = None) -> list[Trajectory]:
        """Return the episodes of all ranks; each plays its share of the groups.

        Args:
            step: draws tasks and samples.
            player: None: the student.
        """
        settings = self.config.train
        sampler = make_sampler(
            player or self.student,
            self._dialogue_of(player) if player else self._dialogue,
            self._train_pool,
            self.config,
            temperature=1.0,
            seed=seed_for(settings.seed, step, "rollout"),
            engine="plain" if player else self.config.model.sampler,
        )
        tasks = tasks_for_step(
            self._train_pool.task_ids, step, settings.tasks_per_step, settings.seed
        )
        count = len(self.processes.share(len(tasks))) * settings.group_size
        with (
            self._repeatable(),
            memory_errors(f"playing the episodes of step {step}", _LESS_IN_ROLLOUTS),
            progress(count, f"rollout {step}", is_part=True) as advance,
        ):
            own = collect(
                self._train_pool,
                sampler,
                tasks,
                group_size=settings.group_size,
                turn_limit=turn_limit(self.config.algorithm, step, self.config.env.max_turns),
                times=self._times,
                processes=self.processes,
                on_end=lambda _: advance(),
                on_turn=lambda tokens: advance(0, tokens=tokens),
            )
            return self.processes.gather(own)
