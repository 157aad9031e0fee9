"""Write the folder of a run while it trains: settings, metrics, checkpoints, evaluations, models.

A step is finished when its metrics are written. Its checkpoint contains them, too: a run that could
not write them restores them when it is resumed.
"""

from __future__ import annotations

import secrets
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.algorithm.schedules import ScheduleState
from atod_train.config import RunConfig
from atod_train.distributed import Processes
from atod_train.files import read_json, without_infinities, write_json
from atod_train.models.policy import Policy
from atod_train.reports.evaluations import Evaluation, EvaluationMode
from atod_train.reports.metrics import MetricsWriter, read_evaluations, read_metrics
from atod_train.reports.run_folder import (
    ANOTHER_FOLDER,
    CONFIG_FILE,
    MANIFEST_FILE,
    SUMMARY_FILE,
    RunFolderError,
    check_same_settings,
    write_config,
    write_manifest,
)
from atod_train.rollout.env_pool import EnvPool
from atod_train.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_latest,
    prune_checkpoints,
    save_checkpoint,
)
from atod_train.training.inputs import check_inputs
from atod_train.training.loggers import Loggers, LogTo
from atod_train.training.model_card import model_card
from atod_train.training.stopping import handling
from atod_train.training.update import Learner

_CHECKPOINTS_KEPT = 2


@dataclass(frozen=True)
class Progress:
    """Totals of a run so far; saved with every checkpoint."""

    step: int = 0
    minutes: float = 0.0
    tokens: int = 0
    trajectories: int = 0
    schedule: ScheduleState = field(default_factory=ScheduleState)
    """State of a schedule that follows the run."""

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Progress:
        """Return the totals in a checkpoint."""
        state = record["schedule"]
        schedule = ScheduleState(**{**state, "seen": tuple(state["seen"])})
        return cls(**{**record, "schedule": schedule})


