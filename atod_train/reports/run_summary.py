"""Read the finished runs of an environment from their folders, and convert them to results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atod_train.config import RunConfig
from atod_train.files import read_json
from atod_train.reports.evaluations import EvaluatedModel, Evaluation
from atod_train.reports.metrics import read_evaluations, read_metrics, read_trajectories
from atod_train.reports.run_folder import (
    CONFIG_FILE,
    MANIFEST_FILE,
    SUMMARY_FILE,
    OtherSettingsError,
    is_finished,
)

_KEPT_METRICS = (
    "kappa", "rho", "opd_signal", "rl_signal", "turn_weight", "disagreement", "uncertainty",
    "train_success", "solved_groups", "invalid_share", "turns", "anneal_progress", "entropy",
)  # fmt: skip
_SHARED = ("env_id", "data", "python", "packages", "platform", "device", "processes", "time")
_SECONDS = "seconds/"


@dataclass(frozen=True)
class RunSummary:
    """The content of a run's folder; anything that the run did not record is empty."""

    label: str
    """Name of the run in tables: its method, or its name in a study file."""
    seed: int
    metrics: tuple[dict[str, Any], ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    trajectories: tuple[dict[str, Any], ...] = ()
    """As `read_trajectories` returns them."""
    manifest: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    folder: Path = Path()

    def course(
        self, split: str, mode: str, model: EvaluatedModel = "student"
    ) -> tuple[Evaluation, ...]:
        """Return the evaluations of a model by step; of repeated steps the latest."""
        by_step = {e.step: e for e in self.evaluations if e.key == (model, split, mode)}
        return tuple(by_step[step] for step in sorted(by_step))

    def curve(self, name: str) -> dict[int, float]:
        """Return the values of a metric by step, if they are finite."""
        return {
            record["step"]: float(record[name])
            for record in self.metrics
            if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
        }


def read_run(run_dir: Path, label: str, seed: int) -> RunSummary:
    """Read a run folder; absent files give empty parts.

    Raises:
        FileError: a file exists but is damaged.
    """
    return RunSummary(
        label=label,
        seed=seed,
        metrics=tuple(read_metrics(run_dir)),
        evaluations=tuple(read_evaluations(run_dir)),
        trajectories=tuple(read_trajectories(run_dir)),
        manifest=read_json(run_dir / MANIFEST_FILE),
        config=read_json(run_dir / CONFIG_FILE),
        summary=read_json(run_dir / SUMMARY_FILE),
        folder=run_dir,
    )


def finished_runs(
    folder: Path, settings: Mapping[str, RunConfig]
) -> tuple[list[RunSummary], list[str]]:
    """Return the finished runs in the folder of an environment, `<label>-seed<seed>` each.

    Args:
        folder: of the environment.
        settings: of the runs to find, by label, with any seed.

    Returns:
        The runs, by seeds, then labels; and a line for each begun one that was left out, because
        it has other settings or lacks steps. So all runs of a label have the same budget.

    Raises:
        FileError: a file of a run is damaged.
    """
    runs, left_out = [], []
    for label, config in settings.items():
        for path in sorted(folder.glob(f"{label}-seed*")):
            number = path.name.removeprefix(f"{label}-seed")
            if not re.fullmatch(r"-?\d+", number) or not (path / CONFIG_FILE).is_file():
                continue
            try:
                if is_finished(path, config.with_seed(int(number))):
                    runs.append(read_run(path, label, int(number)))
                else:
                    done = max((row["step"] for row in read_metrics(path)), default=0)
                    left_out.append(f"{path} is not finished: step {done} of {config.train.steps}")
            except OtherSettingsError as error:
                left_out.append(str(error))
    return sorted(runs, key=lambda run: run.seed), left_out


def record_of(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Return runs that share environment, start, teacher and tasks as one part; JSON values."""
    played = {e.result.split: e.result.tasks for run in runs for e in run.evaluations}
    keys = dict.fromkeys((e.result.split, e.result.mode) for run in runs for e in run.evaluations)
    names = {"/".join(key): key for key in keys}
    first = runs[0]
    # Methods without a teacher do not name its size.
    sizes = [run.manifest.get("parameters", {}) for run in runs]
    return {
        **{name: first.manifest.get(name) for name in _SHARED},
        "parameters": next((size for size in sizes if size.get("teacher")), sizes[0]),
        "env": first.config.get("env"),
        # The key `start` has the evaluations of the start.
        "model": {**first.config.get("model", {}), "start": first.config.get("start")},
        "tasks": {split: [task.task_id for task in tasks] for split, tasks in played.items()},
        "task_types": {split: [task.task_type for task in played[split]] for split in played},
        "start": {
            name: _first(e for e in first.course(*key) if e.step == 0)
            for name, key in names.items()
        },
        "teacher": {
            name: _first(e for run in runs for e in reversed(run.course(*key, "teacher")))
            for name, key in names.items()
        },
        "runs": [_run_record(run, names) for run in runs],
    }


def _run_record(run: RunSummary, names: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    trained = {name: [e for e in run.course(*key) if e.step > 0] for name, key in names.items()}
    phases = dict.fromkeys(key for step in run.metrics for key in step if key.startswith(_SECONDS))
    steps = range(1, max((step["step"] for step in run.metrics), default=0) + 1)
    curves = {name: run.curve(name) for name in _KEPT_METRICS}
    return {
        "label": run.label,
        "seed": run.seed,
        "algorithm": run.config.get("algorithm"),
        "train": run.config.get("train"),
        "minutes": run.summary.get("minutes"),
        "tokens": run.summary.get("tokens"),
        "episodes": run.summary.get("trajectories"),
        "seconds": {
            phase.removeprefix(_SECONDS): round(sum(run.curve(phase).values()), 1)
            for phase in phases
        },
        "last": {name: _first(reversed(course)) for name, course in trained.items()},
        "best": {
            name: _first(sorted(course, key=lambda e: -e.result.success_rate))
            for name, course in trained.items()
        },
        "course": {
            name: [[e.step, round(e.result.success_rate, 4)] for e in course]
            for name, course in trained.items()
        },
        "metrics": {  # four significant digits
            name: [float(f"{curve[step]:.4g}") if step in curve else None for step in steps]
            for name, curve in curves.items()
            if curve
        },
    }


def _first(evaluations: Iterable[Evaluation]) -> dict[str, Any] | None:
    """Return the first of some evaluations in the form of results.json, or None."""
    for evaluation in evaluations:
        result = evaluation.result
        return {
            "step": evaluation.step,
            "success": "".join(str(int(task.success)) for task in result.tasks),
            "success_rate": round(result.success_rate, 6),
            "score": round(result.mean_score, 6),
            "turns": round(result.mean_turns, 3),
            "invalid_share": round(result.invalid_share, 6),
        }
    return None
