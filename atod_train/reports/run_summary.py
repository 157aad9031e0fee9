"""One finished or running run, read from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_train.files import read_json
from atod_train.reports.evaluations import EvaluatedModel, Evaluation, EvaluationResult
from atod_train.reports.metrics import (
    TrajectoryRecord,
    read_evaluations,
    read_metrics,
    read_trajectories,
)
from atod_train.reports.run_folder import CONFIG_FILE, MANIFEST_FILE, SUMMARY_FILE

SplitMode = tuple[str, str]
"""(split, mode): evaluations that can be compared."""


@dataclass(frozen=True)
class RunSummary:
    """A run as reports see it; whatever the run did not record is empty."""

    label: str
    """Name of the run in tables: its method, or the name that a study file gives it."""
    seed: int
    metrics: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    trajectories: tuple[TrajectoryRecord, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def split_modes(self) -> tuple[SplitMode, ...]:
        """The splits and modes evaluated, in the order of their first evaluation."""
        return tuple(dict.fromkeys((e.result.split, e.result.mode) for e in self.evaluations))

    def course(self, key: SplitMode, model: EvaluatedModel = "student") -> tuple[Evaluation, ...]:
        """The evaluations of a model by step; of repeated steps the latest."""
        by_step = {
            e.step: e
            for e in self.evaluations
            if e.model == model and (e.result.split, e.result.mode) == key
        }
        return tuple(by_step[step] for step in sorted(by_step))

    def start(self, key: SplitMode) -> EvaluationResult | None:
        """The student before the first step."""
        course = self.course(key)
        return course[0].result if course and course[0].step == 0 else None

    def teacher(self, key: SplitMode) -> EvaluationResult | None:
        """The teacher, as evaluated last."""
        course = self.course(key, "teacher")
        return course[-1].result if course else None

    def last(self, key: SplitMode) -> Evaluation | None:
        """The student as evaluated last, after at least one step."""
        course = self.course(key)
        return course[-1] if course and course[-1].step > 0 else None

    def best(self, key: SplitMode) -> Evaluation | None:
        """The highest success rate after at least one step; the earliest of equals."""
        trained = [e for e in self.course(key) if e.step > 0]
        return max(trained, key=lambda e: (e.result.success_rate, -e.step), default=None)

    def curve(self, name: str) -> dict[int, float]:
        """Step -> value of a metric, where it is a finite number."""
        return {
            record["step"]: float(record[name])
            for record in self.metrics
            if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
        }


def read_run(run_dir: Path, *, label: str = "", seed: int | None = None) -> RunSummary:
    """Read a run folder; absent files give empty parts.

    Args:
        run_dir: the folder of one run.
        label: overrides the name in manifest or config.
        seed: overrides the seed in manifest or config.

    Raises:
        FileError: a file is there but broken.
    """
    manifest, config = read_json(run_dir / MANIFEST_FILE), read_json(run_dir / CONFIG_FILE)
    named = manifest.get("method") or config.get("algorithm", {}).get("method", "run")
    named_seed = manifest.get("seeds", {}).get("train", config.get("train", {}).get("seed", 0))
    return RunSummary(
        label=label or str(named),
        seed=int(named_seed) if seed is None else seed,
        metrics=tuple(read_metrics(run_dir)),
        evaluations=tuple(read_evaluations(run_dir)),
        trajectories=tuple(read_trajectories(run_dir)),
        manifest=manifest,
        config=config,
        summary=read_json(run_dir / SUMMARY_FILE),
    )
