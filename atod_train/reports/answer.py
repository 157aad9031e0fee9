"""Summarise results in a few lines: which run ends highest, by how much, is it significant.

The numbers are those of the tables: tasks of all splits, last mode, after the last step.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import Any

from atod_train.reports.analysis import Selection, budget, difference, rate
from atod_train.reports.results import REFERENCES, Results
from atod_train.reports.statistics import Estimate
from atod_train.reports.tables import BUDGET, Table, difference_text, rate_text

_MANY_INVALID = 0.9
"""Share of invalid turns from which on the answer reports it. Tiny models that solve half of their
tasks repeat invalid actions in the other half: their share is 0.5 to 0.7."""


@dataclass(frozen=True)
class Comparison:
    """The highest run minus another model."""

    other: str
    points: str
    """Difference in points with its 95 % interval."""
    significance: str
    replicates: int
    """Seeds that both have."""
    direction: int
    """1 or -1 where the whole interval is above or below 0, else 0."""


@dataclass(frozen=True)
class Answer:
    """The answer of the results of an environment."""

    winner: str
    """Label of the run that ends highest; of equal ones the first."""
    headline: str
    """One sentence: the winner and its success."""
    comparisons: tuple[Comparison, ...]
    """With start and teacher, then with the other runs."""
    remarks: tuple[str, ...]
    """Facts to know before believing or repeating the result."""

    @property
    def text(self) -> str:
        """The answer as lines of text."""
        rows = tuple(
            (f"  {self.winner} - {c.other}", c.points, c.significance) for c in self.comparisons
        )
        table = Table("", ("", "points", ""), rows).text if rows else ""
        return "\n".join(filter(None, (self.headline, table, *self.remarks)))


def answer(results: Results) -> Answer | None:
    """Return the answer of an environment, or None if no run was evaluated after its start."""
    if not results.modes:
        return None
    last = Selection(results.modes[-1])
    rates = {label: found for label in results.labels if (found := rate(results, label, last))}
    if not rates:
        return None
    highest = max(found.value for found in rates.values())
    first, *equal = [label for label, found in rates.items() if found.value == highest]
    others = [model for model in (*REFERENCES, *rates) if model != first]
    comparisons = tuple(
        _comparison(model, found)
        for model in others
        if (found := difference(results, first, model, last))
    )
    tasks = sum(map(len, results.tasks.values()))
    solves = f"{rate_text(rates[first]).replace(' ', ' % ', 1)} of {tasks:,} tasks"
    if not highest:
        subject, solves = "No run solves any ", f"of {tasks:,} tasks"
    elif len(rates) == 1:
        subject = f"{first} solves "
    elif equal:
        subject = f"{', '.join((first, *equal))} end highest, equal, and solve "
    else:
        subject = f"{first} ends highest and solves "
    step = _mean_of_last(results, first, last.mode, "step")
    headline = f"{subject}{solves} after step {step:.0f} ({last.mode} decoding)."
    return Answer(first, headline, comparisons, tuple(_remarks(results, first, last, comparisons)))


def _comparison(other: str, found: Estimate) -> Comparison:
    direction = 1 if found.low > 0 else -1 if found.high < 0 else 0
    text = ("not significant", "significant", "significantly below")[direction]
    if direction and found.replicates == 1:
        # Its interval does not include the spread between seeds.
        text = f"{text} over tasks"
    return Comparison(other, difference_text(found), text, found.replicates, direction)


def _remarks(
    results: Results, first: str, last: Selection, comparisons: tuple[Comparison, ...]
) -> list[str]:
    remarks = []
    budgets = {label: budget(results, label) for label in results.labels}
    if len(set(budgets.values())) > 1:
        texts = ", ".join(f"{label} {text}" for label, text in budgets.items())
        remarks.append(f"The runs have different budgets ({BUDGET}): {texts}.")
    if any(found.replicates == 1 for found in comparisons):
        remarks.append(
            "Intervals of one seed are over tasks: they do not include the spread between seeds."
        )
    gap = difference(results, "teacher", "start", last)
    if gap and gap.low <= 0:
        remarks.append(
            f"The teacher is not significantly better than the start ({difference_text(gap)} "
            "points): its signal alone can add little."
        )
    invalid = _mean_of_last(results, first, last.mode, "invalid_share")
    if invalid >= _MANY_INVALID:
        remarks.append(
            f"{100 * invalid:.0f} % of the turns of {first} are not valid actions. Read its "
            "trajectories; check env.parse_profile, env.prompt_style and "
            "train.max_completion_tokens, or begin with a stronger start."
        )
    return remarks


def _mean_of_last(results: Results, label: str, mode: str, name: str) -> float:
    """Return the mean of a number over the last evaluations of a label; 0 if it has none."""
    evaluations: list[dict[str, Any]] = [
        found
        for run in results.of(label)
        for key, found in run.record["last"].items()
        if found and key.rpartition("/")[2] == mode
    ]
    return fmean(found.get(name, 0.0) for found in evaluations)
