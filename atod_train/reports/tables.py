"""The one table: rows of text cells, shown as aligned text, Markdown or HTML; and those of results.

All intervals are those of `statistics`: a crossed bootstrap over seeds and tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atod_train.reports.analysis import (
    Selection,
    cost,
    difference,
    mean_score,
    rate,
    verdict,
)
from atod_train.reports.results import REFERENCES, Results
from atod_train.reports.statistics import Estimate

NOTHING = "\u2013"
"""Text of a cell without a value."""

_PHASES = ("environment", "generation", "teacher", "update")


@dataclass(frozen=True)
class Table:
    """A table of plain text; the first column names the rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        """The table, without its title, in aligned columns: the first left, the others right."""
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if place else cell.ljust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    @property
    def markdown(self) -> str:
        """The table, without its title, in Markdown; ends with a line break."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main_table(results: Results, split: str | None = None) -> Table:
    """Return success, gain and cost of start, teacher and every label.

    Where scores say more than success, as in WebShop, there is a column for their mean.

    Args:
        results: of one environment.
        split: tasks of this split; None: all tasks together.
    """
    greedy, sampled = Selection("greedy", split), Selection("sampled", split)
    models = (*REFERENCES, *results.labels)
    scores = {model: mean_score(results, model, sampled) for model in models}
    solved = {model: rate(results, model, sampled) for model in models}
    is_scored = any(
        found and not math.isclose(found.value, scores[model] or 0.0, abs_tol=1e-5)
        for model, found in solved.items()
    )
    rows = []
    for model in models:
        is_run = model not in REFERENCES
        best = rate(results, model, Selection("greedy", split, "best")) if is_run else None
        rates = [rate(results, model, greedy), best, solved[model]]
        if not is_run and not any(rates):
            continue
        gain = None if model == "start" else difference(results, model, "start", sampled)
        score = scores[model]
        rows.append(
            (
                model,
                str(len(results.of(model))) if is_run else NOTHING,
                *map(rate_text, rates),
                difference_text(gain),
                *([NOTHING if score is None else f"{100 * score:.1f}"] if is_scored else []),
                f"{cost(results, model).minutes:.1f}" if is_run else NOTHING,
            )
        )
    head = (
        "model",
        "seeds",
        "greedy, last",
        "greedy, best",
        "sampled, last",
        "gain over start (sampled, last)",
        *(["score (sampled, last)"] if is_scored else []),
        "minutes",
    )
    return Table(f"{_where(split)}: tasks solved, % [95 % interval]", head, tuple(rows))


def first_pairs(results: Results) -> list[tuple[str, str]]:
    """Return the first label with each other one, and with the teacher."""
    first, *others = results.labels
    taught = any(any(part["teacher"].values()) for part in results.parts)
    return [(first, other) for other in (*others, *(["teacher"] if taught else []))]


def difference_table(
    results: Results, pairs: Sequence[tuple[str, str]], split: str | None = None
) -> Table:
    """Return claims that the first of two models solves more than the second, with verdicts.

    Args:
        results: of one environment.
        pairs: labels, `start` or `teacher`; a pair with nothing in common has no numbers.
        split: of the tasks; None: all of them together.
    """
    rows = []
    for first, second in pairs:
        cells, common = [], 0
        for mode in ("greedy", "sampled"):
            found = difference(results, first, second, Selection(mode, split))
            cells += [difference_text(found), verdict(found) if found else NOTHING]
            common = max(common, found.replicates if found else 0)
        rows.append((f"{first} > {second}", str(common), *cells))
    head = ("claim", "common seeds", "greedy, last", "verdict", "sampled, last", "verdict")
    return Table(f"{_where(split)}: differences, points", head, tuple(rows))


def claims_table(environments: Sequence[Results], pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Return claims at one glance: sampled success at the last step in every environment.

    Args:
        environments: of a study.
        pairs: claims, as in `difference_table`; none: the `first_pairs` of all of them.
    """
    claims = dict.fromkeys(pairs or (pair for found in environments for pair in first_pairs(found)))
    rows = []
    for first, second in claims:
        cells = []
        for results in environments:
            found = difference(results, first, second, Selection("sampled"))
            cells.append(f"{difference_text(found)} {verdict(found)}" if found else NOTHING)
        rows.append((f"{first} > {second}", *cells))
    head = ("claim", *(results.name for results in environments))
    return Table("Sampled, last: differences, points, and verdicts", head, tuple(rows))


