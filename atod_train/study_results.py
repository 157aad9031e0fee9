"""The raw numbers of a study in one small file: every task of every evaluation, no checkpoints.

`results.json` holds, for each environment, what was played, with which versions, and for each run
its label, seed, settings, cost and evaluations. Success is one character a task, `1` or `0`, in the
order of `tasks`, so that any difference can be computed again, paired by task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_train.intervals import EvaluationResult
from atod_train.metrics import Evaluation
from atod_train.report_data import Board, RunSummary, all_boards
from atod_train.run_folder import write_json

RESULTS_FILE = "results.json"
_SHARED = ("env_id", "data", "parameters", "python", "packages", "platform")
_SECONDS = "seconds/"


def write_results(path: Path, studies: Mapping[str, Sequence[RunSummary]]) -> None:
    """Writes the file.

    Args:
        path: of the file.
        studies: name of an environment -> its runs.
    """
    write_json(path, {name: results_of(runs) for name, runs in studies.items()})


def results_of(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """The record of runs that share start, teacher and tasks; of JSON values."""
    boards = all_boards(runs)
    first = runs[0]
    return {
        **{name: first.manifest.get(name) for name in _SHARED},
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
    }


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
        "success": "".join("1" if task.success else "0" for task in result.tasks),
        "success_rate": round(result.success_rate, 6),
        "score": round(result.mean_score, 6),
        "turns": round(result.mean_turns, 3),
        "invalid_share": round(result.invalid_share, 6),
    }
