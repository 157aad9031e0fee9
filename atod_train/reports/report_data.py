"""What a report is made of: one finished or running run, read from its folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_train.files import read_json
from atod_train.reports.metrics import (
    EvaluatedModel,
    Evaluation,
    TrajectoryRecord,
    read_evaluations,
    read_metrics,
    read_trajectories,
)
from atod_train.reports.run_folder import CONFIG_FILE, MANIFEST_FILE, SUMMARY_FILE
from atod_train.reports.statistics import EvaluationResult

Board = tuple[str, str]
"""(split, mode): what can be compared in one table or plot."""


@dataclass(frozen=True)
class RunSummary:
    """A run as a report sees it; whatever the run did not record is empty."""

    method: str
    seed: int
    metrics: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    trajectories: tuple[TrajectoryRecord, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How the run is called in tables."""
        return f"{self.method}, seed {self.seed}"

    @property
    def boards(self) -> tuple[Board, ...]:
        """The splits and modes evaluated, in the order of their first evaluation."""
        return tuple(dict.fromkeys((e.result.split, e.result.mode) for e in self.evaluations))

    def course(self, board: Board, model: EvaluatedModel = "student") -> tuple[Evaluation, ...]:
        """The evaluations of a model on a board by step; of repeated steps the latest."""
        by_step = {
            e.step: e
            for e in self.evaluations
            if e.model == model and (e.result.split, e.result.mode) == board
        }
        return tuple(by_step[step] for step in sorted(by_step))

    def start(self, board: Board) -> EvaluationResult | None:
        """The student before the first step."""
        course = self.course(board)
        return course[0].result if course and course[0].step == 0 else None

    def teacher(self, board: Board) -> EvaluationResult | None:
        """The teacher, as evaluated last."""
        course = self.course(board, "teacher")
        return course[-1].result if course else None

    def last(self, board: Board) -> Evaluation | None:
        """The student as evaluated last, after at least one step."""
        course = self.course(board)
        return course[-1] if course and course[-1].step > 0 else None

    def best(self, board: Board) -> Evaluation | None:
        """The highest success rate after at least one step; the earliest of equals."""
        trained = [e for e in self.course(board) if e.step > 0]
        return max(trained, key=lambda e: (e.result.success_rate, -e.step), default=None)

    def curve(self, key: str) -> dict[int, float]:
        """Step -> value of a key of the metrics, where it is a finite number."""
        return {
            record["step"]: float(record[key])
            for record in self.metrics
            if isinstance(record.get(key), (int, float)) and math.isfinite(record[key])
        }


def read_run(run_dir: Path, *, method: str = "", seed: int | None = None) -> RunSummary:
    """Reads a run folder; absent files give empty parts.

    Args:
        run_dir: the folder of one run.
        method: overrides the method that manifest or config name.
        seed: overrides the seed that manifest or config name.

    Raises:
        RunFolderError: a file is there but broken.
    """
    manifest, config = read_json(run_dir / MANIFEST_FILE), read_json(run_dir / CONFIG_FILE)
    named_method = manifest.get("method") or config.get("algorithm", {}).get("method", "run")
    named_seed = manifest.get("seeds", {}).get("train", config.get("train", {}).get("seed", 0))
    return RunSummary(
        method=method or str(named_method),
        seed=int(named_seed) if seed is None else seed,
        metrics=tuple(read_metrics(run_dir)),
        evaluations=tuple(read_evaluations(run_dir)),
        trajectories=tuple(read_trajectories(run_dir)),
        manifest=manifest,
        config=config,
        summary=read_json(run_dir / SUMMARY_FILE),
    )


def by_method(runs: Sequence[RunSummary]) -> dict[str, list[RunSummary]]:
    """Method -> its runs (seeds), in the order given."""
    groups: dict[str, list[RunSummary]] = {}
    for run in runs:
        groups.setdefault(run.method, []).append(run)
    return groups


def all_boards(runs: Sequence[RunSummary]) -> tuple[Board, ...]:
    """Every board of any run, in order of appearance."""
    return tuple(dict.fromkeys(board for run in runs for board in run.boards))


def mean_curve(runs: Sequence[RunSummary], key: str) -> tuple[list[int], list[float]]:
    """Steps and the mean over runs of a metric, at steps where any run has it."""
    curves = [run.curve(key) for run in runs]
    steps = sorted({step for curve in curves for step in curve})
    values = []
    for step in steps:
        here = [curve[step] for curve in curves if step in curve]
        values.append(math.fsum(here) / len(here))
    return steps, values


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values up to each position."""
    return [
        math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
        for i in range(len(values))
    ]
