"""What a study says, with intervals: success, differences paired by task, courses and cost.

Success of one model is a matrix, replicates x tasks: 0 or 1, or the share of several plays.
Intervals of means are percentile intervals of a crossed bootstrap (the "pigeonhole" bootstrap: Owen
2007, Annals of Applied Statistics 1, 386-411): replicates and tasks are drawn again with
replacement, independently of each other, so that both the luck of a seed and the choice of tasks
are in the interval. Its limits:

- With one replicate only tasks are drawn again: the spread between seeds is not in the interval.
- With few replicates the spread between them comes out too small, on average by the factor
  (n - 1) / n in the variance, as in every bootstrap of n values.
- Start and teacher were made once for each piece. Where a label is compared with them, its
  replicates of a piece share that piece's evaluation and are drawn as if they did not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atod_train.reports.statistics import Interval, mean_interval, wilson_interval
from atod_train.studies.study_pieces import StudyEnvironment, StudyRun
from atod_train.studies.study_results import STILL

Which = Literal["last", "best"]
"""The last evaluation, or the best of a run: of each split and mode its own best."""

Verdict = Literal["holds", "does not hold", "undecided", "one seed"]

DRAWS = 5000
_Replicate = tuple[int, "int | None"]
"""(piece, seed); no seed for a model that does not train."""


@dataclass(frozen=True)
class Estimate:
    """A mean over replicates and tasks; shares, or differences of shares."""

    value: float
    low: float
    high: float
    replicates: int
    tasks: int


@dataclass(frozen=True)
class Cost:
    """What a run of a label takes on average."""

    minutes: float
    episodes: float
    tokens: float
    """Completion tokens sampled."""
    phases: dict[str, float]
    """Phase of a step -> its share of the time of all of them, in percent."""


@dataclass(frozen=True)
class Band:
    """A mean over replicates at some steps, with a 95 % interval."""

    steps: tuple[int, ...]
    means: tuple[float, ...]
    lows: tuple[float, ...]
    highs: tuple[float, ...]
    replicates: int


# -- intervals ------------------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _counts(size: int, axis: int, draws: int, seed: int) -> NDArray[np.float64]:
    """How often each of `size` things is drawn in each draw: [draws, size]."""
    rng = np.random.default_rng((seed, axis))
    return rng.multinomial(size, [1 / size] * size, size=draws).astype(np.float64)


def crossed_means(
    matrix: NDArray[np.float64], draws: int = DRAWS, seed: int = 0
) -> NDArray[np.float64]:
    """Means of a matrix whose rows and columns are drawn again (Owen 2007).

    Args:
        matrix: [replicates, tasks].
        draws: how many.
        seed: of the draws; the same seed gives the same draws.

    Returns:
        [draws]. A matrix with one row has its columns drawn again only.
    """
    rows, columns = matrix.shape
    sums = _counts(rows, 0, draws, seed) @ matrix
    means: NDArray[np.float64] = (sums * _counts(columns, 1, draws, seed)).sum(axis=1)
    return means / (rows * columns)


def crossed_estimate(matrix: NDArray[np.float64], confidence: float = 0.95) -> Estimate:
    """The mean of a matrix [replicates, tasks] with its percentile interval."""
    tail = 50 * (1 - confidence)
    low, high = np.percentile(crossed_means(matrix), [tail, 100 - tail])
    return Estimate(float(matrix.mean()), float(low), float(high), *matrix.shape)


def rate(
    environment: StudyEnvironment,
    model: str,
    mode: str,
    split: str | None = None,
    which: Which = "last",
) -> Estimate | None:
    """Success of a model: mean over replicates and tasks.

    Args:
        environment: where.
        model: a label, `start` or `teacher`. Replicates of the last two are the pieces.
        mode: how completions were chosen: `greedy` or `sampled`.
        split: tasks of this split; None: those of all splits together.
        which: of a label, the last evaluation or the best. Over several splits, the best is made
            of each split's own best, which may come from different steps.

    Returns:
        None where there is no such evaluation.
    """
    rows = _rows(environment, model, mode, split, which)
    return crossed_estimate(np.stack(list(rows.values()))) if rows else None


def difference(
    environment: StudyEnvironment,
    first: str,
    second: str,
    mode: str,
    split: str | None = None,
    which: Which = "last",
) -> Estimate | None:
    """Success of one model minus that of another, paired by replicate and task.

    Two labels are paired where both have the same seed in the same piece; other replicates are left
    out. A label is paired with the start or teacher of its own piece.

    Args:
        environment: where.
        first: a label, `start` or `teacher`.
        second: the same.
        mode: as in `rate`.
        split: as in `rate`.
        which: as in `rate`.

    Returns:
        None where nothing can be paired.
    """
    a = _rows(environment, first, mode, split, which)
    b = _rows(environment, second, mode, split, which)
    gaps = []
    for key in b if first in STILL else a:
        mine, theirs = (rows.get(key, rows.get((key[0], None))) for rows in (a, b))
        if mine is not None and theirs is not None:
            gaps.append(mine - theirs)
    return crossed_estimate(np.stack(gaps)) if gaps else None


def verdict(estimate: Estimate) -> Verdict:
    """Whether a difference is above 0, below 0, or either within its interval.

    Of one seed there is no verdict: its interval knows nothing of how other seeds would differ.
    """
    if estimate.replicates == 1:
        return "one seed"
    if estimate.low > 0:
        return "holds"
    return "does not hold" if estimate.high < 0 else "undecided"


def mean_score(
    environment: StudyEnvironment, model: str, mode: str, split: str | None = None
) -> float | None:
    """Mean score in [0, 1] of a label's last models, or of the start or teacher, over all tasks.

    Returns:
        None where there is no such evaluation.
    """
    sizes = list(_sizes(environment, split).values())
    means = [
        np.average([board["score"] for board in boards], weights=sizes)
        for boards in _evaluations(environment, model, mode, split, "last").values()
    ]
    return float(np.mean(means)) if means else None


def _sizes(environment: StudyEnvironment, split: str | None) -> dict[str, int]:
    """How many tasks each wanted split has; None: all splits."""
    splits = list(environment.tasks) if split is None else [split]
    return {name: len(environment.tasks[name]) for name in splits}


def _evaluations(
    environment: StudyEnvironment, model: str, mode: str, split: str | None, which: Which
) -> dict[_Replicate, list[dict[str, Any]]]:
    """Replicate -> its evaluation on each wanted split, where all of them were played."""
    evaluations: dict[_Replicate, dict[str, Any]]
    if model in STILL:
        evaluations = {(i, None): piece[model] for i, piece in enumerate(environment.pieces)}
    else:
        evaluations = {(run.piece, run.seed): run.record[which] for run in environment.of(model)}
    wanted = [f"{name}/{mode}" for name in _sizes(environment, split)]
    return {
        key: [boards[name] for name in wanted]
        for key, boards in evaluations.items()
        if all(boards.get(name) for name in wanted)
    }


def _rows(
    environment: StudyEnvironment, model: str, mode: str, split: str | None, which: Which
) -> dict[_Replicate, NDArray[np.float64]]:
    """Replicate -> success task by task, where every wanted split was evaluated."""
    rows = {}
    for key, boards in _evaluations(environment, model, mode, split, which).items():
        rows[key] = np.concatenate([_shares(board) for board in boards])
    return rows


def _shares(board: Mapping[str, Any]) -> NDArray[np.float64]:
    """Share of plays that succeed, task by task."""
    return np.array([int(digit) for digit in board["success"]]) / board.get("plays", 1)


# -- courses --------------------------------------------------------------------------------------


def course_band(
    environment: StudyEnvironment, label: str, mode: str, split: str | None = None
) -> Band | None:
    """Success over steps, from the start at step 0, at the steps that all replicates have.

    With three replicates or more the interval is Student's t over them; with two there is none,
    since t would say next to nothing (12.7 standard errors); with one it is Wilson's over tasks.
    """
    courses = [
        course
        for run in environment.of(label)
        if (course := _course(environment, run, mode, split))
    ]
    if not courses:
        return None
    steps = sorted(set.intersection(*map(set, courses)))
    tasks = sum(_sizes(environment, split).values())
    values = [[course[step] for course in courses] for step in steps]
    bounds = [_bounds(here, tasks) for here in values]
    return Band(
        tuple(steps),
        tuple(math.fsum(here) / len(here) for here in values),
        tuple(max(0.0, low) for low, _ in bounds),
        tuple(min(1.0, high) for _, high in bounds),
        len(courses),
    )


def seed_courses(
    environment: StudyEnvironment, label: str, mode: str, split: str | None = None
) -> list[dict[int, float]]:
    """Step -> success of each replicate, from the start at step 0."""
    found = [_course(environment, run, mode, split) for run in environment.of(label)]
    return [course for course in found if course]


def _bounds(rates: Sequence[float], tasks: int) -> Interval:
    if len(rates) == 1:
        return wilson_interval(round(rates[0] * tasks), tasks)
    if len(rates) == 2:
        mean = sum(rates) / 2
        return mean, mean
    return mean_interval(rates)


def _course(
    environment: StudyEnvironment, run: StudyRun, mode: str, split: str | None
) -> dict[int, float]:
    """Step -> success over the tasks of a split or of all of them, where all were evaluated."""
    sizes = _sizes(environment, split)
    start = environment.pieces[run.piece]["start"]
    courses = []
    for name in sizes:
        board = f"{name}/{mode}"
        course = {int(step): float(value) for step, value in run.record["course"].get(board, ())}
        if start.get(board):
            course[0] = float(_shares(start[board]).mean())
        courses.append(course)
    common = sorted(set.intersection(*map(set, courses)))
    return {
        step: sum(size * course[step] for size, course in zip(sizes.values(), courses, strict=True))
        / sum(sizes.values())
        for step in common
    }


def mean_metric(
    environment: StudyEnvironment, label: str, name: str
) -> tuple[list[int], list[float]]:
    """Steps and the mean over replicates of a metric, at the steps where any of them has it."""
    curves = [run.record["metrics"].get(name, []) for run in environment.of(label)]
    steps, means = [], []
    for index in range(max(map(len, curves), default=0)):
        here = [c[index] for c in curves if index < len(c) and c[index] is not None]
        if here:
            steps.append(index + 1)
            means.append(math.fsum(here) / len(here))
    return steps, means


# -- cost -----------------------------------------------------------------------------------------


def cost(environment: StudyEnvironment, label: str) -> Cost:
    """What a run of a label takes, mean over its replicates."""
    records = [run.record for run in environment.of(label)]
    seconds: dict[str, float] = {}
    for record in records:
        for phase, value in record["seconds"].items():
            seconds[phase] = seconds.get(phase, 0.0) + value
    total = math.fsum(seconds.values())
    minutes, episodes, tokens = (
        math.fsum(float(record[key] or 0) for record in records) / len(records)
        for key in ("minutes", "episodes", "tokens")
    )
    phases = {phase: 100 * value / total for phase, value in seconds.items()} if total else {}
    return Cost(minutes, episodes, tokens, phases)
