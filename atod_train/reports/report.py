"""`report.html` of a run or a study: one file that needs nothing but a browser.

It shows what was run, a table of results with 95 % intervals, the course of training, and a few
trajectories turn by turn. What a run has not recorded is named as missing, never guessed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from atod_gym.errors import AtodError
from atod_train.reports.curves import metric_figures
from atod_train.reports.figures import success_figure
from atod_train.reports.metrics import TrajectoryRecord
from atod_train.reports.report_data import RunSummary, all_boards, by_method, read_run
from atod_train.reports.report_page import (
    definitions,
    distinct,
    escape,
    figure,
    page,
    percent,
    percent_range,
    signed_points,
    tiles,
    trajectory,
)
from atod_train.reports.statistics import mean_interval, paired_by_task
from atod_train.reports.tables import results

__all__ = ["RunSummary", "read_run", "write_report"]

REPORT_FILE = "report.html"


class ReportError(AtodError):
    """A report cannot be made or written."""


def write_report(
    run_dir: Path,
    runs: Sequence[RunSummary] | None = None,
    *,
    title: str | None = None,
    max_trajectories: int = 6,
) -> Path:
    """Writes `run_dir/report.html`.

    Args:
        run_dir: the folder of a run, or of a study.
        runs: the runs to compare; default: the one in `run_dir`.
        title: heading; default: made from methods and environment.
        max_trajectories: at most this many trajectories are shown, the latest of each run.

    Returns:
        The path of the report.

    Raises:
        ReportError: there is no run, or the file cannot be written.
        RunFolderError: a file of the run is broken.
    """
    runs = [read_run(run_dir)] if runs is None else list(runs)
    if not runs:
        raise ReportError("a report needs at least one run")
    heading = title or _title(runs)
    missing = _missing(runs)
    parts = [f"<h1>{escape(heading)}</h1>", _lead(runs), _key_figures(runs)]
    parts += ["<h2>What was run</h2>", _facts(runs)]
    if missing:
        parts.append(f'<p class="note">Not recorded: {escape("; ".join(missing))}.</p>')
    parts += ["<h2>Results</h2>", results(runs), "<h2>Course of training</h2>", _figures(runs)]
    parts += ["<h2>Trajectories</h2>", _trajectories(runs, max_trajectories)]
    path = run_dir / REPORT_FILE
    try:
        path.write_text(page(heading, "\n".join(parts)), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"{path} cannot be written ({error}); choose another folder") from error
    return path


def _title(runs: Sequence[RunSummary]) -> str:
    envs = {str(run.manifest["env_id"]) for run in runs if run.manifest.get("env_id")}
    where = f" on {', '.join(sorted(envs))}" if envs else ""
    return f"{', '.join(by_method(runs))}{where}"


def _lead(runs: Sequence[RunSummary]) -> str:
    """One sentence per run with what it reached; nothing for a study, whose table says it."""
    if len(runs) > 1 or not runs[0].boards:
        return ""
    (run,) = runs
    sentences = []
    for board in run.boards:
        last, start = run.last(board), run.start(board)
        if last is None:
            continue
        text = (
            f"After step {last.step} the student solves {percent(last.result.success_rate)} of "
            f"{escape(board[0])} (95 % interval {percent_range(last.result.interval)})"
        )
        change = start and paired_by_task(last.result, start)
        if start and change:
            points = signed_points(last.result.success_rate - start.success_rate)
            text += f", {points} points against its start ({percent_range(change)})"
        sentences.append(text + ".")
    return f"<p>{' '.join(sentences)}</p>"


def _key_figures(runs: Sequence[RunSummary]) -> str:
    items = []
    boards = all_boards(runs)
    if boards:
        board = boards[0]
        teacher = next((r for run in runs if (r := run.teacher(board))), None)
        start = next((r for run in runs if (r := run.start(board))), None)
        for label, result in (("start", start), ("teacher", teacher)):
            if result:
                remark = f"{percent_range(result.interval)}, {escape(board[0])}"
                items.append((label, percent(result.success_rate), remark))
        for method, seeds in by_method(runs).items():
            rates = [last.result.success_rate for run in seeds if (last := run.last(board))]
            if not rates:
                continue
            last = next(found for run in seeds if (found := run.last(board)))
            remark = f"{percent_range(last.result.interval)}, {escape(board[0])}"
            if len(rates) > 1:
                remark = f"{percent_range(mean_interval(rates))}, {len(rates)} seeds"
            items.append((f"{escape(method)}, last", percent(sum(rates) / len(rates)), remark))
    steps = max((record["step"] for run in runs for record in run.metrics[-1:]), default=0)
    if steps:
        items.append(("steps", str(steps), "of each run" if len(runs) > 1 else "done"))
    minutes = [float(run.summary["minutes"]) for run in runs if run.summary.get("minutes")]
    if minutes:
        remark = "all runs together" if len(runs) > 1 else "in all"
        items.append(("wall time", f"{sum(minutes):.1f} min", remark))
    return tiles(items) if items else ""


def _model_facts(runs: Sequence[RunSummary], role: str) -> str:
    """Name and size of student or teacher; methods without a teacher do not name one."""
    named, sizes = [], []
    for run in runs:
        size = run.manifest.get("parameters", {}).get(role)
        if size:
            sizes.append(f"{size:,} weights")
        if size or not run.manifest:
            named.append(run.config.get("model", {}).get(role))
    return f"{distinct(named)}, {distinct(sizes)}" if sizes else distinct(named)


def _facts(runs: Sequence[RunSummary]) -> str:
    manifests = [run.manifest for run in runs]
    data = [m.get("data", {}) for m in manifests]
    algorithm = [run.config.get("algorithm", {}) for run in runs]
    train = [run.config.get("train", {}) for run in runs]
    batch = {f"{t['tasks_per_step']} x {t['group_size']}" for t in train if "group_size" in t}
    anneal = {
        "kappa {} to {}, rho {} to {} ".format(*a["kappa"], *a["rho"])
        + (
            "adaptive"
            if a["shape"] == "adaptive"
            else f"over {a['anneal_steps']} steps, {a['shape']}"
        )
        for a in algorithm
        if {"kappa", "rho", "anneal_steps", "shape"} <= a.keys()
    }
    commands = [shlex.join(map(str, m["command"])) for m in manifests if m.get("command")]
    packages = [
        ", ".join(f"{name} {version}" for name, version in m["packages"].items())
        for m in manifests
        if m.get("packages")
    ]
    more = f" and {len(commands) - 1} more" if len(commands) > 1 else ""
    resumed = sum(len(m.get("resumed", [])) for m in manifests)
    return definitions(
        [
            ("methods", distinct([run.method for run in runs])),
            ("seeds", distinct([run.seed for run in runs])),
            ("environment", distinct([m.get("env_id") for m in manifests])),
            ("data", distinct([d.get("name") for d in data])),
            ("data hash", f"<code>{distinct([d.get('hash') for d in data])}</code>"),
            ("student", _model_facts(runs, "student")),
            ("teacher", _model_facts(runs, "teacher")),
            ("tasks x group per step", distinct(sorted(batch))),
            ("annealing", distinct(sorted(anneal))),
            ("started", distinct([m.get("time") for m in manifests[:1]])),
            ("resumed", f"{resumed} times"),
            ("device", distinct([m.get("device") for m in manifests])),
            ("platform", distinct([m.get("platform") for m in manifests])),
            ("versions", distinct(packages)),
            ("command", f"<code>{distinct(commands[:1])}</code>{more}"),
        ]
    )


def _missing(runs: Sequence[RunSummary]) -> list[str]:
    boards = all_boards(runs)
    checks = [
        (any(run.metrics for run in runs), "metrics of the steps"),
        (bool(boards), "evaluations"),
        (any(run.start(board) for run in runs for board in boards), "an evaluation of the start"),
        (any(run.teacher(b) for run in runs for b in boards), "an evaluation of the teacher"),
        (any(run.trajectories for run in runs), "trajectories"),
        (any(run.manifest for run in runs), "the manifest (data, seeds, versions)"),
        (any(run.config for run in runs), "the config"),
        (any(run.summary for run in runs), "the summary (the run may not have ended)"),
    ]
    return [name for present, name in checks if not present]


def _figures(runs: Sequence[RunSummary]) -> str:
    boards = all_boards(runs)
    made = [success_figure(f"success{i}", runs, board) for i, board in enumerate(boards)]
    figures = [item for item in made if item] + metric_figures(runs)
    if not figures:
        return "<p>No step has been recorded yet.</p>"
    return f'<div class="figures">{"".join(figure(item) for item in figures)}</div>'


def _trajectories(runs: Sequence[RunSummary], limit: int) -> str:
    """The latest trajectories, run after run in turn, until the limit is reached."""
    chosen: list[tuple[str, TrajectoryRecord]] = []
    deepest = max((len(run.trajectories) for run in runs), default=0)
    for depth in range(deepest):
        for run in runs:
            if depth < len(run.trajectories) and len(chosen) < limit:
                chosen.append((run.name, run.trajectories[-1 - depth]))
    if not chosen:
        return "<p>No trajectory has been recorded.</p>"
    intro = (
        '<p class="note">Shaded: the turn weight w, and the disagreement d and uncertainty h it is '
        "made of; d and h are shaded relative to the largest of the trajectory.</p>"
    )
    shown = [
        trajectory(record, name, is_open=index == 0) for index, (name, record) in enumerate(chosen)
    ]
    return intro + "\n".join(shown)
