"""The tables of evaluated agents in plain text: one agent by task types, or two side by side."""

from __future__ import annotations

from collections.abc import Mapping

from atod_train.evaluation.eval_records import Evaluated, Totals
from atod_train.reports.evaluations import EvaluationResult, difference_by_task
from atod_train.reports.statistics import unpaired_difference
from atod_train.reports.tables import Table, difference_text, rate_text

UNKNOWN = "unknown"

_RATE = "success [95 % interval]"
_ENDS = ("terminated", "turn_limit")
"""Reasons why an episode stops in the usual way."""
_SHOWN_REASONS = 5


def result_table(evaluated: Evaluated) -> str:
    """Return the figures of one agent, overall and per task type, and the tokens and seconds."""
    result, totals = evaluated.result, evaluated.totals
    rows = [("all", *_figures(result))]
    types = result.by_task_type()
    if len(types) > 1:
        rows += [(task_type, *_figures(found)) for task_type, found in types.items()]
    head = ("task type", "tasks", _RATE, "score", "turns", "invalid")
    lines = [
        f"{evaluated.env_id}, {result.split} ({result.data} data), {evaluated.agent}",
        "",
        Table("", head, tuple(rows)).text,
        "",
        f"tokens {_tokens(totals.prompt_tokens)} in, {_tokens(totals.completion_tokens)} out"
        f"{_of_reasoning(totals.reasoning_tokens)}{_cost(totals, '; cost ')}; "
        f"{totals.seconds:.1f} s",
    ]
    early = {name: n for name, n in totals.stop_reasons.items() if name not in _ENDS}
    if early:
        counts = ", ".join(f"{name} {count}" for name, count in early.items())
        lines.append(f"episodes that could not be continued and count as failed: {counts}")
    if totals.invalid_reasons:
        lines.append(f"invalid turns: {_reasons(totals.invalid_reasons)}")
    if totals.cut_completions:
        lines.append(f"completions cut by the token limit: {totals.cut_completions}")
    return "\n".join(lines)


def comparison(first: Evaluated, second: Evaluated, names: tuple[str, str]) -> str:
    """Return both agents' figures, and the interval of the first's success minus the second's."""
    head = ("", "tasks", _RATE, "score", "turns", "invalid", "tokens in", "out", "cost", "seconds")
    rows = [
        (
            f"{letter}: {name}",
            *_figures(evaluated.result),
            _tokens(evaluated.totals.prompt_tokens),
            _tokens(evaluated.totals.completion_tokens),
            _cost(evaluated.totals) or "-",
            f"{evaluated.totals.seconds:.1f}",
        )
        for letter, name, evaluated in zip("AB", names, (first, second), strict=True)
    ]
    lines = [_titles(first, second), "", Table("", head, tuple(rows)).text, ""]
    types = _type_rows(first.result, second.result)
    if len(types) > 1:
        lines += [Table("", ("task type", "A", "B", "A - B, points"), tuple(types)).text, ""]
    return "\n".join([*lines, _difference(first, second)])


def _figures(result: EvaluationResult) -> tuple[str, ...]:
    return (
        str(len(result.tasks)),
        rate_text(result.success),
        f"{100 * result.mean_score:.1f}",
        f"{result.mean_turns:.1f}",
        f"{100 * result.invalid_share:.0f} %",
    )


def _reasons(counts: Mapping[str, int]) -> str:
    """Return the most frequent reasons of invalid turns, and the others as one."""
    shown = sorted(counts.items(), key=lambda item: -item[1])
    others = sum(count for _, count in shown[_SHOWN_REASONS:])
    parts = [*shown[:_SHOWN_REASONS], *([("other reasons", others)] if others else [])]
    return "; ".join(f"{reason}: {count}" for reason, count in parts)


def _titles(first: Evaluated, second: Evaluated) -> str:
    titles = [
        f"{evaluated.env_id}, {evaluated.result.split} ({evaluated.result.data} data)"
        for evaluated in (first, second)
    ]
    return titles[0] if titles[0] == titles[1] else f"A: {titles[0]}\nB: {titles[1]}"


def _type_rows(first: EvaluationResult, second: EvaluationResult) -> list[tuple[str, ...]]:
    """Return the success per task type of both, and the difference."""
    a, b = first.by_task_type(), second.by_task_type()
    return [
        (
            name,
            rate_text(a[name].success),
            rate_text(b[name].success),
            f"{100 * (a[name].success_rate - b[name].success_rate):+.1f}",
        )
        for name in sorted(a.keys() & b.keys())
    ]


def _difference(first: Evaluated, second: Evaluated) -> str:
    """Return one line: paired where both played the same tasks of the same data."""
    a, b = first.result, second.result
    same = (first.env_id, first.data_hash) == (second.env_id, second.data_hash)
    found = difference_by_task(a, b) if same else None
    how = f"paired over {len(a.tasks)} task{'s' if len(a.tasks) != 1 else ''}"
    if found is None:
        found = unpaired_difference(a.solved, b.solved)
        how = "not paired: they did not play the same tasks"
    return f"A - B, points [95 % interval]: {difference_text(found)}, {how}"


def _tokens(count: int | None) -> str:
    return UNKNOWN if count is None else f"{count:,}"


def _of_reasoning(count: int | None) -> str:
    return f" ({_tokens(count)} of reasoning)" if count != 0 else ""


def _cost(totals: Totals, label: str = "") -> str:
    """Return label and cost; empty without prices."""
    if totals.cost is not None:
        return f"{label}{totals.cost:.4f}"
    return f"{label}{UNKNOWN}" if None in (totals.prompt_tokens, totals.completion_tokens) else ""
