"""The figures of a study, for its page (SVG) and as files (PNG): courses, success, metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from atod_train.reports.figures import (
    METHOD_COLOURS,
    OTHER_COLOURS,
    Paint,
    ReportFigure,
    draw,
    ink,
    legend,
    method_label,
)
from atod_train.reports.report_data import smooth
from atod_train.studies.study_analysis import (
    Estimate,
    course_band,
    mean_metric,
    rate,
    seed_courses,
)
from atod_train.studies.study_pieces import StudyEnvironment
from atod_train.studies.study_results import STILL

_MARKERS = "os^DvPX<>*hp"
_WINDOW = 5
_STILL_STYLES = {"start": ":", "teacher": "--"}


@dataclass(frozen=True)
class Panel:
    """One metric over steps."""

    metric: str
    title: str
    scale: float = 1.0
    window: int = _WINDOW


COEFFICIENTS = (
    Panel("kappa", "kappa, weight of the teacher", window=1),
    Panel("rho", "rho, weight of the reward", window=1),
)
SIGNALS = (Panel("opd_signal", "|kappa w delta|, mean"), Panel("rl_signal", "|rho A|, mean"))
TRAINING = (
    Panel("train_success", "training success (%)", 100.0),
    Panel("turns", "turns of an episode"),
)
DISTANCE = (
    Panel("disagreement", "mean |delta| to the teacher, nats"),
    Panel("entropy", "entropy of the policy, nats"),
)


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str


def _styles(environment: StudyEnvironment) -> dict[str, _Style]:
    """Label -> a colour and a marker of its own; methods keep the colours they have elsewhere."""
    labels = environment.labels
    taken = {METHOD_COLOURS[label] for label in labels if label in METHOD_COLOURS}
    palette = [*METHOD_COLOURS.values(), *OTHER_COLOURS]
    free = cycle([colour for colour in palette if colour not in taken] or palette)
    return {
        label: _Style(METHOD_COLOURS.get(label) or next(free), _MARKERS[place % len(_MARKERS)])
        for place, label in enumerate(labels)
    }


def _paint_courses(axes: Any, environment: StudyEnvironment, mode: str, split: str | None) -> None:
    """Success over steps of every label, and start and teacher as lines."""
    shown: list[float] = []
    for model, style in _STILL_STYLES.items():
        found = rate(environment, model, mode, split)
        if found:
            shown.append(100 * found.value)
            axes.axhline(shown[-1], color=ink(), linestyle=style, linewidth=1.3, label=model)
    styles = _styles(environment)
    alpha = 0.15 if len(styles) <= 3 else 0.08
    for label, look in styles.items():
        band = course_band(environment, label, mode, split)
        if band is None:
            continue
        low, mean, high = ([100 * x for x in row] for row in (band.lows, band.means, band.highs))
        if band.replicates == 2:
            for course in seed_courses(environment, label, mode, split):
                heights = [100 * rate for rate in course.values()]
                axes.plot(list(course), heights, color=look.colour, linewidth=0.7, alpha=0.5)
        else:
            axes.fill_between(band.steps, low, high, color=look.colour, alpha=alpha, linewidth=0)
        axes.plot(
            band.steps,
            mean,
            color=look.colour,
            marker=look.marker,
            markersize=4.5,
            label=method_label(label),
        )
        shown += [*low, *high]
    bottom, top = min(shown, default=0.0) - 5, max(shown, default=100.0) + 5
    axes.set(xlabel="step", ylim=(max(0.0, bottom), min(101.0, top)))


def _paint_rates(axes: Any, environment: StudyEnvironment, mode: str, split: str | None) -> None:
    """Success of the last evaluation, a line with its interval for every model."""
    styles = _styles(environment)
    rows: list[tuple[str, Estimate]] = []
    for model in (*STILL, *environment.labels):
        found = rate(environment, model, mode, split)
        if found:
            rows.append((model, found))
    for place, (model, found) in enumerate(rows):
        look = styles.get(model, _Style(ink(), "|"))
        value, low, high = (100 * x for x in (found.value, found.low, found.high))
        axes.plot([low, high], [place, place], color=look.colour, linewidth=1.6)
        axes.plot([value], [place], color=look.colour, marker=look.marker, markersize=6)
    axes.set_yticks(range(len(rows)), [method_label(model) for model, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="tasks solved (%)")


def _has_course(environment: StudyEnvironment, mode: str) -> bool:
    """Whether any run was evaluated more than once after its start."""
    return any(
        len(course) > 1
        for run in environment.runs
        for board, course in run.record["course"].items()
        if board.endswith(f"/{mode}")
    )


def success_paint(environment: StudyEnvironment, split: str | None = None) -> Paint:
    """A panel for each mode: the course, or the last success where only that was evaluated."""

    def paint(figure: Any) -> None:
        modes = environment.modes
        panels = figure.subplots(1, len(modes), squeeze=False)[0]
        with_course: list[Any] = []
        for mode, axes in zip(modes, panels, strict=True):
            if _has_course(environment, mode):
                _paint_courses(axes, environment, mode, split)
                axes.set(ylabel="" if with_course else "tasks solved (%)")
                with_course.append(axes)
                axes.set_title(mode, fontsize=10)
            else:
                _paint_rates(axes, environment, mode, split)
                axes.set_title(f"{mode}, last step", fontsize=10)
        if with_course:
            legend(with_course[0])

    return paint


def metrics_paint(environment: StudyEnvironment, rows: Sequence[Sequence[Panel]]) -> Paint:
    """Metrics over steps, mean over replicates: a grid of panels with one line for each label."""

    def paint(figure: Any) -> None:
        grid = figure.subplots(len(rows), len(rows[0]), squeeze=False, sharex=True)
        styles = _styles(environment)
        for panels, line in zip(rows, grid, strict=True):
            for panel, axes in zip(panels, line, strict=True):
                for place, (label, look) in enumerate(styles.items()):
                    steps, values = mean_metric(environment, label, panel.metric)
                    if not steps:
                        continue
                    # Lines that lie on each other have their markers at different steps.
                    every = max(1, len(steps) // 6)
                    axes.plot(
                        steps,
                        smooth([panel.scale * value for value in values], panel.window),
                        color=look.colour,
                        linewidth=1.5,
                        marker=look.marker,
                        markersize=4,
                        markevery=(place * every // len(styles), every),
                        label=method_label(label),
                    )
                axes.set_title(panel.title, fontsize=10)
                axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        for axes in grid[-1]:
            axes.set(xlabel="step")
        if styles:
            legend(grid[0][0])

    return paint


def png_paints(environment: StudyEnvironment) -> dict[str, tuple[Paint, tuple[float, float]]]:
    """Name of a file -> how to paint it, and its size in inches."""
    rows = list(zip(COEFFICIENTS, SIGNALS, strict=True))
    return {
        f"{environment.name}-success.png": (success_paint(environment), (7.0, 3.4)),
        f"{environment.name}-signals.png": (metrics_paint(environment, rows), (7.0, 4.4)),
    }


def page_figures(environment: StudyEnvironment, key: str) -> list[ReportFigure]:
    """The figures of the page; `key` makes their identifiers unique in it."""
    several = len(environment.tasks) > 1
    figures = []
    for number, split in enumerate((None, *environment.tasks) if several else (None,)):
        where = split or "all splits together" if several else next(iter(environment.tasks))
        figures.append(
            ReportFigure(
                f"Success: {where}",
                "Dotted: start; dashed: teacher. Bands: 95 % intervals, Student's t over three "
                "seeds or more, Wilson over tasks for one seed; of two seeds each has a thin "
                "line. Where only the last step was evaluated: 95 % bootstrap intervals over "
                "seeds and tasks.",
                _describe(environment, split),
                draw(f"{key}-success{number}", success_paint(environment, split), size=(6.0, 3.2)),
            )
        )
    for number, (title, note, panels) in enumerate(
        (
            ("Coefficients", "What weighs the teacher's signal and the reward.", COEFFICIENTS),
            (
                "Size of the two signals",
                "Mean over tokens of the absolute advantage from teacher and reward: what really "
                "drives the update. Means of 5 steps.",
                SIGNALS,
            ),
            ("Training", "Sampled training episodes; means of 5 steps.", TRAINING),
            ("Distance to the teacher", "Means over tokens, and of 5 steps.", DISTANCE),
        )
    ):
        paint = metrics_paint(environment, [panels])
        alt = f"{title}: {' and '.join(panel.title for panel in panels)} over steps."
        svg = draw(f"{key}-metrics{number}", paint, size=(6.0, 2.8))
        figures.append(ReportFigure(title, note, alt, svg))
    return figures


def _describe(environment: StudyEnvironment, split: str | None) -> str:
    ends = [
        f"{model}, {mode}: {100 * found.value:.1f} %"
        for mode in environment.modes
        for model in (*STILL, *environment.labels)
        if (found := rate(environment, model, mode, split))
    ]
    return f"Share of the tasks solved. At the end: {'; '.join(ends)}."
