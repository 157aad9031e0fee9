"""Intervals for success rates and the record of one evaluation; no torch, no scipy.

All but the bootstrap is closed form or a bisection on a monotone function, so that the numbers in
a report can be checked by hand; the bootstrap has a fixed seed. Sources: Wilson (1927), Newcombe
(1998, Statistics in Medicine 17, 873-890, method 10), Tango (1998, Statistics in Medicine 17,
891-908), Abramowitz and Stegun 26.7.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from atod_gym.errors import AtodError

EvaluationMode = Literal["greedy", "sampled"]
"""How completions were chosen: the likeliest token each time, or at the sampling temperature."""

Interval = tuple[float, float]
"""(low, high)."""


class InvalidCountsError(AtodError, ValueError):
    """Counts or values that no interval can be made of."""


def _normal_quantile(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise InvalidCountsError(f"confidence must lie between 0 and 1, not {confidence}")
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _check_counts(successes: float, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise InvalidCountsError(
            f"{successes} successes of {n} tasks is no rate: give at least one task"
        )


def wilson_interval(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion (Wilson 1927), without continuity correction.

    Args:
        successes: tasks solved, 0..n. Where tasks were played more than once, the sum of their
            shares: the interval is then too wide rather than too narrow, since shares vary less.
        n: tasks played, at least 1.
        confidence: two-sided level.

    Returns:
        (low, high), within [0, 1].

    Raises:
        InvalidCountsError: the counts are no rate.
    """
    _check_counts(successes, n)
    z = _normal_quantile(confidence)
    rate = successes / n
    denominator = 1 + z * z / n
    centre = (rate + z * z / (2 * n)) / denominator
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / denominator
    # The bounds at 0 and n are exactly 0 and 1; rounding must not move them.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return low, high


