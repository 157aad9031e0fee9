"""The figures of a report: matplotlib's object interface in, inline SVG text out.

No pyplot, no display, no global state but a scoped rc_context. Text and axes take the page's own
colour (`currentColor`), so that a figure is readable on a light and on a dark page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from atod_train.reports.metrics import Evaluation
from atod_train.reports.report_data import Board, RunSummary, by_method, mean_curve, smooth
from atod_train.reports.statistics import EvaluationResult

Paint = Callable[[Any], None]
"""Draws into an empty figure of matplotlib."""

_TEXT, _GRID = "#123457", "#765432"  # stand-ins, replaced by the page's colours
METHOD_COLOURS = {
    "atod": "#2f7ed8",
    "opd": "#e07b39",
    "grpo": "#2a9d6f",
    "mix": "#a463c9",
    "sod": "#b8860b",
    "tcod": "#2aa7b5",
    "sdar": "#d6477f",
}
OTHER_COLOURS = ("#7f8fa6", "#c0564b", "#6b8e23", "#5f6caf")
_PHASE_COLOURS = {
    "environment": "#2a9d6f",
    "generation": "#2f7ed8",
    "teacher": "#e07b39",
    "update": "#a463c9",
    "other": "#8c96a3",
}
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class ReportFigure:
    """A figure ready for the page."""

    title: str
    note: str
    """One sentence on how to read it."""
    alt: str
    """What a reader who cannot see it should know."""
    svg: str


def method_colour(method: str, index: int = 0) -> str:
    """A method's own colour; others take turns by index."""
    return METHOD_COLOURS.get(method, OTHER_COLOURS[index % len(OTHER_COLOURS)])


def method_label(method: str) -> str:
    """A method's name as a figure can write it: short, with glyphs that every font has."""
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in method[:24])


