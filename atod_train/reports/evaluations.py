"""Define the records of an evaluation: one model on one split, task by task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atod_gym.errors import InvalidSettingError
from atod_train.records import Trajectory
from atod_train.reports.statistics import Estimate, InvalidCountsError, estimate, paired_difference

EvaluationMode = str
"""Decoding: `greedy`, the most likely token each time; `sampled`; `sampled:T` at a temperature."""

SAMPLING_TEMPERATURE = 0.4
"""Temperature of the sampled mode, as in the published validation of ALFWorld and WebShop."""

EvaluatedModel = Literal["student", "teacher"]


def temperature_of(mode: EvaluationMode) -> float:
    """Return the sampling temperature of a mode: greedy, sampled or sampled:T.

    Raises:
        InvalidSettingError: the mode is none of these.
    """
    name, _, number = mode.partition(":")
    try:
        temperature = float(number) if number else SAMPLING_TEMPERATURE
    except ValueError:
        temperature = math.nan
    if mode == "greedy":
        return 0.0
    if name != "sampled" or mode.endswith(":") or not 0 < temperature < math.inf:
        raise InvalidSettingError(
            "An evaluation is greedy, sampled, or sampled with a temperature above 0 "
            f"(sampled:0.4), not {mode!r}: change env.eval_modes."
        )
    return temperature


@dataclass(frozen=True, slots=True)
class TaskResult:
    """The result of one task of a split."""

    task_id: str
    task_type: str
    success: bool
    score: float
    """The benchmark's score, 0..1."""
    turns: int
    invalid_turns: int
    """Turns whose action was not valid."""


def task_result(episode: Trajectory) -> TaskResult:
    """Return the result of an episode."""
    return TaskResult(
        task_id=episode.task_id,
        task_type=episode.task_type,
        success=episode.success,
        score=episode.score,
        turns=len(episode.turns),
        invalid_turns=sum(not turn.is_action_valid for turn in episode.turns),
    )


@dataclass(frozen=True)
class EvaluationResult:
    """One model on one split: a record per task, and the figures computed from them."""

    split: str
    data: str
    """The data that was played: `official`, `generated` or a path."""
    mode: EvaluationMode
    tasks: tuple[TaskResult, ...]

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidCountsError(f"An evaluation on {self.split} needs at least one task.")

    @property
    def solved(self) -> NDArray[np.float64]:
        """1.0 for each task that was solved, else 0.0: [1, tasks]."""
        return np.array([[float(task.success) for task in self.tasks]])

    @property
    def successes(self) -> int:
        """Number of tasks solved."""
        return sum(task.success for task in self.tasks)

    @property
    def success_rate(self) -> float:
        """Share of tasks solved, 0..1."""
        return self.successes / len(self.tasks)

    @property
    def success(self) -> Estimate:
        """The success rate with its 95 % interval over tasks."""
        return estimate(self.solved)

    @property
    def mean_score(self) -> float:
        """Mean of the benchmark's score."""
        return math.fsum(task.score for task in self.tasks) / len(self.tasks)

    @property
    def mean_turns(self) -> float:
        """Mean length of an episode in turns."""
        return sum(task.turns for task in self.tasks) / len(self.tasks)

    @property
    def invalid_share(self) -> float:
        """Share of all turns whose action was not valid; 0 if no turn was taken."""
        turns = sum(task.turns for task in self.tasks)
        return sum(task.invalid_turns for task in self.tasks) / turns if turns else 0.0

    def by_task_type(self) -> dict[str, EvaluationResult]:
        """Return the same evaluation on the tasks of each type, by type and sorted by name."""
        return {
            name: replace(self, tasks=tuple(t for t in self.tasks if t.task_type == name))
            for name in sorted({task.task_type for task in self.tasks})
        }

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON values: every task, and the rate and interval."""
        success = self.success
        return {
            "split": self.split,
            "data": self.data,
            "mode": self.mode,
            "success_rate": self.success_rate,
            "interval": [success.low, success.high],
            "tasks": [asdict(task) for task in self.tasks],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EvaluationResult:
        """Return the record that `to_json` wrote; further keys are ignored.

        Raises:
            InvalidCountsError: a key is missing.
        """
        try:
            tasks = tuple(
                TaskResult(**{name: task[name] for name in TaskResult.__slots__})
                for task in record["tasks"]
            )
            return cls(record["split"], record["data"], record["mode"], tasks)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidCountsError(f"not the record of an evaluation: {error}") from error


@dataclass(frozen=True)
class Evaluation:
    """One line of evaluations.jsonl. The start is the student at step 0."""

    step: int
    model: EvaluatedModel
    result: EvaluationResult

    @property
    def key(self) -> tuple[EvaluatedModel, str, EvaluationMode]:
        """(model, split, mode)."""
        return self.model, self.result.split, self.result.mode


def difference_by_task(first: EvaluationResult, second: EvaluationResult) -> Estimate | None:
    """Return the first's success rate minus the second's, paired by task id.

    Returns:
        None if the two did not play the same tasks, or list one twice.
    """
    a, b = ({task.task_id: float(task.success) for task in r.tasks} for r in (first, second))
    if a.keys() != b.keys() or len(a) != len(first.tasks) or len(b) != len(second.tasks):
        return None
    order = sorted(a)
    return paired_difference(
        np.array([[a[task] for task in order]]), np.array([[b[task] for task in order]])
    )
