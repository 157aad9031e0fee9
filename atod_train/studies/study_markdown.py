"""The tables of a study as text: rows of cells, and Markdown made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atod_train.reports.report_page import NOTHING
from atod_train.studies.study_analysis import Estimate, cost, difference, mean_score, rate, verdict
from atod_train.studies.study_pieces import StudyEnvironment
from atod_train.studies.study_results import STILL

_PHASES = ("environment", "generation", "teacher", "update")


@dataclass(frozen=True)
class TextTable:
    """A table of plain text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def markdown(self) -> str:
        """The table, without its title, in Markdown; ends with a line break."""
        lines = [self.head, ("---",) * len(self.head), *self.rows]
        return "".join(f"| {' | '.join(_cell(text) for text in line)} |\n" for line in lines)


def main_table(environment: StudyEnvironment, split: str | None = None) -> TextTable:
    """Success, gain and cost of start, teacher and every label; split None: all tasks together.

    Where scores say more than success, as in WebShop, there is a column for their mean.
    """
    models = (*STILL, *environment.labels)
    scores = {model: mean_score(environment, model, "sampled", split) for model in models}
    solved = {model: rate(environment, model, "sampled", split) for model in models}
    is_scored = any(
        found and not math.isclose(found.value, scores[model] or 0.0, abs_tol=1e-5)
        for model, found in solved.items()
    )
    rows = []
    for model in models:
        still = model in STILL
        rates = [
            rate(environment, model, "greedy", split),
            None if still else rate(environment, model, "greedy", split, "best"),
            solved[model],
        ]
        gain = difference(environment, model, "start", "sampled", split)
        if still and not any(rates):
            continue
        seeds = NOTHING if still else str(len(environment.of(model)))
        minutes = NOTHING if still else f"{cost(environment, model).minutes:.1f}"
        cells = [rate_text(found) for found in rates]
        gained = NOTHING if model == "start" else difference_text(gain)
        score = scores[model]
        scored = NOTHING if score is None else f"{100 * score:.1f}"
        rows.append((model, seeds, *cells, gained, *([scored] if is_scored else []), minutes))
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
    return TextTable(f"{_where(split)}: tasks solved, % [95 % interval]", head, tuple(rows))


def first_pairs(environment: StudyEnvironment) -> list[tuple[str, str]]:
    """The first label with each other one, and with the teacher."""
    first, *others = environment.labels
    taught = any(piece["teacher"].values() for piece in environment.pieces)
    return [(first, other) for other in (*others, *(["teacher"] if taught else []))]


def difference_table(
    environment: StudyEnvironment, pairs: Sequence[tuple[str, str]], split: str | None = None
) -> TextTable:
    """Claims that the first of two models solves more than the second, and whether they hold.

    Args:
        environment: where.
        pairs: labels, `start` or `teacher`; a pair with nothing in common has no numbers.
        split: of the tasks; None: all of them together.
    """
    rows = []
    for first, second in pairs:
        cells, common = [], 0
        for mode in ("greedy", "sampled"):
            found = difference(environment, first, second, mode, split)
            cells += [difference_text(found), verdict(found) if found else NOTHING]
            common = max(common, found.replicates if found else 0)
        rows.append((f"{first} > {second}", str(common), *cells))
    head = ("claim", "common seeds", "greedy, last", "verdict", "sampled, last", "verdict")
    return TextTable(f"{_where(split)}: differences, points", head, tuple(rows))


def claims_table(
    environments: Sequence[StudyEnvironment], pairs: Sequence[tuple[str, str]] = ()
) -> TextTable:
    """Claims at one glance: sampled success at the last step in every environment.

    Args:
        environments: where.
        pairs: claims, as in `difference_table`; none: the `first_pairs` of all of them.
    """
    claims = dict.fromkeys(pairs or (pair for found in environments for pair in first_pairs(found)))
    rows = []
    for first, second in claims:
        cells = []
        for environment in environments:
            found = difference(environment, first, second, "sampled")
            cells.append(f"{difference_text(found)} {verdict(found)}" if found else NOTHING)
        rows.append((f"{first} > {second}", *cells))
    head = ("claim", *(environment.name for environment in environments))
    return TextTable("Sampled, last: differences, points, and verdicts", head, tuple(rows))


def all_tables(
    environment: StudyEnvironment,
    pairs: Sequence[tuple[str, str]] = (),
    *,
    by_split: bool,
) -> list[TextTable]:
    """All tables of an environment in order.

    Args:
        environment: where.
        pairs: claims, as in `difference_table`; none: `first_pairs`.
        by_split: success for each split too, where there are several.
    """
    splits = list(environment.tasks) if by_split and len(environment.tasks) > 1 else []
    tables = [main_table(environment, split) for split in (None, *splits)]
    if chosen := pairs or first_pairs(environment):
        tables.append(difference_table(environment, chosen))
    return [*tables, phase_table(environment)]


def phase_table(environment: StudyEnvironment) -> TextTable:
    """Minutes, episodes and tokens of a run, and the share of each phase."""
    rows = []
    for label in environment.labels:
        found = cost(environment, label)
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
    return TextTable("A run on average, and where its time goes", head, tuple(rows))


def describe(environment: StudyEnvironment) -> str:
    """One sentence on what was evaluated."""
    sizes = ", ".join(f"{split} {len(tasks)}" for split, tasks in environment.tasks.items())
    total = sum(map(len, environment.tasks.values()))
    pieces = len(environment.pieces)
    made = "one start and teacher" if pieces == 1 else f"{pieces} starts and teachers"
    return f"{total} tasks ({sizes}); {len(environment.runs)} runs from {made}."


def rate_text(estimate: Estimate | None) -> str:
    """As "72.1 [64.2, 78.9]", in percent."""
    if estimate is None:
        return NOTHING
    return f"{_points(estimate.value)} [{_points(estimate.low)}, {_points(estimate.high)}]"


def difference_text(estimate: Estimate | None) -> str:
    """As "+4.3 [-1.0, +9.9]", in points."""
    if estimate is None:
        return NOTHING
    low, high = (_points(bound, "+") for bound in (estimate.low, estimate.high))
    return f"{_points(estimate.value, '+')} [{low}, {high}]"


def _points(share: float, sign: str = "") -> str:
    rounded = round(100 * share, 1) + 0.0  # no "-0.0"
    return f"{rounded:{sign}.1f}"


def _where(split: str | None) -> str:
    return split or "all splits together"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