class RunRecord:
    """Write and read the folder of a run; all ranks call each method, rank 0 writes.

    Args:
        config: the settings.
        run_dir: the folder, seen by all ranks.
        learner: its weights and moments are saved.
        processes: this rank among others.
        label: name of the run in tables.
        log: the loggers, besides the folder.

    Attributes:
        done: totals after the last finished step.
        row: metrics of the last finished step.
        saved_step: step of the newest checkpoint; 0: none.
    """

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        learner: Learner,
        processes: Processes,
        label: str,
        log: LogTo,
    ) -> None:
        self.run_dir = run_dir
        self.label = label
        self.done = Progress()
        self.row: dict[str, Any] = {}
        self.saved_step = 0
        self._config, self._learner, self._processes = config, learner, processes
        self._log = log
        self._updates = 0
        self._since = time.perf_counter()
        self._writer: MetricsWriter | None = None

    # -- begin and end -----------------------------------------------------------------------------

    @contextmanager
    def opened(
        self,
        inputs: dict[str, Any],
        pool: EnvPool,
        teacher: Policy | None,
        known: Sequence[Evaluation],
    ) -> Iterator[None]:
        """Restore the newest checkpoint if there is one, and keep the files of metrics open.

        If a failure or Ctrl-C comes before the next step changes weights, the last finished step is
        saved.

        Args:
            inputs: see `hidden_inputs`, before anything is restored.
            pool: environments of the training split.
            teacher: in this process; None: on a server, or none.
            known: evaluations of the start and the teacher, to be written once.

        Raises:
            RunFolderError: the folder contains a run with other settings, inputs or more steps.
            CheckpointError: no checkpoint can be used.
        """
        is_begun = (self.run_dir / CONFIG_FILE).is_file()
        if self._processes.is_main:
            if is_begun:
                check_same_settings(self.run_dir, self._config)
            self._describe(inputs, pool, teacher)
        self._restore()
        self._since = time.perf_counter()
        with ExitStack() as stack:
            if self._processes.is_main:
                steps = [row["step"] for row in read_metrics(self.run_dir)]
                is_lost = bool(self.row) and self.done.step not in steps
                resume_step = self.done.step - is_lost if is_begun else None
                self._writer = MetricsWriter(self.run_dir, resume_step=resume_step)
                settings = without_infinities({"label": self.label, **asdict(self._config)})
                run_id = read_json(self.run_dir / MANIFEST_FILE).get("run_id", "")
                loggers = Loggers(self._log, self.run_dir, run_id, settings, resume_step)
                self._writer.log = stack.enter_context(loggers).log
                if is_lost:
                    self._writer.write(self.row)
                there = {evaluation.key for evaluation in read_evaluations(self.run_dir)}
                for evaluation in known:
                    if evaluation.key not in there:
                        self._writer.write_evaluation(evaluation)
            try:
                yield
            except (Exception, KeyboardInterrupt):
                if self._learner.updates == self._updates and self._learner.can_save_alone:
                    # The first error is the cause. A second signal must not damage the save.
                    with suppress(AtodError, OSError), handling(signal.SIG_IGN):
                        self.save()
                raise

    def _describe(self, inputs: dict[str, Any], pool: EnvPool, teacher: Policy | None) -> None:
        """Write config and manifest, unless the run had other inputs."""
        student, config = self._learner.student, self._config
        check_inputs(inputs, read_json(self.run_dir / MANIFEST_FILE))
        # A continued run is not finished until it ends again.
        (self.run_dir / SUMMARY_FILE).unlink(missing_ok=True)
        write_config(self.run_dir, config)
        beginning = {
            "run_id": secrets.token_hex(4),
            "method": self.label,
            "env_id": config.env.id,
            "data": {"name": pool.data, "hash": pool.content_hash},
            "seeds": {"train": config.train.seed},
            "parameters": {
                "student": student.model.num_parameters(),
                "teacher": teacher.model.num_parameters() if teacher else None,
            },
            "inputs": inputs,
        }
        write_manifest(self.run_dir, beginning, str(student.device), self._processes.count)

    def _restore(self) -> None:
        checkpoint, passed = load_latest(self.run_dir)
        if checkpoint is None:
            return
        self._learner.restore(checkpoint.tensors)
        self.done = Progress.from_json(checkpoint.metadata["progress"])
        self.row = checkpoint.metadata["metrics"]
        self.saved_step = self.done.step
        if self.done.step > self._config.train.steps:
            raise RunFolderError(
                f"{self.run_dir} has {self.done.step} steps, more than train.steps="
                f"{self._config.train.steps}; ask for {self.done.step} or more, or {ANOTHER_FOLDER}"
            )
        for reason in passed if self._processes.is_main else ():
            print(f"{reason}; continuing from step {self.done.step}", file=sys.stderr)

    def finish(self) -> None:
        """Save the last model and the summary of a finished run."""
        self._count_minutes()
        if self._processes.is_main:
            evaluations = read_evaluations(self.run_dir)
            self._save_model("last", evaluations)
            totals = {
                "steps": self.done.step,
                "minutes": self.done.minutes,
                "tokens": self.done.tokens,
                "trajectories": self.done.trajectories,
                "best_step": self._best_step(evaluations),
                "finished": True,
            }
            write_json(self.run_dir / SUMMARY_FILE, totals)
            prune_checkpoints(self.run_dir, keep=1)

    # -- steps -------------------------------------------------------------------------------------

    def finish_step(
        self, done: Progress, row: dict[str, Any], shown: Iterable[dict[str, Any]]
    ) -> None:
        """Write the metrics of a step and rows of trajectories for people: it is then finished."""
        self.done, self.row, self._updates = done, row, self._learner.updates
        self._count_minutes()
        if self._writer is not None:
            self._writer.write(row)
            for trajectory in shown:
                self._writer.write_trajectory(done.step, trajectory)

    def save(self) -> None:
        """Save a checkpoint of the last finished step unless it has one."""
        if self.saved_step == self.done.step:
            return
        tensors = self._learner.tensors()
        if self._processes.is_main:
            metadata = {"progress": asdict(self.done), "metrics": without_infinities(self.row)}
            path = checkpoint_path(self.run_dir, self.done.step)
            save_checkpoint(path, Checkpoint(tensors, metadata))
            prune_checkpoints(self.run_dir, _CHECKPOINTS_KEPT)
        self.saved_step = self.done.step

    def _count_minutes(self) -> None:
        now = time.perf_counter()
        self.done = replace(self.done, minutes=self.done.minutes + (now - self._since) / 60)
        self._since = now

    # -- evaluations -------------------------------------------------------------------------------

    def evaluated(self) -> set[tuple[str, EvaluationMode]]:
        """Return the splits and modes in which the last finished step has been evaluated."""
        # Other ranks might read what rank 0 is writing.
        found = read_evaluations(self.run_dir) if self._processes.is_main else []
        own = [e.result for e in found if (e.step, e.model) == (self.done.step, "student")]
        return set(self._processes.gather([(result.split, result.mode) for result in own]))

    def add_evaluations(self, found: Sequence[Evaluation]) -> None:
        """Write evaluations of the student, and save it as models/best if it is the best so far."""
        if self._writer is None:
            return
        made = [*read_evaluations(self.run_dir), *found]
        if found and self._best_step(made) == self.done.step:
            self._save_model("best", made)
        for evaluation in found:
            self._writer.write_evaluation(evaluation)

    def _save_model(self, name: str, evaluations: Sequence[Evaluation]) -> None:
        card = model_card(self.run_dir, self._config, self.label, self.done.step, evaluations)
        self._learner.student.save(self.run_dir / "models" / name, card)

    def _best_step(self, evaluations: Sequence[Evaluation]) -> int:
        """Return the first step that solved most tasks in the first mode; 0: none."""
        solved: dict[int, list[bool]] = {}
        for evaluation in evaluations:
            is_own = evaluation.model == "student" and evaluation.step > 0
            if is_own and evaluation.result.mode == self._config.env.eval_modes[0]:
                tasks = evaluation.result.tasks
                solved.setdefault(evaluation.step, []).extend(task.success for task in tasks)
        return max(solved, key=lambda step: sum(solved[step]) / len(solved[step]), default=0)
