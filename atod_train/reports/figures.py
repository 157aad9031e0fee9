"""The figures of results, drawn by matplotlib's object interface as SVG or PNG files.

No pyplot, no display, no global state but a scoped rc_context. Dark on white.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from typing import Any

from atod_train.reports.analysis import Selection, courses, mean_course, mean_metric, rate
from atod_train.reports.results import REFERENCES, Results

Paint = Callable[[Any], None]
"""A function that draws into an empty figure of matplotlib."""

METHOD_COLOURS = {
    "atod": "#2f7ed8",
    "opd": "#e07b39",
    "grpo": "#2a9d6f",
    "mix": "#a463c9",
    "sod": "#b8860b",
    "tcod": "#2aa7b5",
    "sdar": "#d6477f",
}
_OTHER_COLOURS = ("#7f8fa6", "#c0564b", "#6b8e23", "#5f6caf")
_MARKERS = "os^DvPX<>*hp"
_INK = "#1c2430"
_REFERENCE_STYLES = {"start": ":", "teacher": "--"}
_WINDOW = 5
_SETTINGS: Any = {
    "svg.hashsalt": "report",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
}


@dataclass(frozen=True)
class Figure:
    """A figure ready for the page."""

    title: str
    note: str
    """One sentence on how to read it."""
    alt: str
    """Description for readers who cannot see it."""
    source: str
    """The picture as a data URI."""


@dataclass(frozen=True)
class Panel:
    """One metric over steps."""

    metric: str
    title: str
    scale: float = 1.0
    window: int = _WINDOW


@dataclass(frozen=True)
class Style:
    """Colour and marker of a label."""

    colour: str
    marker: str


_PANELS = (
    Panel("kappa", "kappa, weight of the teacher", window=1),
    Panel("opd_signal", "|kappa w delta|, mean over tokens"),
    Panel("rho", "rho, weight of the reward", window=1),
    Panel("rl_signal", "|rho A|, mean over tokens"),
    Panel("turn_weight", "mean turn weight w"),
    Panel("invalid_share", "invalid turns (%)", 100.0),
    Panel("train_success", "training success (%)", 100.0),
    Panel("turns", "turns of a training episode"),
    Panel("disagreement", "mean |delta| to the teacher, nats"),
    Panel("entropy", "entropy of the policy, nats"),
)
_SIGNALS = _PANELS[:4]
_SUCCESS_SIZE = (7.0, 3.4)


def png_figures(results: Results) -> dict[str, bytes]:
    """Return name of a file -> a PNG: success, and coefficients with the sizes of the signals."""
    return {
        f"{results.name}-success.png": _png(_success_paint(results, None), _SUCCESS_SIZE),
        f"{results.name}-signals.png": _png(_metrics_paint(results, _SIGNALS), (7.0, 4.4)),
    }


def success_figure(results: Results, split: str | None = None) -> Figure:
    """Return success over steps on a split, or on all of them together (None)."""
    ends = [
        f"{model}, {mode}: {100 * found.value:.1f} %"
        for mode in results.modes
        for model in (*REFERENCES, *results.labels)
        if (found := rate(results, model, Selection(mode, split)))
    ]
    return Figure(
        f"Success: {split or 'all splits together'}",
        "Dotted: start; dashed: teacher. Thick lines: means over seeds; thin lines: seeds. Bars on "
        "the right: 95 % bootstrap intervals over seeds and tasks.",
        f"Share of the tasks solved. At the end: {'; '.join(ends)}.",
        _svg(_success_paint(results, split), _SUCCESS_SIZE),
    )


def metrics_figure(results: Results) -> Figure | None:
    """Return the metrics over steps, or None without any."""
    panels = [
        panel
        for panel in _PANELS
        if any(mean_metric(results, label, panel.metric) for label in results.labels)
    ]
    if not panels:
        return None
    return Figure(
        "Metrics over steps",
        "Means over seeds, and of 5 steps except for kappa and rho. The signals are the absolute "
        "advantages of a token from teacher and reward, which drive the update. An entropy near "
        "zero means no exploration.",
        f"Over steps: {'; '.join(panel.title for panel in panels)}.",
        _svg(_metrics_paint(results, panels), (7.0, 0.2 + 2.1 * math.ceil(len(panels) / 2))),
    )


def styles(results: Results) -> dict[str, Style]:
    """Return label -> a colour and a marker of its own; methods keep theirs in all figures."""
    labels = results.labels
    taken = {METHOD_COLOURS[label] for label in labels if label in METHOD_COLOURS}
    palette = [*METHOD_COLOURS.values(), *_OTHER_COLOURS]
    free = cycle([colour for colour in palette if colour not in taken] or palette)
    return {
        label: Style(METHOD_COLOURS.get(label) or next(free), _MARKERS[place % len(_MARKERS)])
        for place, label in enumerate(labels)
    }


# -- success --------------------------------------------------------------------------------------


def _success_paint(results: Results, split: str | None) -> Paint:
    """Paint a panel for each mode: the course, or the last success where only that is known."""

    def paint(figure: Any) -> None:
        panels = figure.subplots(1, len(results.modes), squeeze=False)[0]
        with_course: list[Any] = []
        for mode, axes in zip(results.modes, panels, strict=True):
            selection = Selection(mode, split)
            found = [c for label in results.labels for c in courses(results, label, selection)]
            if any(len(course) > 2 for course in found):
                _paint_courses(axes, results, selection)
                axes.set(ylabel="" if with_course else "tasks solved (%)")
                with_course.append(axes)
                axes.set_title(mode, fontsize=10)
            else:
                _paint_rates(axes, results, selection)
                axes.set_title(f"{mode}, last step", fontsize=10)
        if with_course:
            _legend(with_course[0])

    return paint


def _paint_courses(axes: Any, results: Results, selection: Selection) -> None:
    """Success over steps of every label, and start and teacher as lines."""
    shown: list[float] = []
    for model, line in _REFERENCE_STYLES.items():
        if found := rate(results, model, selection):
            shown.append(100 * found.value)
            axes.axhline(shown[-1], color=_INK, linestyle=line, linewidth=1.3, label=model)
    for place, (label, style) in enumerate(styles(results).items(), start=1):
        seeds = courses(results, label, selection)
        mean = mean_course(seeds)
        if not mean:
            continue
        for course in seeds if len(seeds) > 1 else ():
            heights = [100 * value for value in course.values()]
            axes.plot(list(course), heights, color=style.colour, linewidth=0.6, alpha=0.35)
            shown += heights
        heights = [100 * value for value in mean.values()]
        axes.plot(
            list(mean), heights, color=style.colour, marker=style.marker, markersize=4.5,
            label=_glyphs(label),
        )  # fmt: skip
        shown += heights
        if found := rate(results, label, selection):
            low, high = 100 * found.low, 100 * found.high
            beside = max(mean) * (1 + 0.025 * place)  # the next label's bar stands next to it
            axes.plot([beside] * 2, [low, high], color=style.colour, linewidth=2, alpha=0.7)
            shown += [low, high]
    bottom, top = min(shown, default=0.0) - 5, max(shown, default=100.0) + 5
    axes.set(xlabel="step", ylim=(max(0.0, bottom), min(101.0, top)))


def _paint_rates(axes: Any, results: Results, selection: Selection) -> None:
    """Success of the last evaluation, a line with its interval for every model."""
    looks = {**dict.fromkeys(REFERENCES, Style(_INK, "|")), **styles(results)}
    rows = [(m, look, f) for m, look in looks.items() if (f := rate(results, m, selection))]
    for place, (_, look, found) in enumerate(rows):
        value, low, high = (100 * x for x in (found.value, found.low, found.high))
        axes.plot([low, high], [place, place], color=look.colour, linewidth=1.6)
        axes.plot([value], [place], color=look.colour, marker=look.marker, markersize=6)
    axes.set_yticks(range(len(rows)), [_glyphs(model) for model, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="tasks solved (%)")


# -- metrics --------------------------------------------------------------------------------------


def _metrics_paint(results: Results, panels: Sequence[Panel]) -> Paint:
    """Paint metrics over steps, mean over replicates: two in a row, a line for each label."""

    def paint(figure: Any) -> None:
        grid = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False, sharex=True)
        looks = styles(results)
        for panel, axes in zip_longest(panels, grid.flat):
            if panel is None:
                axes.set_axis_off()
                continue
            for place, (label, look) in enumerate(looks.items()):
                course = mean_metric(results, label, panel.metric)
                # Lines that lie on each other have their markers at different steps.
                every = max(1, len(course) // 6)
                axes.plot(
                    list(course),
                    smooth([panel.scale * value for value in course.values()], panel.window),
                    color=look.colour,
                    linewidth=1.5,
                    marker=look.marker,
                    markersize=4,
                    markevery=(place * every // len(looks), every),
                    label=_glyphs(label),
                )
            axes.set_title(panel.title, fontsize=10)
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        for axes in grid[-1]:
            axes.set_xlabel("step")
        _legend(grid[0][0])

    return paint


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the last `window` values up to each position."""
    return [
        math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
        for i in range(len(values))
    ]


