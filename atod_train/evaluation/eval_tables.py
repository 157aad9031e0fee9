"""The tables of evaluated agents in plain text: one agent by task types, or two side by side."""

from __future__ import annotations

from atod_train.evaluation.eval_records import Evaluated, differing_settings
from atod_train.records import USUAL_ENDS
from atod_train.reports.evaluations import EvaluationResult, difference_by_task
from atod_train.reports.statistics import unpaired_difference
from atod_train.reports.tables import Table, difference_text, rate_text

_UNKNOWN = "unknown"
_FIGURES = ("tasks", "success [95 % interval]", "score", "turns", "invalid")


def result_table(evaluated: Evaluated) -> str:
    """Return the figures of one agent, overall and per task type, and the tokens and seconds."""
    result = evaluated.result
    types = result.by_task_type()
    rows = [("all", *_figures(result))]
    if len(types) > 1:
        rows += [(task_type, *_figures(found)) for task_type, found in types.items()]
    limit = evaluated.token_limit
    lines = [
        f"{_title(evaluated)}, {evaluated.agent}",
        "",
        Table("", ("task type", *_FIGURES), tuple(rows)).text,
        "",
        f"{_usage(evaluated)}{evaluated.seconds:.1f} s",
    ]
    early = {name: n for name, n in evaluated.stop_reasons.items() if name not in USUAL_ENDS}
    if early:
        counts = ", ".join(f"{name} {count}" for name, count in early.items())
        lines.append(f"episodes that could not be continued and count as failed: {counts}")
    if evaluated.invalid_reasons:
        counts = "; ".join(
            f"{reason}: {count}" for reason, count in evaluated.invalid_reasons.items()
        )
        lines.append(f"invalid turns: {counts}")
    if evaluated.cut_completions:
        advice = f"the limit of {limit:,} tokens (--max-tokens)" if limit else "the token limit"
        lines.append(f"completions cut by {advice}: {evaluated.cut_completions}")
    return "\n".join(lines)


def comparison(first: Evaluated, second: Evaluated, names: tuple[str, str]) -> str:
    """Return settings that differ, both agents' figures, and the difference with its interval."""
    rows = tuple(
        (
            f"{letter}: {name}",
            *_figures(evaluated.result),
            *_usage_columns(evaluated),
            f"{evaluated.seconds:.1f}",
        )
        for letter, name, evaluated in zip("AB", names, (first, second), strict=True)
    )
    titles = [_title(first), _title(second)]
    different = tuple(differing_settings(first.settings, second.settings))
    lines = [
        titles[0] if titles[0] == titles[1] else f"A: {titles[0]}\nB: {titles[1]}",
        *(["", Table("", ("different setting", "A", "B"), different).text] if different else []),
        "",
        Table("", ("", *_FIGURES, "tokens in", "out", "cost", "seconds"), rows).text,
        "",
    ]
    a, b = first.result.by_task_type(), second.result.by_task_type()
    types = tuple(
        (
            name,
            rate_text(a[name].success),
            rate_text(b[name].success),
            f"{100 * (a[name].success_rate - b[name].success_rate):+.1f}",
        )
        for name in sorted(a.keys() & b.keys())
    )
    if len(types) > 1:
        lines += [Table("", ("task type", "A", "B", "A - B, points"), types).text, ""]
    return "\n".join([*lines, _difference(first, second)])


def _title(evaluated: Evaluated) -> str:
    return f"{evaluated.env_id}, {evaluated.result.split} ({evaluated.result.data} data)"


def _figures(result: EvaluationResult) -> tuple[str, ...]:
    return (
        str(len(result.tasks)),
        rate_text(result.success),
        f"{100 * result.mean_score:.1f}",
        f"{result.mean_turns:.1f}",
        f"{100 * result.invalid_share:.0f} %",
    )


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


def _has_tokens(evaluated: Evaluated) -> bool:
    """Return whether the agent is a model: scripted agents and people use no tokens."""
    return (evaluated.prompt_tokens, evaluated.completion_tokens) != (0, 0)


def _usage(evaluated: Evaluated) -> str:
    """Return the tokens and the cost, before the seconds; empty for an agent without tokens."""
    if not _has_tokens(evaluated):
        return ""
    thoughts, limit, cost = evaluated.reasoning_tokens, evaluated.token_limit, _cost(evaluated)
    return (
        f"tokens {_tokens(evaluated.prompt_tokens)} in, {_tokens(evaluated.completion_tokens)} out"
        + (f" ({_tokens(thoughts)} of reasoning)" if thoughts != 0 else "")
        + (f"; at most {limit:,} a completion" if limit else "")
        + (f"; cost {cost}" if cost else "")
        + "; "
    )


def _usage_columns(evaluated: Evaluated) -> tuple[str, str, str]:
    """Return tokens in, tokens out and cost; dashes for an agent without tokens."""
    if not _has_tokens(evaluated):
        return "-", "-", "-"
    cost = _cost(evaluated) or "-"
    return _tokens(evaluated.prompt_tokens), _tokens(evaluated.completion_tokens), cost


def _tokens(count: int | None) -> str:
    return _UNKNOWN if count is None else f"{count:,}"


def _cost(evaluated: Evaluated) -> str:
    """Return the cost; empty without prices."""
    if evaluated.cost is not None:
        return f"{evaluated.cost:.4f}"
    return _UNKNOWN if None in (evaluated.prompt_tokens, evaluated.completion_tokens) else ""
