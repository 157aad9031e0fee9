"""`report.html` of runs or of a study: one file that needs nothing but a browser.

First the tables of all splits and one figure of each environment; then, folded, splits, task types,
metrics over steps, cost, what was run, and a few trajectories turn by turn. The page loads nothing:
no script, no font, no picture by address; a content policy in its head forbids it as well.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.files import write_text
from atod_train.reports.figures import metric_figures, png_figures, success_figure
from atod_train.reports.metrics import TrajectoryRecord
from atod_train.reports.results import Results
from atod_train.reports.run_summary import RunSummary
from atod_train.reports.tables import (
    NOTHING,
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
_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "\ufffd")


class ReportError(AtodError):
    """A report cannot be made or written."""


def write_report(
    folder: Path,
    environments: Sequence[Results],
    runs: Mapping[str, Sequence[RunSummary]] | None = None,
    *,
    pictures: bool = False,
) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: made if absent.
        environments: what was measured.
        runs: name of an environment -> its runs as their folders have them, for trajectories and
            command lines; environments need none.
        pictures: also write two PNG files for each environment, for other documents.

    Returns:
        The path of the report.

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
    text = template.render(
        title=f"Results: {names}",
        css=(here / "report.css").read_text(encoding="utf-8"),
        claims=claims_table(environments) if len(environments) > 1 else None,
        parts=[_part(results, (runs or {}).get(results.name, ())) for results in environments],
        measures=_MEASURES,
        longest_text=LONGEST_TEXT,
    )
    path = folder / REPORT_FILE
    try:
        write_text(path, text)
        for results in environments if pictures else ():
            for name, picture in png_figures(results).items():
                (folder / name).write_bytes(picture)
    except OSError as error:
        raise ReportError(
            f"{folder} cannot be written ({error}); choose another folder."
        ) from error
    return path


def _printable(value: Any) -> Any:
    """Return text without control characters and lone surrogates."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return value.translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")


def _part(results: Results, runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Return what the template shows of an environment."""
    has_evaluations = bool(results.tasks)
    splits = list(results.tasks) if len(results.tasks) > 1 else []
    pairs = first_pairs(results)
    types = [type_table(results, mode) for mode in results.modes]
    return {
        "name": results.name,
        "description": describe(results),
        "missing": _missing(results, runs),
        "tables": [
            main_table(results),
            *([difference_table(results, pairs)] if pairs else []),
        ]
        if has_evaluations
        else [],
        "figure": success_figure(results) if has_evaluations else None,
        "details": [
            (
                "Splits",
                [main_table(results, split) for split in splits],
                [success_figure(results, split) for split in splits],
            ),
            ("Task types", [table for table in types if table], []),
            ("Metrics over steps", [], metric_figures(results)),
            ("Cost", [phase_table(results)], []),
        ],
        "facts": _facts(results, runs),
        "trajectories": _latest_trajectories(runs),
    }


def _missing(results: Results, runs: Sequence[RunSummary]) -> list[str]:
    part = results.parts[0]
    has_metrics = any(run.record["metrics"] for run in results.runs)
    checks = [
        (has_metrics, "metrics of the steps"),
        (bool(results.tasks), "evaluations"),
        (any(part["start"].values()), "an evaluation of the start"),
        (any(part["teacher"].values()), "an evaluation of the teacher"),
        (not runs or any(run.trajectories for run in runs), "trajectories"),
        (part.get("data") is not None, "the manifest (data, seeds, versions)"),
    ]
    return [name for present, name in checks if not present]


def _facts(results: Results, runs: Sequence[RunSummary]) -> list[tuple[str, str]]:
    parts = results.parts
    data = [part.get("data") or {} for part in parts]
    models = [part.get("model") or {} for part in parts]
    sizes = [part.get("parameters") or {} for part in parts]
    algorithm = [run.record.get("algorithm") or {} for run in results.runs]
    train = [run.record.get("train") or {} for run in results.runs]
    packages = [
        ", ".join(f"{name} {version}" for name, version in (part.get("packages") or {}).items())
        for part in parts
    ]
    commands = [shlex.join(map(str, run.manifest.get("command", ()))) for run in runs]
    resumed = sum(len(run.manifest.get("resumed", ())) for run in runs)
    return [
        ("environment", _distinct(part.get("env_id") for part in parts)),
        ("data", _distinct(found.get("name") for found in data)),
        ("data hash", _distinct(found.get("hash") for found in data)),
        *(
            (
                f"{role}, its weights",
                f"{_distinct(model.get(role) for model in models)}, "
                f"{_distinct(f'{size[role]:,}' for size in sizes if size.get(role))}",
            )
            for role in ("student", "teacher")
        ),
        ("methods", _distinct(settings.get("method") for settings in algorithm)),
        ("seeds", _distinct(sorted({run.seed for run in results.runs}))),
        ("steps", _distinct(settings.get("steps") for settings in train)),
        *(
            (f"{name} per step", _distinct(settings.get(key) for settings in train))
            for name, key in (("tasks", "tasks_per_step"), ("episodes of a task", "group_size"))
        ),
        ("annealing", _distinct(map(_annealing, algorithm))),
        ("started", _distinct(part.get("time") for part in parts)),
        ("resumed", f"{resumed} times"),
        ("device", _distinct(part.get("device") for part in parts)),
        ("platform", _distinct(part.get("platform") for part in parts)),
        ("versions", _distinct(packages)),
        ("command", _distinct(commands)),
    ]


def _annealing(settings: Mapping[str, Any]) -> str:
    if not {"kappa", "rho", "anneal_steps", "shape"} <= settings.keys():
        return ""
    steps = "" if settings["shape"] == "adaptive" else f" over {settings['anneal_steps']} steps"
    return "kappa {} to {}, rho {} to {}".format(*settings["kappa"], *settings["rho"]) + (
        f", {settings['shape']}{steps}"
    )


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, ""))) or (
        NOTHING
    )


def _latest_trajectories(runs: Sequence[RunSummary]) -> list[tuple[str, TrajectoryRecord]]:
    """Return the latest trajectories, run after run in turn, until there are enough."""
    deepest = max((len(run.trajectories) for run in runs), default=0)
    found = [
        (f"{run.label}, seed {run.seed}", run.trajectories[-1 - depth])
        for depth in range(deepest)
        for run in runs
        if depth < len(run.trajectories)
    ]
    return found[:MOST_TRAJECTORIES]
