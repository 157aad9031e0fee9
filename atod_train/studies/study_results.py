"""The raw numbers of a study in one small file: every task of every evaluation, no checkpoints.

`results.json` holds, for each environment, what was played, with which settings and versions, and
for each finished run its label, seed, settings, cost, course and evaluations. Success is one
digit a task, how many of its `plays` (1 where there is no such key) succeeded, in the order of
`tasks`, so that any difference can be computed again, paired by task. `course` has [step, success
rate] of every evaluation after the start, and `metrics` one value for each step from 1 on (null:
not measured). A run takes one line of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_train.config import RunConfig
from atod_train.files import without_infinities, write_text
from atod_train.reports.metrics import Evaluation
from atod_train.reports.report_data import Board, RunSummary, all_boards, read_run
from atod_train.reports.run_folder import (
    OtherSettingsError,
    is_finished,
)
from atod_train.reports.statistics import EvaluationResult

RESULTS_FILE = "results.json"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
"""What an environment or a run of a study may be called."""

STILL = ("start", "teacher")
"""Models of a study that do not train; no run may have their names."""

MOST_PLAYS = 9
"""Of a task in an evaluation, so that successes are one digit."""

KEPT_METRICS = (
    "kappa",
    "rho",
    "opd_signal",
    "rl_signal",
    "turn_weight",
    "disagreement",
    "uncertainty",
    "train_success",
    "solved_groups",
    "invalid_share",
    "turns",
    "anneal_progress",
    "entropy",
)
_SHARED = ("env_id", "data", "python", "packages", "platform", "device", "processes", "time")
_SECONDS = "seconds/"


def finished_runs(
    folder: Path, settings: Mapping[str, RunConfig]
) -> tuple[list[RunSummary], list[str]]:
    """The finished runs in the folder of an environment.

    Args:
        folder: of the environment; a run lies in `<label>-seed<seed>`.
        settings: of the runs to look for, by label, whatever their seeds; the order is that of the
            runs of one seed.

    Returns:
        The runs, by seeds, then labels; and a line for each that was left out since it was made
        with other settings, so that what a table compares had the same start, teacher and budget.

    Raises:
        RunFolderError: a file of a run is broken.
    """
    found, left_out = [], []
    for place, (label, config) in enumerate(settings.items()):
        for path in sorted(folder.glob(f"{label}-seed*")):
            match = re.fullmatch(r"-seed(-?\d+)", path.name.removeprefix(label))
            if not match:
                continue
            seed = int(match[1])
            try:
                if is_finished(path, config.with_seed(seed)):
                    found.append((seed, place, path, label))
            except OtherSettingsError as error:
                left_out.append(str(error))
    runs = [read_run(path, method=label, seed=seed) for seed, _, path, label in sorted(found)]
    return runs, left_out


def write_results(path: Path, studies: Mapping[str, Sequence[RunSummary]]) -> None:
    """Writes the file, unless there is nothing to write.

    Args:
        path: of the file.
        studies: name of an environment -> its finished runs; one without any is left out.
    """
    results = {name: results_of(runs) for name, runs in studies.items() if runs}
    if results:
        parts = [f"{json.dumps(name)}: {_lines(record)}" for name, record in results.items()]
        write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _lines(record: Mapping[str, Any]) -> str:
    """An environment as JSON, a line for each of its keys and runs."""
    record = without_infinities(record)
    lines = [f"  {json.dumps(key)}: {json.dumps(record[key])}" for key in record if key != "runs"]
    runs = ",\n".join(f"    {json.dumps(run)}" for run in record["runs"])
    return "{\n" + ",\n".join([*lines, f'  "runs": [\n{runs}\n  ]']) + "\n}"


def results_of(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """The record of runs that share start, teacher and tasks; of JSON values."""
    boards = all_boards(runs)
    first = runs[0]
    # Methods without a teacher do not name its size.
    sizes = [run.manifest.get("parameters", {}) for run in runs]
    return {
        **{name: first.manifest.get(name) for name in _SHARED},
        "parameters": next((size for size in sizes if size.get("teacher")), sizes[0]),
        "env": first.config.get("env"),
        # `start` is taken by the evaluations of the start.
        "model": {**first.config.get("model", {}), "start": first.config.get("start")},
        "tasks": {split: _tasks(runs, split) for split, _ in boards},
        "start": {_key(board): _evaluation(first.start(board)) for board in boards},
        "teacher": {_key(board): _evaluation(_teacher(runs, board)) for board in boards},
        "runs": [_run(run, boards) for run in runs],
    }


def _run(run: RunSummary, boards: Sequence[Board]) -> dict[str, Any]:
    phases = dict.fromkeys(key for step in run.metrics for key in step if key.startswith(_SECONDS))
    seconds = {
        key.removeprefix(_SECONDS): round(sum(float(step.get(key, 0.0)) for step in run.metrics), 1)
        for key in phases
    }
    return {
        "label": run.method,
        "seed": run.seed,
        "algorithm": run.config.get("algorithm"),
        "train": run.config.get("train"),
        "minutes": run.summary.get("minutes"),
        "tokens": run.summary.get("tokens"),
        "episodes": run.summary.get("trajectories"),
        "seconds": seconds,
        "last": {_key(board): _at_step(run.last(board)) for board in boards},
        "best": {_key(board): _at_step(run.best(board)) for board in boards},
        "course": {_key(board): _course(run, board) for board in boards},
        "metrics": _metrics(run),
    }


def _course(run: RunSummary, board: Board) -> list[list[float]]:
    return [[e.step, round(e.result.success_rate, 4)] for e in run.course(board) if e.step > 0]


def _metrics(run: RunSummary) -> dict[str, list[float | None]]:
    """The kept metrics with four significant digits, a value for each step from 1 on."""
    last = max((record["step"] for record in run.metrics), default=0)
    kept = {}
    for name in KEPT_METRICS:
        curve = run.curve(name)
        if curve:
            kept[name] = [
                float(f"{curve[step]:.4g}") if step in curve else None
                for step in range(1, last + 1)
            ]
    return kept


def _teacher(runs: Sequence[RunSummary], board: Board) -> EvaluationResult | None:
    return next((found for run in runs if (found := run.teacher(board))), None)


def _tasks(runs: Sequence[RunSummary], split: str) -> list[str]:
    results = [e.result for run in runs for e in run.evaluations if e.result.split == split]
    return [task.task_id for task in results[0].tasks]


def _key(board: Board) -> str:
    return "/".join(board)


def _at_step(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {"step": evaluation.step, **(_evaluation(evaluation.result) or {})}


def _evaluation(result: EvaluationResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "success": "".join(str(round(task.success * result.plays)) for task in result.tasks),
        "plays": result.plays,
        "success_rate": round(result.success_rate, 6),
        "score": round(result.mean_score, 6),
        "turns": round(result.mean_turns, 3),
        "invalid_share": round(result.invalid_share, 6),
    }
