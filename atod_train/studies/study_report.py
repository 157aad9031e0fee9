"""`report.html` of a whole study, and its figures as PNG files for other documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from atod_train.reports.figures import draw_png
from atod_train.reports.report import REPORT_FILE, ReportError
from atod_train.reports.report_page import definitions, distinct, escape, figure, page, table
from atod_train.studies.study_figures import page_figures, png_paints
from atod_train.studies.study_markdown import TextTable, all_tables, claims_table, describe
from atod_train.studies.study_pieces import StudyEnvironment

_METHOD = (
    '<p class="note">In brackets: 95 % intervals of a bootstrap over replicates (seeds) and '
    "tasks, drawn again independently of each other; with one seed over tasks only. A claim holds "
    "if the whole interval is above 0, and does not hold if all of it is below. The best of "
    "several evaluations is picked on the tasks it is reported on and is therefore flattering; "
    "the last is not.</p>"
)


def write_study_report(folder: Path, environments: Sequence[StudyEnvironment]) -> Path:
    """Writes `report.html` with all environments, and two PNG files for each.

    Args:
        folder: where; made if absent. Reports in its folders named like environments are linked.
        environments: what was measured.

    Returns:
        The path of the page.

    Raises:
        ReportError: a file cannot be written.
    """
    heading = f"Study: {', '.join(environment.name for environment in environments)}"
    parts = [f"<h1>{escape(heading)}</h1>", _METHOD]
    if len(environments) > 1:
        parts.append(_html(claims_table(environments)))
    for number, environment in enumerate(environments):
        parts += _section(folder, environment, f"e{number}")
    path = folder / REPORT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(page(heading, "\n".join(parts)), encoding="utf-8")
        for environment in environments:
            for name, (paint, size) in png_paints(environment).items():
                (folder / name).write_bytes(draw_png(paint, size=size))
    except OSError as error:
        raise ReportError(f"{folder} cannot be written ({error}); choose another folder") from error
    return path


def _section(folder: Path, environment: StudyEnvironment, key: str) -> list[str]:
    name = escape(environment.name)
    parts = [f"<h2>{name}</h2>", f"<p>{escape(describe(environment))}</p>", _facts(environment)]
    if (folder / environment.name / REPORT_FILE).is_file():
        parts.append(f'<p><a href="{name}/{REPORT_FILE}">Every run and its trajectories</a></p>')
    parts += [_html(found) for found in all_tables(environment, by_split=True)]
    figures = "".join(figure(item) for item in page_figures(environment, key))
    return [*parts, f'<div class="figures">{figures}</div>']


def _html(found: TextTable) -> str:
    rows = [[escape(cell) for cell in row] for row in found.rows]
    return table(escape(found.title), [escape(cell) for cell in found.head], rows)


def _facts(environment: StudyEnvironment) -> str:
    pieces = environment.pieces
    data = [piece.get("data") or {} for piece in pieces]
    models = [piece.get("model") or {} for piece in pieces]
    sizes = [piece.get("parameters") or {} for piece in pieces]
    versions = [
        ", ".join(f"{name} {version}" for name, version in (piece.get("packages") or {}).items())
        for piece in pieces
    ]
    facts = [
        (
            role,
            f"{distinct([model.get(role) for model in models])}, "
            f"{distinct([size.get(role) for size in sizes])} weights",
        )
        for role in ("student", "teacher")
    ]
    return definitions(
        [
            ("environment", distinct([piece.get("env_id") for piece in pieces])),
            ("data", distinct([found.get("name") for found in data])),
            ("data hash", f"<code>{distinct([found.get('hash') for found in data])}</code>"),
            *facts,
            ("seeds", distinct(sorted({run.seed for run in environment.runs}))),
            ("made", distinct([piece.get("time") for piece in pieces])),
            ("device", distinct([piece.get("device") for piece in pieces])),
            ("platform", distinct([piece.get("platform") for piece in pieces])),
            ("versions", distinct(versions)),
        ]
    )
