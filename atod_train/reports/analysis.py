"""Compute success and differences with intervals, courses, metrics and cost of results."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from atod_train.reports.results import REFERENCES, Results
from atod_train.reports.statistics import Estimate, estimate, paired_difference

Verdict = Literal["holds", "does not hold", "undecided", "one seed"]

_Replicate = tuple[int, "int | None"]
"""(part, seed); no seed for a model that does not train."""


@dataclass(frozen=True)
class Selection:
    """The evaluations and tasks of a number."""

    mode: str
    """Decoding, such as `greedy`; see `EvaluationMode`."""
    split: str | None = None
    """The split of the tasks; None: all splits together."""
    which: Literal["last", "best"] = "last"
    """The last evaluation of a label, or the best. Over several splits, the best consists of each
    split's own best, which may come from different steps."""
    task_type: str | None = None
    """The type of the tasks; None: all."""

    def splits(self, results: Results) -> list[str]:
        """Return the selected splits of results."""
        return list(results.tasks) if self.split is None else [self.split]


class Cost(NamedTuple):
    """Mean cost of a run of a label."""

    minutes: float
    episodes: float
    tokens: float
    """Completion tokens sampled."""
    phases: dict[str, float]
    """Phase of a step -> its share of the time of all of them, in percent."""
    teacher_passes_saved: float
    """Steps without scores of a teacher, in percent."""


@lru_cache(maxsize=4096)
def rate(results: Results, model: str, selection: Selection) -> Estimate | None:
    """Return success of a model, mean over replicates and tasks; None if it was not evaluated.

    The model is a label, `start` or `teacher`. Replicates of the last two are the parts.
    """
    rows = _rows(results, model, selection)
    return estimate(np.stack(list(rows.values()))) if rows else None


@lru_cache(maxsize=4096)
def difference(results: Results, first: str, second: str, selection: Selection) -> Estimate | None:
    """Return success of one model minus that of another, paired by replicate and task.

    The models are labels, `start` or `teacher`. Two labels are paired if both have the same seed
    in the same part; other replicates are left out. A label is paired with the start or teacher of
    its own part, whose one evaluation counts for each of its replicates.

    Returns:
        None if nothing can be paired.
    """
    a, b = (_rows(results, model, selection) for model in (first, second))
    pairs = []
    for key in b if first in REFERENCES else a:
        mine, theirs = (rows.get(key, rows.get((key[0], None))) for rows in (a, b))
        if mine is not None and theirs is not None:
            pairs.append((mine, theirs))
    if not pairs:
        return None
    return paired_difference(*(np.stack(rows) for rows in zip(*pairs, strict=True)))


def verdict(found: Estimate) -> Verdict:
    """Return whether a difference is above 0, below 0, or undecided by its interval.

    One seed has no verdict: its interval does not include the spread between seeds.
    """
    if found.replicates == 1:
        return "one seed"
    if found.low > 0:
        return "holds"
    return "does not hold" if found.high < 0 else "undecided"


def mean_score(results: Results, model: str, selection: Selection) -> float | None:
    """Return the mean score in [0, 1] over replicates and tasks, or None."""
    sizes = [len(results.tasks[split]) for split in selection.splits(results)]
    means = [
        np.average([evaluation["score"] for evaluation in evaluations], weights=sizes)
        for evaluations in _evaluations(results, model, selection).values()
    ]
    return float(np.mean(means)) if means else None


def _evaluations(
    results: Results, model: str, selection: Selection
) -> dict[_Replicate, list[dict[str, Any]]]:
    """Return the evaluations on each selected split by replicate, if all of them were played."""
    found: dict[_Replicate, dict[str, Any]]
    if model in REFERENCES:
        found = {(number, None): part[model] for number, part in enumerate(results.parts)}
    else:
        found = {(run.part, run.seed): run.record[selection.which] for run in results.of(model)}
    names = [f"{split}/{selection.mode}" for split in selection.splits(results)]
    return {
        key: [evaluations[name] for name in names]
        for key, evaluations in found.items()
        if all(evaluations.get(name) for name in names)
    }