def type_table(results: Results, mode: str) -> Table | None:
    """Return success per task type at the last step, or None where there is one type or none."""
    types = sorted({name for found in results.task_types.values() for name in found})
    if len(types) < 2:
        return None
    models = (*REFERENCES, *results.labels)
    rows = [
        (name, *(rate_text(rate(results, m, Selection(mode, task_type=name))) for m in models))
        for name in types
    ]
    title = f"Per task type, {mode}, last: tasks solved, % [95 % interval]"
    return Table(title, ("task type", *models), tuple(rows))


def phase_table(results: Results) -> Table:
    """Return minutes, episodes and tokens of a run, and the share of each phase."""
    rows = []
    for label in results.labels:
        found = cost(results, label)
        shares = [found.phases.get(phase, 0.0) for phase in _PHASES]
        rest = sum(share for phase, share in found.phases.items() if phase not in _PHASES)
        rows.append(
            (
                label,
                f"{found.minutes:.1f}",
                f"{found.episodes:.0f}",
                f"{found.tokens / 1000:.0f}",
                *(f"{share:.0f} %" for share in (*shares, rest)),
            )
        )
    head = ("model", "minutes", "episodes", "thousand tokens", *_PHASES, "evaluation, other")
    return Table("A run on average, and where its time goes", head, tuple(rows))


def all_tables(
    results: Results, pairs: Sequence[tuple[str, str]] = (), *, by_split: bool
) -> list[Table]:
    """Return all tables of an environment in order.

    Args:
        results: of one environment.
        pairs: claims, as in `difference_table`; none: `first_pairs`.
        by_split: success for each split too, where there are several.
    """
    splits = list(results.tasks) if by_split and len(results.tasks) > 1 else []
    tables = [main_table(results, split) for split in (None, *splits)]
    if chosen := pairs or first_pairs(results):
        tables.append(difference_table(results, chosen))
    return [*tables, phase_table(results)]


def as_text(tables: Sequence[Table]) -> str:
    """Return tables for a terminal, each under its title."""
    return "\n\n".join(f"{table.title}\n{table.text}" for table in tables)


def describe(results: Results) -> str:
    """Return one sentence on what was evaluated."""
    sizes = ", ".join(f"{split} {len(tasks)}" for split, tasks in results.tasks.items())
    total = sum(map(len, results.tasks.values()))
    parts = len(results.parts)
    made = "one start and teacher" if parts == 1 else f"{parts} starts and teachers"
    return f"{total} tasks ({sizes}); {len(results.runs)} runs from {made}."


def rate_text(found: Estimate | None) -> str:
    """Return a rate as "72.1 [64.2, 78.9]", in percent."""
    if found is None:
        return NOTHING
    return f"{_points(found.value)} [{_points(found.low)}, {_points(found.high)}]"


def difference_text(found: Estimate | None) -> str:
    """Return a difference as "+4.3 [-1.0, +9.9]", in points."""
    if found is None:
        return NOTHING
    low, high = (_points(bound, "+") for bound in (found.low, found.high))
    return f"{_points(found.value, '+')} [{low}, {high}]"


def _points(share: float, sign: str = "") -> str:
    rounded = round(100 * share, 1) + 0.0  # no "-0.0"
    return f"{rounded:{sign}.1f}"


def _where(split: str | None) -> str:
    return split or "all splits together"