def difference_interval(
    s1: float, n1: int, s2: float, n2: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of `s1/n1 - s2/n2` for different (unpaired) tasks: Newcombe's hybrid score method.

    Args:
        s1: successes of the first group.
        n1: tasks of the first group.
        s2: successes of the second group.
        n2: tasks of the second group.
        confidence: two-sided level.

    Returns:
        (low, high), within [-1, 1].

    Raises:
        InvalidCountsError: the counts are no rates.
    """
    low1, high1 = wilson_interval(s1, n1, confidence)
    low2, high2 = wilson_interval(s2, n2, confidence)
    rate1, rate2 = s1 / n1, s2 / n2
    difference = rate1 - rate2
    low = difference - math.hypot(rate1 - low1, high2 - rate2)
    high = difference + math.hypot(high1 - rate1, rate2 - low2)
    return max(-1.0, low), min(1.0, high)


def _bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of a function that falls from positive at `low` to negative at `high`."""
    for _ in range(80):
        middle = (low + high) / 2
        if function(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def tango_interval(first_only: int, second_only: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of the difference of two paired proportions (Tango 1998, eq. 24-26).

    Args:
        first_only: pairs in which only the first succeeded.
        second_only: pairs in which only the second succeeded.
        n: all pairs, the concordant ones too.
        confidence: two-sided level.

    Returns:
        (low, high) of rate(first) - rate(second), within [-1, 1]. It contains 0 exactly when
        McNemar's test does not reject.

    Raises:
        InvalidCountsError: the counts are no table of pairs.
    """
    b, c = first_only, second_only
    if n < 1 or b < 0 or c < 0 or b + c > n:
        raise InvalidCountsError(f"{b} and {c} differing pairs among {n} are no table of pairs")
    z = _normal_quantile(confidence)
    estimate = (b - c) / n

    def statistic(delta: float) -> float:
        # q: likeliest probability of "second only" given that the difference is delta.
        linear = (2 * n - b + c) * delta - b - c
        constant = -c * delta * (1 - delta)
        root = math.sqrt(max(0.0, linear * linear - 8 * n * constant))
        q = (root - linear) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        distance = b - c - n * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    edge = 1 - 1e-12
    low = -1.0 if c == n else _bisect(lambda x: statistic(x) - z, -edge, estimate)
    high = 1.0 if b == n else _bisect(lambda x: statistic(x) + z, estimate, edge)
    return low, high


def paired_difference_interval(
    a: Sequence[bool], b: Sequence[bool], confidence: float = 0.95
) -> Interval:
    """Interval of mean(a) - mean(b) where position i of both is the same task (Tango 1998).

    It is narrower than `difference_interval` as far as both solve the same tasks.

    Raises:
        InvalidCountsError: the lengths differ or are zero.
    """
    if len(a) != len(b):
        raise InvalidCountsError(
            f"paired results need the same tasks in the same order: {len(a)} against {len(b)}"
        )
    first_only = sum(1 for x, y in zip(a, b, strict=True) if x and not y)
    second_only = sum(1 for x, y in zip(a, b, strict=True) if y and not x)
    return tango_interval(first_only, second_only, len(a), confidence)


def _student_probability(angle: float, degrees: int) -> float:
    """P(|t| <= sqrt(degrees) * tan(angle)) for whole degrees of freedom (A&S 26.7.3, 26.7.4)."""
    cosine_squared = math.cos(angle) ** 2
    if degrees % 2 == 0:
        term = total = 1.0
        for i in range(1, degrees // 2):
            term *= cosine_squared * (2 * i - 1) / (2 * i)
            total += term
        return math.sin(angle) * total
    total, term = 0.0, math.cos(angle)
    for i in range(1, (degrees - 1) // 2 + 1):
        total += term
        term *= cosine_squared * (2 * i) / (2 * i + 1)
    return 2 / math.pi * (angle + math.sin(angle) * total)


def student_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence for `degrees` >= 1 degrees of freedom."""
    if not 0.0 < confidence < 1.0 or degrees < 1:
        raise InvalidCountsError(f"no t quantile for {confidence} and {degrees} degrees")
    angle = _bisect(lambda x: confidence - _student_probability(x, degrees), 0.0, math.pi / 2)
    return math.sqrt(degrees) * math.tan(angle)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Interval of the mean over independent values such as seeds (Student's t).

    Args:
        values: one number per seed.
        confidence: two-sided level.

    Returns:
        (low, high); (-inf, inf) for a single value, which says nothing about the spread.

    Raises:
        InvalidCountsError: there is no value.
    """
    n = len(values)
    if n == 0:
        raise InvalidCountsError("an interval of a mean needs at least one value")
    if n == 1:
        return -math.inf, math.inf
    mean = math.fsum(values) / n
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = student_quantile(confidence, n - 1) * math.sqrt(variance / n)
    return mean - half, mean + half


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, draws: int = 5000, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean of `values`, such as differences task by task.

    The same values give the same interval.

    Raises:
        InvalidCountsError: there are no values.
    """
    if not values:
        raise InvalidCountsError("a bootstrap needs at least one value")
    observed = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = [observed[rng.integers(len(observed), size=len(observed))].mean() for _ in range(draws)]
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class TaskResult:
    """How one task of a split went."""

    task_id: str
    task_type: str
    success: float
    """Share of its plays that succeed: 0 or 1 where there was one."""
    score: float
    """A mean over plays, as all that follow."""
    turns: float
    invalid_turns: float
    """Turns whose action was not valid."""
    actions: tuple[tuple[str, float], ...] = ()
    """(verb, how often it was used in a valid action), sorted."""


@dataclass(frozen=True, slots=True)
class TaskTypeRow:
    """One line of a table per task type."""

    task_type: str
    tasks: int
    successes: float
    """Sum over its tasks of the share of plays that succeed."""
    success_rate: float
    interval: Interval
    mean_turns: float


@dataclass(frozen=True)
class EvaluationResult:
    """One model on one split: a record per task, and the figures that follow from them."""

    split: str
    data: str
    """Which data was played: `official`, `generated` or a path."""
    mode: EvaluationMode
    tasks: tuple[TaskResult, ...]
    plays: int = 1
    """Of each task."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise InvalidCountsError(f"an evaluation on {self.split} needs at least one task")

    @property
    def successes(self) -> float:
        """Number of tasks solved; where they were played more than once, the sum of the shares."""
        return math.fsum(task.success for task in self.tasks)

    @property
    def success_rate(self) -> float:
        """Share of tasks solved, 0..1."""
        return self.successes / len(self.tasks)

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the success rate (see `wilson_interval` for several plays)."""
        return wilson_interval(self.successes, len(self.tasks))

    @property
    def mean_score(self) -> float:
        """Mean of the benchmark's own number."""
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

    def actions_per_episode(self) -> dict[str, float]:
        """Verb -> mean number of valid actions of an episode that begin with it."""
        counts: defaultdict[str, float] = defaultdict(float)
        for task in self.tasks:
            for verb, count in task.actions:
                counts[verb] += count
        return {verb: count / len(self.tasks) for verb, count in sorted(counts.items())}

    def by_task_type(self) -> tuple[TaskTypeRow, ...]:
        """One row per task type, sorted by name."""
        rows = []
        for task_type in sorted({task.task_type for task in self.tasks}):
            chosen = [task for task in self.tasks if task.task_type == task_type]
            successes = math.fsum(task.success for task in chosen)
            rows.append(
                TaskTypeRow(
                    task_type=task_type,
                    tasks=len(chosen),
                    successes=successes,
                    success_rate=successes / len(chosen),
                    interval=wilson_interval(successes, len(chosen)),
                    mean_turns=sum(task.turns for task in chosen) / len(chosen),
                )
            )
        return tuple(rows)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values: every task, and the rate and interval for other readers."""
        low, high = self.interval
        return {
            "split": self.split,
            "data": self.data,
            "mode": self.mode,
            "plays": self.plays,
            "success_rate": self.success_rate,
            "interval": [low, high],
            "tasks": [asdict(task) for task in self.tasks],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> EvaluationResult:
        """Reads what `to_json` wrote; further keys are ignored.

        Raises:
            InvalidCountsError: a key is missing or a task has other fields.
        """
        try:
            tasks = tuple(_task_result(task) for task in record["tasks"])
            plays = int(record.get("plays", 1))
            return cls(record["split"], record["data"], record["mode"], tasks, plays)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidCountsError(f"not the record of an evaluation: {error}") from error


def _task_result(task: Mapping[str, Any]) -> TaskResult:
    actions = tuple((str(verb), float(count)) for verb, count in task.get("actions", ()))
    return TaskResult(**{**task, "actions": actions})


def paired_by_task(first: EvaluationResult, second: EvaluationResult) -> Interval | None:
    """95 % interval of the first's success rate minus the second's, paired by task id.

    Tango's; a bootstrap over tasks where they were played more than once. None where the two did
    not play the same tasks, or list one twice, so that nothing can be paired.
    """
    a = {task.task_id: task.success for task in first.tasks}
    b = {task.task_id: task.success for task in second.tasks}
    if a.keys() != b.keys() or len(a) != len(first.tasks) or len(b) != len(second.tasks):
        return None
    order = sorted(a)
    if first.plays > 1 or second.plays > 1:
        return bootstrap_interval([a[key] - b[key] for key in order])
    return paired_difference_interval(
        [bool(a[key]) for key in order], [bool(b[key]) for key in order]
    )
