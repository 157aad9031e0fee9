"""What a study prints at its end: success rates, and differences over tasks and seeds."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from atod_train.reports.report_data import RunSummary
from atod_train.reports.statistics import (
    EvaluationResult,
    bootstrap_interval,
    mean_interval,
    paired_by_task,
)
from atod_train.studies.study_results import STILL


def show_study(runs: Sequence[RunSummary], report: Path) -> None:
    """Prints the tables of runs on one environment, and where their report is."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    print_tables(runs, console)
    console.print(f"report: {report}")


def print_tables(runs: Sequence[RunSummary], console: Console) -> None:
    """Prints a table of success rates for every split and mode, then one of differences."""
    _print_rates(runs, console)
    _print_differences(runs, console)


def _print_rates(runs: Sequence[RunSummary], console: Console) -> None:
    """Prints success rates with 95 % intervals: start, teacher, and each run last and best."""
    for board in dict.fromkeys(board for run in runs for board in run.boards):
        split, mode = board
        table = Table(title=f"{split}, {mode}: success rate with 95 % interval")
        for column in ("model", "success", "score", "turns", "invalid", "gain over start (paired)"):
            table.add_column(column)
        start, teacher = runs[0].start(board), None
        for run in runs:
            teacher = teacher or run.teacher(board)
        for name, result in (("start", start), ("teacher", teacher)):
            if result is not None:
                table.add_row(name, *_cells(result, None if name == "start" else start))
        for run in runs:
            last, best = run.last(board), run.best(board)
            if last is not None:
                table.add_row(f"{run.name}, last", *_cells(last.result, start))
            if best is not None and last is not None and best.step != last.step:
                table.add_row(f"{run.name}, best (step {best.step})", *_cells(best.result, start))
        for method in dict.fromkeys(run.method for run in runs):
            lasts = [run.last(board) for run in runs if run.method == method]
            rates = [100 * last.result.success_rate for last in lasts if last is not None]
            if len(rates) > 1:
                low, high = mean_interval(rates)
                low, high = max(0.0, low), min(100.0, high)
                mean = sum(rates) / len(rates)
                table.add_row(
                    f"{method}, mean of {len(rates)} seeds", f"{mean:.1f} [{low:.1f}, {high:.1f}]"
                )
        console.print(table)


def _cells(result: EvaluationResult, start: EvaluationResult | None) -> list[str]:
    low, high = result.interval
    gain = ""
    if start is not None:
        interval = paired_by_task(result, start)
        if interval is not None:
            difference = 100 * (result.success_rate - start.success_rate)
            gain = f"{difference:+.1f} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"
    return [
        f"{100 * result.success_rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{100 * result.mean_score:.1f}",
        f"{result.mean_turns:.1f}",
        f"{100 * result.invalid_share:.0f} %",
        gain,
    ]


def _print_differences(runs: Sequence[RunSummary], console: Console) -> None:
    """Each method's last model against start, teacher and the methods after it.

    Over all tasks of all splits; a task counts once, with the mean of its seeds.
    """
    methods = list(dict.fromkeys(run.method for run in runs))
    table = Table(title="differences over all splits: points, 95 % bootstrap interval over tasks")
    for column in ("mode", "models", "seeds", "tasks", "difference"):
        table.add_column(column)
    for mode in dict.fromkeys(mode for run in runs for _, mode in run.boards):
        seeds = {
            method: [_by_task(run, mode, "last") for run in runs if run.method == method]
            for method in methods
        }
        others = {name: _by_task(runs[0], mode, name) for name in STILL}
        for number, method in enumerate(methods):
            mine = _mean(seeds[method])
            rivals = {**others, **{name: _mean(seeds[name]) for name in methods[number + 1 :]}}
            for name, theirs in rivals.items():
                common = sorted(mine.keys() & theirs.keys())
                if not common:
                    continue
                gaps = [100 * (mine[task] - theirs[task]) for task in common]
                low, high = bootstrap_interval(gaps)
                table.add_row(
                    mode,
                    f"{method} - {name}",
                    str(len(seeds[method])),
                    str(len(common)),
                    f"{sum(gaps) / len(gaps):+.1f} [{low:+.1f}, {high:+.1f}]",
                )
    if table.row_count:
        console.print(table)


def _by_task(run: RunSummary, mode: str, which: str) -> dict[tuple[str, str], float]:
    """(split, task) -> success of the run's start, teacher or last model."""
    found: dict[tuple[str, str], float] = {}
    for board in run.boards:
        if board[1] != mode:
            continue
        last = run.last(board)
        result = {
            "start": run.start(board),
            "teacher": run.teacher(board),
            "last": last.result if last else None,
        }[which]
        for task in result.tasks if result else ():
            found[board[0], task.task_id] = float(task.success)
    return found


def _mean(seeds: Sequence[Mapping[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    """The mean over seeds of each task that all of them have."""
    common = set(seeds[0]).intersection(*seeds)
    return {task: sum(seed[task] for seed in seeds) / len(seeds) for task in common}