def _rows(
    results: Results, model: str, selection: Selection
) -> dict[_Replicate, NDArray[np.float64]]:
    """Return success task by task by replicate, if every selected split was evaluated."""
    chosen: Any = slice(None)
    if selection.task_type is not None:
        splits = selection.splits(results)
        types = [name for split in splits for name in results.task_types[split]]
        chosen = [place for place, name in enumerate(types) if name == selection.task_type]
    return {
        key: np.concatenate([_successes(evaluation) for evaluation in evaluations])[chosen]
        for key, evaluations in _evaluations(results, model, selection).items()
    }


def _successes(evaluation: Mapping[str, Any]) -> NDArray[np.float64]:
    """Return success task by task; of several plays, the share that succeeded."""
    return np.array([int(digit) for digit in evaluation["success"]]) / evaluation.get("plays", 1)


# -- over steps -----------------------------------------------------------------------------------


def courses(results: Results, label: str, selection: Selection) -> list[dict[int, float]]:
    """Return step -> success of each replicate, from the start at step 0.

    Over several splits, only steps at which all of them were evaluated.
    """
    sizes = {split: len(results.tasks[split]) for split in selection.splits(results)}
    found = []
    for run in results.of(label):
        start = results.parts[run.part]["start"]
        by_split = {}
        for split in sizes:
            key = f"{split}/{selection.mode}"
            by_split[split] = {
                int(step): share for step, share in run.record["course"].get(key, ())
            }
            if start.get(key):
                by_split[split][0] = float(_successes(start[key]).mean())
        if steps := sorted(set.intersection(*map(set, by_split.values()))):
            weights = list(sizes.values())
            found.append(
                {
                    step: float(np.average([by_split[s][step] for s in sizes], weights=weights))
                    for step in steps
                }
            )
    return found


def mean_course(found: list[dict[int, float]]) -> dict[int, float]:
    """Return step -> mean success, at the steps that all replicates have."""
    common = sorted(set.intersection(*map(set, found))) if found else []
    return {step: fmean(course[step] for course in found) for step in common}


def mean_metric(results: Results, label: str, name: str) -> dict[int, float]:
    """Return step -> mean over replicates of a metric, at the steps at which any of them has it."""
    values: dict[int, list[float]] = {}
    for run in results.of(label):
        for step, value in enumerate(run.record["metrics"].get(name, ()), start=1):
            if value is not None:
                values.setdefault(step, []).append(value)
    return {step: fmean(here) for step, here in sorted(values.items())}


def budget(results: Results, label: str) -> str:
    """Return steps x tasks per step x episodes per task of a label's runs."""
    train = results.of(label)[0].record.get("train") or {}
    names = ("steps", "tasks_per_step", "group_size")
    return " x ".join(str(train.get(name, "?")) for name in names)


def cost(results: Results, label: str) -> Cost:
    """Return the cost of a run of a label, mean over its replicates."""
    records = [run.record for run in results.of(label)]
    phases = dict.fromkeys(phase for record in records for phase in record["seconds"])
    seconds = {p: math.fsum(record["seconds"].get(p, 0.0) for record in records) for p in phases}
    total = math.fsum(seconds.values()) or 1.0
    minutes, episodes, tokens = (
        fmean(record[key] or 0 for record in records) for key in ("minutes", "episodes", "tokens")
    )
    shares = {phase: 100 * value / total for phase, value in seconds.items()}
    # Each step has a coefficient; those whose teacher was scored have a disagreement.
    made, scored = (
        sum(value is not None for record in records for value in record["metrics"].get(name, ()))
        for name in ("kappa", "disagreement")
    )
    unscored = 100 * (1 - scored / made) if made else 0.0
    return Cost(minutes, episodes, tokens, shares, unscored)
