"""Make tables of text cells, as aligned text, Markdown or HTML; and those of results.

All intervals are those of `statistics`: a crossed bootstrap over seeds and tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atod_train.reports.analysis import (
    Selection,
    budget,
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

ALL_SPLITS = "all splits together"
BUDGET = "steps x tasks x episodes"
_PHASES = ("environment", "generation", "teacher", "update")


@dataclass(frozen=True)
class Table:
    """A table of plain text; the first column names the rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def text(self) -> str:
        """Return the table without its title, in columns: the first left, the others right."""
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
        """Return the table, without its title, in Markdown; ends with a line break."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
        return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def main_table(results: Results, split: str | None = None) -> Table:
    """Return success, gain and cost of start, teacher and every label, on a split or on all tasks.

    The best evaluation is that of the first mode; gains and scores are those of the last mode.
    If scores differ from success, as in WebShop, there is a column for their mean; if budgets
    differ, one for them.
    """
    first, *others = results.modes
    final = results.modes[-1]
    lasts = [Selection(mode, split) for mode in results.modes]
    models = (*REFERENCES, *results.labels)
    scores = {model: mean_score(results, model, lasts[-1]) for model in models}
    solved = {model: rate(results, model, lasts[-1]) for model in models}
    is_scored = any(
        found and not math.isclose(found.value, scores[model] or 0.0, abs_tol=1e-5)
        for model, found in solved.items()
    )
    budgets = {label: budget(results, label) for label in results.labels}
    are_unequal = len(set(budgets.values())) > 1
    rows = []
    for model in models:
        runs = results.of(model)
        best = rate(results, model, Selection(first, split, "best")) if runs else None
        rates = [rate(results, model, last) for last in lasts]
        rates.insert(1, best)
        if not runs and not any(rates):
            continue
        gain = None if model == "start" else difference(results, model, "start", lasts[-1])
        score = scores[model]
        rows.append(
            (
                model,
                str(len(runs)) if runs else NOTHING,
                *([budgets.get(model, NOTHING)] if are_unequal else []),
                *map(rate_text, rates),
                difference_text(gain),
                *([NOTHING if score is None else f"{100 * score:.1f}"] if is_scored else []),
                f"{cost(results, model).minutes:.1f}" if runs else NOTHING,
            )
        )
    head = (
        "model",
        "seeds",
        *([BUDGET] if are_unequal else []),
        f"{first}, last",
        f"{first}, best",
        *(f"{mode}, last" for mode in others),
        f"gain over start ({final}, last)",
        *([f"score ({final}, last)"] if is_scored else []),
        "minutes",
    )
    return Table(f"{split or ALL_SPLITS}: tasks solved, % [95 % interval]", head, tuple(rows))


def first_pairs(results: Results) -> list[tuple[str, str]]:
    """Return the first label with each other one, and with the teacher."""
    first, *others = results.labels
    taught = any(any(part["teacher"].values()) for part in results.parts)
    return [(first, other) for other in (*others, *(["teacher"] if taught else []))]


def difference_table(results: Results, pairs: Sequence[tuple[str, str]]) -> Table:
    """Return claims that the first of two models solves more than the second, with verdicts.

    The models are labels, `start` or `teacher`; a pair without common replicates has no numbers.
    """
    rows = []
    for first, second in pairs:
        cells, common = [], 0
        for mode in results.modes:
            found = difference(results, first, second, Selection(mode))
            cells += [difference_text(found), verdict(found) if found else NOTHING]
            common = max(common, found.replicates if found else 0)
        rows.append((f"{first} > {second}", str(common), *cells))
    modes = [text for mode in results.modes for text in (f"{mode}, last", "verdict")]
    head = ("claim", "common seeds", *modes)
    return Table(f"{ALL_SPLITS}: differences, points", head, tuple(rows))


def claims_table(environments: Sequence[Results], pairs: Sequence[tuple[str, str]] = ()) -> Table:
    """Return claims at a glance: success in the last mode after the last step, by environment.

    The pairs are claims, as in `difference_table`; none: the `first_pairs` of all environments.
    """
    claims = dict.fromkeys(pairs or (pair for found in environments for pair in first_pairs(found)))
    rows = []
    for first, second in claims:
        cells = []
        for results in environments:
            found = difference(results, first, second, Selection(results.modes[-1]))
            cells.append(f"{difference_text(found)} {verdict(found)}" if found else NOTHING)
        rows.append((f"{first} > {second}", *cells))
    head = ("claim", *(results.name for results in environments))
    modes = ", ".join(dict.fromkeys(results.modes[-1] for results in environments))
    return Table(
        f"{modes.capitalize()}, last: differences, points, and verdicts", head, tuple(rows)
    )


def type_table(results: Results, mode: str) -> Table | None:
    """Return success per task type at the last step, or None with at most one type."""
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
    """Return minutes, episodes and tokens of a run, and the share of each phase.

    If a schedule withdrew the teacher, there is a column for the share of steps without its scores.
    """
    costs = {label: cost(results, label) for label in results.labels}
    was_withdrawn = any(0 < found.teacher_passes_saved < 100 for found in costs.values())
    rows = []
    for label, (minutes, episodes, tokens, phases, saved) in costs.items():
        shares = [phases.get(phase, 0.0) for phase in _PHASES]
        rest = sum(share for phase, share in phases.items() if phase not in _PHASES)
        totals = (f"{minutes:.1f}", f"{episodes:.0f}", f"{tokens / 1000:.0f}")
        percent = (*shares, rest, *([saved] if was_withdrawn else []))
        rows.append((label, *totals, *(f"{share:.0f} %" for share in percent)))
    last = ("evaluation, other", *(["teacher passes saved"] if was_withdrawn else []))
    head = ("model", "minutes", "episodes", "thousand tokens", *_PHASES, *last)
    return Table("A run on average, and where its time goes", head, tuple(rows))


def all_tables(
    results: Results, pairs: Sequence[tuple[str, str]] = (), *, by_split: bool
) -> list[Table]:
    """Return all tables of an environment; `by_split`: success on each of several splits, too.

    The pairs are claims, as in `difference_table`; none: the `first_pairs`.
    """
    splits = list(results.tasks) if by_split and len(results.tasks) > 1 else []
    tables = [main_table(results, split) for split in (None, *splits)]
    if chosen := pairs or first_pairs(results):
        tables.append(difference_table(results, chosen))
    return [*tables, phase_table(results)]


def describe(results: Results) -> str:
    """Return one sentence about the evaluations."""
    sizes = ", ".join(f"{split} {len(tasks)}" for split, tasks in results.tasks.items())
    total = sum(map(len, results.tasks.values()))
    parts = len(results.parts)
    made = "one start and teacher" if parts == 1 else f"{parts} starts and teachers"
    return f"{total} tasks ({sizes}); {len(results.runs)} runs from {made}."


def rate_text(found: Estimate | None, sign: Literal["", "+"] = "") -> str:
    """Return a rate as "72.1 [64.2, 78.9]", in percent."""
    if found is None:
        return NOTHING
    shares = (found.value, found.low, found.high)
    # Adding 0.0 converts -0.0 to 0.0.
    value, low, high = (f"{round(100 * share, 1) + 0.0:{sign}.1f}" for share in shares)
    return f"{value} [{low}, {high}]"


def difference_text(found: Estimate | None) -> str:
    """Return a difference as "+4.3 [-1.0, +9.9]", in points."""
    return rate_text(found, "+")