def draw(key: str, paint: Paint, *, size: tuple[float, float] = (5.0, 3.2)) -> str:
    """Runs `paint(figure)` and returns the figure as an SVG element without outside references."""
    buffer = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    _paint(paint, size, _SETTINGS, buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    # Identifiers must be unique in the whole page.
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = svg.replace('href="#', f'href="#{key}-').replace("url(#", f"url(#{key}-")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = svg.replace(_TEXT, "currentColor").replace(_GRID, "var(--grid)")
    # Without a size of its own the figure takes the width that the page gives it.
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    return svg.replace("<svg ", '<svg aria-hidden="true" ', 1)


def draw_png(paint: Paint, *, size: tuple[float, float] = (5.0, 3.2)) -> bytes:
    """Runs `paint(figure)` and returns the figure as a PNG file: dark on white, 130 dots an inch.

    `paint` takes the colour of text from `ink`.
    """
    inks = {_TEXT: "#1c2430", _GRID: "#e3e7ec"}
    settings = {
        name: inks.get(value, value) if isinstance(value, str) else value
        for name, value in _SETTINGS.items()
    }
    from PIL import Image  # matplotlib cannot do without it

    painted, small = io.BytesIO(), io.BytesIO()
    _paint(paint, size, settings, painted, format="png", dpi=130, facecolor="white")
    # A palette makes the file a third as large.
    Image.open(painted).convert("RGB").quantize(255).save(small, format="png", optimize=True)
    return small.getvalue()


def _paint(
    paint: Paint, size: tuple[float, float], settings: Any, buffer: io.BytesIO, **options: Any
) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(buffer, **options)


def ink() -> str:
    """The colour of text, while a figure is painted."""
    import matplotlib

    return str(matplotlib.rcParams["text.color"])


def legend(axes: Any) -> None:
    """A legend under the plot, where it hides nothing; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    width, height = axes.figure.get_size_inches()
    columns = max(1, min(len(labels), int(12 * width) // (6 + max(map(len, labels)))))
    rows = -(-len(labels) // columns)
    axes.figure.set_size_inches(width, height + 0.18 * (rows - 1))  # the plot keeps its size
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _level(axes: Any, results: Sequence[EvaluationResult], label: str, style: str) -> None:
    """A horizontal line for a model that does not train; with its interval if it is one model."""
    if not results:
        return
    rates = [100 * result.success_rate for result in results]
    mean = sum(rates) / len(rates)
    axes.axhline(mean, color=_TEXT, linestyle=style, linewidth=1.3, label=label)
    if len(set(rates)) == 1:
        low, high = results[0].interval
        axes.axhspan(100 * low, 100 * high, color=_TEXT, alpha=0.07, linewidth=0)


def _paint_course(axes: Any, course: Sequence[Evaluation], label: str, colour: str) -> None:
    """One run: its success with the band of the 95 % intervals over tasks."""
    steps = [evaluation.step for evaluation in course]
    low, high = zip(*(evaluation.result.interval for evaluation in course), strict=True)
    axes.fill_between(
        steps,
        [100 * x for x in low],
        [100 * x for x in high],
        color=colour,
        alpha=0.15,
        linewidth=0,
    )
    rates = [100 * evaluation.result.success_rate for evaluation in course]
    axes.plot(steps, rates, color=colour, marker="o", markersize=3.5, label=label)


def _paint_seeds(
    axes: Any, courses: Sequence[Sequence[Evaluation]], label: str, colour: str
) -> None:
    """Several seeds: a thin line each, and their mean where all of them were evaluated."""
    rates = [{e.step: 100 * e.result.success_rate for e in course} for course in courses]
    for course in rates:
        axes.plot(list(course), list(course.values()), color=colour, linewidth=0.8, alpha=0.5)
    common = sorted(set.intersection(*(set(course) for course in rates)))
    means = [sum(course[step] for course in rates) / len(rates) for step in common]
    axes.plot(common, means, color=colour, marker="o", markersize=3.5, label=label)


def success_figure(key: str, runs: Sequence[RunSummary], board: Board) -> ReportFigure | None:
    """Success over steps of every run on one board, against the teacher and the start."""
    split, mode = board
    if not any(run.course(board) for run in runs):
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        _level(axes, [r for run in runs if (r := run.teacher(board))], "teacher", "--")
        _level(axes, [r for run in runs if (r := run.start(board))], "start", ":")
        for index, (method, seeds) in enumerate(by_method(runs).items()):
            courses = [course for run in seeds if (course := run.course(board))]
            colour = method_colour(method, index)
            if len(courses) == 1:
                _paint_course(axes, courses[0], method_label(method), colour)
            elif courses:
                _paint_seeds(axes, courses, method_label(method), colour)
        axes.set(xlabel="step", ylabel="tasks solved (%)", ylim=(0, 100))
        legend(axes)

    lasts = [
        f"{run.name} {100 * last.result.success_rate:.1f} % at step {last.step}"
        for run in runs
        if (last := run.last(board))
    ]
    return ReportFigure(
        f"Success on {split} ({mode})",
        "Dashed: teacher; dotted: start. Bands: 95 % intervals over tasks. With several seeds, "
        "thin lines are seeds and the thick line is their mean.",
        f"Share of the {split} tasks solved over steps. {'; '.join(lasts) or 'No run yet'}.",
        draw(key, paint),
    )


def _phase_names(runs: Sequence[RunSummary]) -> list[str]:
    found = {
        name.removeprefix("seconds/")
        for run in runs
        for record in run.metrics
        for name in record
        if name.startswith("seconds/")
    }
    known = [name for name in _PHASE_COLOURS if name in found and name != "other"]
    rest = sorted(found - set(known) - {"other"})
    return known + rest + (["other"] if "other" in found else [])


def time_figure(key: str, runs: Sequence[RunSummary]) -> ReportFigure | None:
    """Seconds per step, stacked by phase: over steps for one run, as bars for several methods."""
    names = _phase_names(runs)
    if not names:
        return None
    groups = by_method(runs)
    curves = {m: [mean_curve(seeds, f"seconds/{n}") for n in names] for m, seeds in groups.items()}
    # A phase that most steps do not have, such as evaluation, counts as 0 in those.
    means = {
        m: [sum(v) / max(1, *(len(steps) for steps, _ in c)) for _, v in c]
        for m, c in curves.items()
    }
    colours = [_PHASE_COLOURS.get(n, OTHER_COLOURS[i % 4]) for i, n in enumerate(names)]

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        if len(groups) == 1:
            (course,) = curves.values()
            steps = sorted({step for phase_steps, _ in course for step in phase_steps})
            by_step = [dict(zip(s, v, strict=True)) for s, v in course]
            layers = [smooth([layer.get(step, 0.0) for step in steps], 5) for layer in by_step]
            axes.stackplot(steps, layers, labels=names, colors=colours, alpha=0.85)
            axes.set(xlabel="step", ylabel="seconds per step")
        else:
            labels = [method_label(method) for method in groups]
            left = [0.0] * len(groups)
            for place, name in enumerate(names):
                widths = [means[method][place] for method in groups]
                axes.barh(labels, widths, left=left, color=colours[place], label=name)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set(xlabel="seconds per step")
        legend(axes)

    described = "; ".join(
        f"{method}: " + ", ".join(f"{n} {x:.2f} s" for n, x in zip(names, values, strict=True))
        for method, values in means.items()
    )
    return ReportFigure(
        "Time per step",
        "Wall time by phase; several seeds are averaged.",
        f"Mean seconds per step by phase. {described}.",
        draw(key, paint),
    )
