"""The tables of a report: success per model and task type, differences, and what was done."""

from __future__ import annotations

import math
from collections.abc import Sequence

from atod_train.reports.report_data import Board, RunSummary, all_boards, by_method
from atod_train.reports.report_page import (
    NOTHING,
    distinct,
    escape,
    percent,
    percent_range,
    signed_points,
    table,
)
from atod_train.reports.statistics import EvaluationResult, mean_interval, paired_by_task


def _rate_cell(result: EvaluationResult, remark: str = "") -> str:
    small = f"{percent_range(result.interval)}{remark}"
    return f"{percent(result.success_rate)} <small>{small}</small>"


def _conduct(result: EvaluationResult) -> list[str]:
    return [percent(result.mean_score), f"{result.mean_turns:.1f}", percent(result.invalid_share)]


def _still_models(runs: Sequence[RunSummary], board: Board) -> list[tuple[str, EvaluationResult]]:
    """Start and teacher, each once if all runs share it, else once per run."""
    found: list[tuple[str, EvaluationResult]] = []
    for label, results in (
        ("start", [(run, run.start(board)) for run in runs]),
        ("teacher", [(run, run.teacher(board)) for run in runs]),
    ):
        present = [(run, result) for run, result in results if result]
        distinct: dict[EvaluationResult, list[RunSummary]] = {}
        for run, result in present:
            distinct.setdefault(result, []).append(run)
        for result, users in distinct.items():
            suffix = "" if len(distinct) == 1 else f" of {', '.join(run.name for run in users)}"
            found.append((label + suffix, result))
    return found


def _result_table(runs: Sequence[RunSummary], board: Board) -> str:
    rows = [
        [escape(label), str(len(r.tasks)), _rate_cell(r), NOTHING, NOTHING, *_conduct(r)]
        for label, r in _still_models(runs, board)
    ]
    for method, seeds in by_method(runs).items():
        rates, bests = [], []
        for run in seeds:
            last, best, start = run.last(board), run.best(board), run.start(board)
            if last is None or best is None:
                continue
            rates.append(last.result.success_rate)
            bests.append(best.result.success_rate)
            change = paired_by_task(last.result, start) if start else None
            points = last.result.success_rate - start.success_rate if start else 0.0
            delta = NOTHING
            if change:
                delta = f"{signed_points(points)} <small>{percent_range(change)}</small>"
            rows.append(
                [
                    escape(run.name),
                    str(len(last.result.tasks)),
                    _rate_cell(last.result),
                    _rate_cell(best.result, f", step {best.step}"),
                    delta,
                    *_conduct(last.result),
                ]
            )
        if len(rates) > 1:
            cells = [
                f"{percent(math.fsum(values) / len(values))} "
                f"<small>{percent_range(mean_interval(values))}</small>"
                for values in (rates, bests)
            ]
            name = f"<b>{escape(method)}, mean of {len(rates)} seeds</b>"
            rows.append([name, NOTHING, *cells, *[NOTHING] * 4])
    head = ["model", "tasks", "last success", "best success", "change from start, points"]
    data = {e.result.data for run in runs for e in run.evaluations}
    caption = f"{escape(board[0])}, {escape(board[1])} ({distinct(sorted(data))} data)"
    return table(caption, [*head, "score", "turns", "invalid turns"], rows)


def _type_table(runs: Sequence[RunSummary], board: Board) -> str:
    """Success per task type; seeds of a method are pooled."""
    columns: list[tuple[str, list[EvaluationResult]]] = [
        (label, [result]) for label, result in _still_models(runs, board)
    ]
    for method, seeds in by_method(runs).items():
        lasts = [last.result for run in seeds if (last := run.last(board))]
        if lasts:
            columns.append((f"{method}, last", lasts))
    rows_of = [[{row.task_type: row for row in r.by_task_type()} for r in rs] for _, rs in columns]
    types = sorted({name for column in rows_of for result in column for name in result})
    rows = []
    for name in types:
        cells = [escape(name).replace("_", "_<wbr>")]
        for column in rows_of:
            here = [result[name] for result in column if name in result]
            tasks, solved = sum(row.tasks for row in here), sum(row.successes for row in here)
            small = f"{round(solved, 1):g}/{tasks}"
            if len(here) == 1:
                small += f", {percent_range(here[0].interval)}"
            cells.append(f"{percent(solved / tasks)} <small>{small}</small>" if tasks else NOTHING)
        rows.append(cells)
    caption = f"Per task type: {escape(board[0])}, {escape(board[1])}"
    return table(caption, ["task type", *(escape(label) for label, _ in columns)], rows)


def _action_table(runs: Sequence[RunSummary], board: Board) -> str:
    """Valid actions per episode by their first word; "" where none was recorded."""
    models = _still_models(runs, board)
    models += [(run.name, last.result) for run in runs if (last := run.last(board))]
    means = [(label, result.actions_per_episode()) for label, result in models]
    verbs = sorted({verb for _, used in means for verb in used})
    if not verbs:
        return ""
    rows = [
        [escape(label), *(f"{used[verb]:.2f}" if verb in used else NOTHING for verb in verbs)]
        for label, used in means
    ]
    caption = f"Valid actions per episode: {escape(board[0])}, {escape(board[1])}"
    return table(caption, ["model", *map(escape, verbs)], rows)


def _comparison_table(runs: Sequence[RunSummary], board: Board) -> str:
    """Last success of the first method minus that of each other one; "" with one method."""
    groups = by_method(runs)
    lasts = {
        method: {run.seed: last.result for run in seeds if (last := run.last(board))}
        for method, seeds in groups.items()
    }
    first, *others = groups
    rows = []
    for other in others:
        seeds = sorted(lasts[first].keys() & lasts[other].keys())
        pairs = [(lasts[first][seed], lasts[other][seed]) for seed in seeds]
        if not pairs:
            continue
        differences = [a.success_rate - b.success_rate for a, b in pairs]
        interval = mean_interval(differences) if len(pairs) > 1 else paired_by_task(*pairs[0])
        rows.append(
            [
                f"{escape(first)} minus {escape(other)}",
                str(len(pairs)),
                signed_points(math.fsum(differences) / len(differences)),
                percent_range(interval) if interval else NOTHING,
            ]
        )
    if not rows:
        return ""
    caption = f"Differences of the last success: {escape(board[0])}, {escape(board[1])}"
    return table(caption, ["methods", "common seeds", "points", "95 % interval"], rows)


def results(runs: Sequence[RunSummary]) -> str:
    """The tables of all evaluations, or a sentence that there is none."""
    boards = all_boards(runs)
    if not boards:
        return "<p>No evaluation has been recorded yet.</p>"
    parts = [_result_table(runs, board) for board in boards]
    parts += [_comparison_table(runs, board) for board in boards]
    parts.append(
        '<p class="note">Small numbers are 95 % intervals in per cent: Wilson over tasks, Tango '
        "over the same tasks for changes and for methods with one seed, Student's t over seeds "
        "for means and differences of several seeds. The best of several "
        "evaluations is picked on the tasks it is reported on and is therefore flattering; the "
        "last is not.</p>"
    )
    for make in (_type_table, _action_table):
        parts += [make(runs, board) for board in boards]
    return "\n".join(parts)
