"""`report.html` of runs or of a study: one file that needs nothing but a browser.

First the tables of all splits and one figure of each environment; then, folded, splits, task types,
metrics over steps, cost, what was run, and a few trajectories turn by turn. The page loads nothing:
no script, no font, no picture by address; a content policy in its head forbids it as well.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.files import write_text
from atod_train.reports.figures import metrics_figure, signals_picture, success_figure
from atod_train.reports.results import Results
from atod_train.reports.tables import (
    claims_table,
    describe,
    difference_table,
    first_pairs,
    main_table,
    phase_table,
    type_table,
)

REPORT_FILE = "report.html"
LONGEST_TEXT = 4000
"""Characters of one observation or completion that are shown."""

MOST_TRAJECTORIES = 6
_MEASURES = (
    ("disagreement", "d", "disagreement with the teacher, nats per token"),
    ("uncertainty", "h", "student's uncertainty, nats per token"),
    ("weight", "w", "turn weight of the teacher's signal"),
)
_PART_FACTS = ("env_id", "data", "env", "model", "parameters", "time", "platform", "device",
               "processes", "python", "packages")  # fmt: skip
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class ReportError(AtodError):
    """A report cannot be made or written."""


def write_report(folder: Path, environments: Sequence[Results], *, pictures: bool = False) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: made if absent.
        environments: what was measured; those made of run folders have trajectories too.
        pictures: also write two PNG files for each environment, for other documents: success, and
            coefficients with the sizes of the signals. Needs evaluations.

    Raises:
        ReportError: there are no environments, or a file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not environments:
        raise ReportError("A report needs at least one run.")
    here = Path(__file__).parent
    # Everything that comes from outside the program is escaped, and loses control characters.
    template = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
    ).get_template("report.html.j2")
    names = ", ".join(results.name for results in environments)
    parts = [_part(results) for results in environments]
    text = template.render(
        title=f"Results: {names}",
        css=(here / "report.css").read_text(encoding="utf-8"),
        claims=claims_table(environments) if len(environments) > 1 else None,
        parts=parts,
        measures=_MEASURES,
        longest_text=LONGEST_TEXT,
    )
    path = folder / REPORT_FILE
    try:
        write_text(path, text)
        for results, part in zip(environments, parts, strict=True) if pictures else ():
            (folder / f"{results.name}-success.png").write_bytes(part["figure"].png)
            (folder / f"{results.name}-signals.png").write_bytes(signals_picture(results))
    except OSError as error:
        raise ReportError(
            f"{folder} cannot be written ({error}); choose another folder."
        ) from error
    return path


def _printable(value: Any) -> Any:
    """Return text without control characters and lone surrogates."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _UNPRINTABLE.sub("\ufffd", value)


def _part(results: Results) -> dict[str, Any]:
    """Return what the template shows of an environment."""
    tables, figure = [], None
    if results.tasks:
        tables, figure = [main_table(results)], success_figure(results)
        if pairs := first_pairs(results):
            tables.append(difference_table(results, pairs))
    splits = results.tasks if len(results.tasks) > 1 else ()
    types = [type_table(results, mode) for mode in results.modes]
    metrics = metrics_figure(results)
    return {
        "name": results.name,
        "description": describe(results),
        "missing": _missing(results),
        "tables": tables,
        "figure": figure,
        "details": [
            (
                "Splits",
                [main_table(results, split) for split in splits],
                [success_figure(results, split) for split in splits],
            ),
            ("Task types", [table for table in types if table], []),
            ("Metrics over steps", [], [metrics] if metrics else []),
            ("Cost", [phase_table(results)], []),
        ],
        "facts": _facts(results),
        "trajectories": _latest_trajectories(results),
    }


def _missing(results: Results) -> list[str]:
    part, folders = results.parts[0], results.folders
    recorded = {
        "metrics of the steps": any(run.record["metrics"] for run in results.runs),
        "evaluations": results.tasks,
        "an evaluation of the start": any(part["start"].values()),
        "an evaluation of the teacher": any(part["teacher"].values()),
        "trajectories": not folders or any(run.trajectories for run in folders),
        "the manifest (data, seeds, versions)": part.get("data"),
    }
    return [name for name, found in recorded.items() if not found]


def _facts(results: Results) -> dict[str, str]:
    """Return name -> the different values of a fact, settings among them."""
    records = [
        *({name: part.get(name) for name in _PART_FACTS} for part in results.parts),
        *({name: run.record.get(name) for name in ("algorithm", "train")} for run in results.runs),
        *(
            {
                "command": shlex.join(map(str, run.manifest.get("command", ()))),
                "times resumed": len(run.manifest.get("resumed", ())),
            }
            for run in results.folders
        ),
    ]
    facts: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in record.items():
            values = value if isinstance(value, dict) else {"": value}
            for key, item in values.items():
                text = f"{item:,}" if type(item) is int else str(item)
                if item not in (None, "", [], {}):
                    facts.setdefault(f"{name}.{key}".rstrip("."), {})[text] = None
    return {name: ", ".join(texts) for name, texts in facts.items()}


def _latest_trajectories(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Return the latest trajectories, run after run in turn, until there are enough."""
    by_run = [
        [(f"{run.label}, seed {run.seed}", row) for row in reversed(run.trajectories)]
        for run in results.folders
    ]
    found = [pair for pairs in zip_longest(*by_run) for pair in pairs if pair]
    return found[:MOST_TRAJECTORIES]
