"""`report.html` of a run or a study: one file that needs nothing but a browser.

It shows what was run, a table of results with 95 % intervals, the course of training, and a few
trajectories turn by turn. What a run has not recorded is named as missing, never guessed.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from atod_gym.errors import AtodError
from atod_train.intervals import EvaluationResult, mean_interval, paired_by_task
from atod_train.metrics import TrajectoryRecord
from atod_train.report_data import Board, RunSummary, all_boards, by_method, read_run
from atod_train.report_figures import metric_figures, success_figure
from atod_train.report_page import (
    definitions,
    escape,
    figure,
    page,
    percent,
    percent_range,
    signed_points,
    table,
    tiles,
    trajectory,
)

__all__ = ["RunSummary", "read_run", "write_report"]

REPORT_FILE = "report.html"
_NONE = "\u2013"


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
    parts += ["<h2>Results</h2>", _results(runs), "<h2>Course of training</h2>", _figures(runs)]
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


def _distinct(values: Sequence[object]) -> str:
    """The distinct values in order, as HTML."""
    shown = dict.fromkeys(escape(value) for value in values if value not in (None, "", {}))
    return ", ".join(shown) or _NONE


def _model_facts(runs: Sequence[RunSummary], role: str) -> str:
    """Name and size of student or teacher; methods without a teacher do not name one."""
    named, sizes = [], []
    for run in runs:
        size = run.manifest.get("parameters", {}).get(role)
        if size:
            sizes.append(f"{size:,} weights")
        if size or not run.manifest:
            named.append(run.config.get("model", {}).get(role))
    return f"{_distinct(named)}, {_distinct(sizes)}" if sizes else _distinct(named)


def _facts(runs: Sequence[RunSummary]) -> str:
    manifests = [run.manifest for run in runs]
    data = [m.get("data", {}) for m in manifests]
    algorithm = [run.config.get("algorithm", {}) for run in runs]
    train = [run.config.get("train", {}) for run in runs]
    batch = {f"{t['tasks_per_step']} x {t['group_size']}" for t in train if "group_size" in t}
    anneal = {
        "kappa {} to {}, rho {} to {} ".format(*a["kappa"], *a["rho"])
        + f"over {a['anneal_steps']} steps, {a['shape']}"
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
            ("methods", _distinct([run.method for run in runs])),
            ("seeds", _distinct([run.seed for run in runs])),
            ("environment", _distinct([m.get("env_id") for m in manifests])),
            ("data", _distinct([d.get("name") for d in data])),
            ("data hash", f"<code>{_distinct([d.get('hash') for d in data])}</code>"),
            ("student", _model_facts(runs, "student")),
            ("teacher", _model_facts(runs, "teacher")),
            ("tasks x group per step", _distinct(sorted(batch))),
            ("annealing", _distinct(sorted(anneal))),
            ("started", _distinct([m.get("time") for m in manifests[:1]])),
            ("resumed", f"{resumed} times"),
            ("device", _distinct([m.get("device") for m in manifests])),
            ("platform", _distinct([m.get("platform") for m in manifests])),
            ("versions", _distinct(packages)),
            ("command", f"<code>{_distinct(commands[:1])}</code>{more}"),
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


def _rate_cell(result: EvaluationResult, remark: str = "") -> str:
    small = f"{percent_range(result.interval)}{remark}"
    return f"{percent(result.success_rate)} <small>{small}</small>"


def _conduct(result: EvaluationResult) -> list[str]:
    return [percent(result.mean_score), f"{result.mean_turns:.1f}", percent(result.invalid_share)]


def _still_models(runs: Sequence[RunSummary], board: Board) -> list[tuple[str, EvaluationResult]]:
    """Start and teacher, each once if all runs share it, else once per run."""
    found: list[tuple[str, EvaluationResult]] = []
    for label, results in (
        ("start", [(run, run.start(board)) for run in runs]),
        ("teacher", [(run, run.teacher(board)) for run in runs]),
    ):
        present = [(run, result) for run, result in results if result]
        distinct: dict[EvaluationResult, list[RunSummary]] = {}
        for run, result in present:
            distinct.setdefault(result, []).append(run)
        for result, users in distinct.items():
            suffix = "" if len(distinct) == 1 else f" of {', '.join(run.name for run in users)}"
            found.append((label + suffix, result))
    return found


def _result_table(runs: Sequence[RunSummary], board: Board) -> str:
    rows = [
        [escape(label), str(len(r.tasks)), _rate_cell(r), _NONE, _NONE, *_conduct(r)]
        for label, r in _still_models(runs, board)
    ]
    for method, seeds in by_method(runs).items():
        rates, bests = [], []
        for run in seeds:
            last, best, start = run.last(board), run.best(board), run.start(board)
            if last is None or best is None:
                continue
            rates.append(last.result.success_rate)
            bests.append(best.result.success_rate)
            change = paired_by_task(last.result, start) if start else None
            points = last.result.success_rate - start.success_rate if start else 0.0
            delta = _NONE
            if change:
                delta = f"{signed_points(points)} <small>{percent_range(change)}</small>"
            rows.append(
                [
                    escape(run.name),
                    str(len(last.result.tasks)),
                    _rate_cell(last.result),
                    _rate_cell(best.result, f", step {best.step}"),
                    delta,
                    *_conduct(last.result),
                ]
            )
        if len(rates) > 1:
            cells = [
                f"{percent(math.fsum(values) / len(values))} "
                f"<small>{percent_range(mean_interval(values))}</small>"
                for values in (rates, bests)
            ]
            name = f"<b>{escape(method)}, mean of {len(rates)} seeds</b>"
            rows.append([name, _NONE, *cells, *[_NONE] * 4])
    head = ["model", "tasks", "last success", "best success", "change from start, points"]
    data = {e.result.data for run in runs for e in run.evaluations}
    caption = f"{escape(board[0])}, {escape(board[1])} ({_distinct(sorted(data))} data)"
    return table(caption, [*head, "score", "turns", "invalid turns"], rows)


def _type_table(runs: Sequence[RunSummary], board: Board) -> str:
    """Success per task type; seeds of a method are pooled."""
    columns: list[tuple[str, list[EvaluationResult]]] = [
        (label, [result]) for label, result in _still_models(runs, board)
    ]
    for method, seeds in by_method(runs).items():
        lasts = [last.result for run in seeds if (last := run.last(board))]
        if lasts:
            columns.append((f"{method}, last", lasts))
    rows_of = [[{row.task_type: row for row in r.by_task_type()} for r in rs] for _, rs in columns]
    types = sorted({name for column in rows_of for result in column for name in result})
    rows = []
    for name in types:
        cells = [escape(name).replace("_", "_<wbr>")]
        for column in rows_of:
            here = [result[name] for result in column if name in result]
            tasks, solved = sum(row.tasks for row in here), sum(row.successes for row in here)
            small = f"{solved}/{tasks}"
            if len(here) == 1:
                small += f", {percent_range(here[0].interval)}"
            cells.append(f"{percent(solved / tasks)} <small>{small}</small>" if tasks else _NONE)
        rows.append(cells)
    caption = f"Per task type: {escape(board[0])}, {escape(board[1])}"
    return table(caption, ["task type", *(escape(label) for label, _ in columns)], rows)


def _comparison_table(runs: Sequence[RunSummary], board: Board) -> str:
    """Last success of the first method minus that of each other one; "" with one method."""
    groups = by_method(runs)
    lasts = {
        method: {run.seed: last.result for run in seeds if (last := run.last(board))}
        for method, seeds in groups.items()
    }
    first, *others = groups
    rows = []
    for other in others:
        seeds = sorted(lasts[first].keys() & lasts[other].keys())
        pairs = [(lasts[first][seed], lasts[other][seed]) for seed in seeds]
        if not pairs:
            continue
        differences = [a.success_rate - b.success_rate for a, b in pairs]
        interval = mean_interval(differences) if len(pairs) > 1 else paired_by_task(*pairs[0])
        rows.append(
            [
                f"{escape(first)} minus {escape(other)}",
                str(len(pairs)),
                signed_points(math.fsum(differences) / len(differences)),
                percent_range(interval) if interval else _NONE,
            ]
        )
    if not rows:
        return ""
    caption = f"Differences of the last success: {escape(board[0])}, {escape(board[1])}"
    return table(caption, ["methods", "common seeds", "points", "95 % interval"], rows)


def _results(runs: Sequence[RunSummary]) -> str:
    boards = all_boards(runs)
    if not boards:
        return "<p>No evaluation has been recorded yet.</p>"
    parts = [_result_table(runs, board) for board in boards]
    parts += [_comparison_table(runs, board) for board in boards]
    parts.append(
        '<p class="note">Small numbers are 95 % intervals in per cent: Wilson over tasks, Tango '
        "over the same tasks for changes and for methods with one seed, Student's t over seeds "
        "for means and differences of several seeds. The best of several "
        "evaluations is picked on the tasks it is reported on and is therefore flattering; the "
        "last is not.</p>"
    )
    return "\n".join(parts + [_type_table(runs, board) for board in boards])


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
