"""The tables of evaluated agents in plain text: one agent by task types, or two side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from atod_train.evaluation.eval_records import Evaluated
from atod_train.reports.statistics import (
    EvaluationResult,
    Interval,
    difference_interval,
    paired_by_task,
)

UNKNOWN = "unknown"

_RATE = "success [95 % interval]"
_ENDS = ("terminated", "turn_limit")
"""Reasons why an episode stops in the usual way."""
_SHOWN_REASONS = 5


def result_table(evaluated: Evaluated) -> str:
    """The figures of one agent, overall and per task type, and what they took."""
    result, totals = evaluated.result, evaluated.totals
    rows = [["all", *_figures(result)]]
    types = [row.task_type for row in result.by_task_type()]
    for task_type in types if len(types) > 1 else ():
        tasks = tuple(task for task in result.tasks if task.task_type == task_type)
        rows.append([task_type, *_figures(replace(result, tasks=tasks))])
    head = ["task type", "tasks", _RATE, "score", "turns", "invalid"]
    lines = [
        f"{evaluated.env_id}, {result.split} ({result.data} data), {evaluated.agent}",
        "",
        text_table(head, rows),
        "",
        f"tokens {_tokens(totals.prompt_tokens)} in, {_tokens(totals.completion_tokens)} out"
        f"{_of_reasoning(totals.reasoning_tokens)}; cost {_cost(totals.cost)}; "
        f"{totals.seconds:.1f} s",
    ]
    early = {name: n for name, n in totals.stop_reasons.items() if name not in _ENDS}
    if early:
        counts = ", ".join(f"{name} {count}" for name, count in early.items())
        lines.append(f"episodes that could not be continued and count as failed: {counts}")
    if totals.invalid_reasons:
        lines.append(f"invalid turns: {_reasons(totals.invalid_reasons)}")
    if totals.cut_completions:
        lines.append(f"completions cut by the limit of tokens: {totals.cut_completions}")
    return "\n".join(lines)


def comparison(first: Evaluated, second: Evaluated, names: tuple[str, str]) -> str:
    """Both agents, and the interval of the first's success rate minus the second's."""
    head = ["", "tasks", _RATE, "score", "turns", "invalid", "tokens in", "out", "cost", "seconds"]
    rows = [
        [
            f"{letter}: {name}",
            *_figures(evaluated.result),
            _tokens(evaluated.totals.prompt_tokens),
            _tokens(evaluated.totals.completion_tokens),
            _cost(evaluated.totals.cost),
            f"{evaluated.totals.seconds:.1f}",
        ]
        for letter, name, evaluated in zip("AB", names, (first, second), strict=True)
    ]
    lines = [_titles(first, second), "", text_table(head, rows), ""]
    types = _type_rows(first.result, second.result)
    if len(types) > 1:
        lines += [text_table(["task type", "A", "B", "A - B, points"], types), ""]
    return "\n".join([*lines, _difference(first, second)])


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _figures(result: EvaluationResult) -> list[str]:
    return [
        str(len(result.tasks)),
        f"{100 * result.success_rate:.1f} {_percents(result.interval)}",
        f"{100 * result.mean_score:.1f}",
        f"{result.mean_turns:.1f}",
        f"{100 * result.invalid_share:.0f} %",
    ]


def _reasons(counts: Mapping[str, int]) -> str:
    """The most frequent reasons of invalid turns; the others as one."""
    shown = sorted(counts.items(), key=lambda item: -item[1])
    others = sum(count for _, count in shown[_SHOWN_REASONS:])
    parts = [*shown[:_SHOWN_REASONS], *([("other reasons", others)] if others else [])]
    return "; ".join(f"{reason}: {count}" for reason, count in parts)


def _percents(interval: Interval, sign: str = "") -> str:
    low, high = (f"{100 * bound:{sign}.1f}" for bound in interval)
    return f"[{low}, {high}]"


def _titles(first: Evaluated, second: Evaluated) -> str:
    titles = [
        f"{evaluated.env_id}, {evaluated.result.split} ({evaluated.result.data} data)"
        for evaluated in (first, second)
    ]
    return titles[0] if titles[0] == titles[1] else f"A: {titles[0]}\nB: {titles[1]}"


def _type_rows(first: EvaluationResult, second: EvaluationResult) -> list[list[str]]:
    """Success per task type of both, and the difference."""
    a = {row.task_type: row for row in first.by_task_type()}
    b = {row.task_type: row for row in second.by_task_type()}
    rows = []
    for name in sorted(a.keys() & b.keys()):
        points = 100 * (a[name].success_rate - b[name].success_rate)
        cells = [
            f"{100 * row.success_rate:.1f} {_percents(row.interval)}" for row in (a[name], b[name])
        ]
        rows.append([name, *cells, f"{points:+.1f}"])
    return rows


def _difference(first: Evaluated, second: Evaluated) -> str:
    """One line: paired where both played the same tasks of the same data."""
    a, b = first.result, second.result
    points = f"A - B: {100 * (a.success_rate - b.success_rate):+.1f} points"
    same = (first.env_id, first.data_hash) == (second.env_id, second.data_hash)
    paired = paired_by_task(a, b) if same else None
    if paired is not None:
        tasks = f"{len(a.tasks)} tasks" if len(a.tasks) != 1 else "1 task"
        return f"{points}, 95 % interval {_percents(paired, '+')}, paired over {tasks}"
    interval = difference_interval(a.successes, len(a.tasks), b.successes, len(b.tasks))
    return (
        f"{points}, 95 % interval {_percents(interval, '+')}, not paired: "
        "they did not play the same tasks"
    )


def _tokens(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def _of_reasoning(count: int | None) -> str:
    return f" ({_tokens(count)} of reasoning)" if count != 0 else ""


def _cost(cost: float | None) -> str:
    return UNKNOWN if cost is None else f"{cost:.4f}"