# -- drawing --------------------------------------------------------------------------------------


def _svg(paint: Paint, size: tuple[float, float]) -> str:
    """Return a figure as the data URI of an SVG picture; equal figures give equal URIs."""
    options = {"format": "svg", "metadata": {"Date": None}}
    encoded = base64.b64encode(_draw(paint, size, options)).decode("ascii")
    return f"data:image/svg+xml;base64,{encoded}"


def _png(paint: Paint, size: tuple[float, float]) -> bytes:
    """Return a figure as a PNG file of 130 dots an inch."""
    from PIL import Image  # a dependency of matplotlib

    small = io.BytesIO()
    painted = io.BytesIO(_draw(paint, size, {"format": "png", "dpi": 130}))
    # A palette makes the file a third as large.
    Image.open(painted).convert("RGB").quantize(255).save(small, format="png", optimize=True)
    return small.getvalue()


def _draw(paint: Paint, size: tuple[float, float], options: Any) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    buffer = io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Canvas(figsize=size, layout="constrained")
        paint(figure)
        figure.savefig(buffer, facecolor="white", **options)
    return buffer.getvalue()


def _glyphs(label: str) -> str:
    """A label as a figure can write it: short, with glyphs that every font has."""
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in label[:24])


def _legend(axes: Any) -> None:
    """Add a legend under the plot, where it hides nothing; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    width, height = axes.figure.get_size_inches()
    columns = max(1, min(len(labels), int(12 * width) // (6 + max(map(len, labels)))))
    rows = -(-len(labels) // columns)
    axes.figure.set_size_inches(width, height + 0.18 * (rows - 1))  # the plot keeps its size
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)
