"""The figures of results as PNG pictures, drawn by matplotlib's object interface.

No pyplot, no display, no global state but a scoped rc_context. Dark on white.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, zip_longest
from typing import Any, NamedTuple

from atod_train.reports.analysis import Selection, courses, mean_course, mean_metric, rate
from atod_train.reports.results import REFERENCES, Results

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
_REFERENCE_STYLES = {"start": ":", "teacher": "--"}
_DPI = 160
_SETTINGS: Any = {
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e7ec",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.markersize": 4.5,
}


class Figure(NamedTuple):
    """A figure ready for the page."""

    title: str
    note: str
    """One sentence on how to read it."""
    alt: str
    """Description for readers who cannot see it."""
    png: bytes

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


class Panel(NamedTuple):
    """One metric over steps."""

    metric: str
    title: str
    scale: float = 1.0
    window: int = 5


class Style(NamedTuple):
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


def success_figure(
    results: Results, split: str | None = None, modes: Sequence[str] = (), width: float = 7.0
) -> Figure:
    """Return success over steps.

    Args:
        results: of an environment.
        split: whose tasks; None: those of all splits together.
        modes: a panel for each; none: all modes.
        width: of the figure in inches. A narrow one can be read on a phone.
    """
    chosen = tuple(modes) or results.modes
    ends = [
        f"{model}, {mode}: {100 * found.value:.1f} %"
        for mode in chosen
        for model in (*REFERENCES, *results.labels)
        if (found := rate(results, model, Selection(mode, split)))
    ]
    curves = [mode for mode in chosen if _has_curves(results, Selection(mode, split))]
    notes = [
        "Dotted: start; dashed: teacher. Thick lines: means over seeds; thin lines: seeds. Bars on "
        "the right: 95 % bootstrap intervals over seeds and tasks."
        if curves
        else "",
        "Last step: 95 % bootstrap intervals over seeds and tasks."
        if len(curves) < len(chosen)
        else "",
    ]
    return Figure(
        f"Success: {', '.join((split or 'all splits together', *modes))}",
        " ".join(filter(None, notes)),
        f"Share of the tasks solved. At the end: {'; '.join(ends)}.",
        _png(partial(_paint_success, results, split, chosen), 3.4 * (width / 7.0) ** 0.6, width),
    )


def _has_curves(results: Results, selection: Selection) -> bool:
    """Return whether runs were evaluated between the first and the last step."""
    found = [c for label in results.labels for c in courses(results, label, selection)]
    return any(len(course) > 2 for course in found)


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
        _png(partial(_paint_metrics, results, panels), 0.2 + 2.1 * math.ceil(len(panels) / 2)),
    )


def signals_picture(results: Results) -> bytes:
    """Return the coefficients and the sizes of the signals over steps as a PNG."""
    return _png(partial(_paint_metrics, results, _PANELS[:4]), 4.4)


def styles(results: Results) -> dict[str, Style]:
    """Return label -> a colour and a marker of its own; methods keep theirs in all figures."""
    labels = results.labels
    palette = [*METHOD_COLOURS.values(), *_OTHER_COLOURS]
    taken = {METHOD_COLOURS.get(label) for label in labels}
    free = cycle([colour for colour in palette if colour not in taken] or palette)
    return {
        label: Style(METHOD_COLOURS.get(label) or next(free), _MARKERS[place % len(_MARKERS)])
        for place, label in enumerate(labels)
    }


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over the last `window` values up to each position."""
    return [
        math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1)
        for i in range(len(values))
    ]


# -- drawing --------------------------------------------------------------------------------------


def _png(paint: Callable[[Any], None], height: float, width: float = 7.0) -> bytes:
    """Return a figure, its size in inches, as PNG; `paint` draws into an empty figure."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas
    from PIL import Image  # a dependency of matplotlib

    painted, small = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_SETTINGS):
        figure = Canvas(figsize=(width, height), layout="constrained")
        paint(figure)
        figure.savefig(painted, facecolor="white", dpi=_DPI)
    # A palette makes the file a third as large.
    Image.open(painted).convert("RGB").quantize(255).save(small, format="png", optimize=True)
    return small.getvalue()


def _paint_success(results: Results, split: str | None, modes: Sequence[str], figure: Any) -> None:
    """Paint a panel for each mode: the course, or the last success where only that is known."""
    with_course: list[Any] = []
    panels = figure.subplots(1, len(modes), squeeze=False)[0]
    for mode, axes in zip(modes, panels, strict=True):
        selection = Selection(mode, split)
        if _has_curves(results, selection):
            _paint_courses(axes, results, selection)
            axes.set(title=mode, ylabel="" if with_course else "tasks solved (%)")
            with_course.append(axes)
        else:
            _paint_rates(axes, results, selection)
            axes.set_title(f"{mode}, last step")
    if with_course:
        _add_legend(with_course[0])


def _paint_courses(axes: Any, results: Results, selection: Selection) -> None:
    """Paint success over steps of every label, and start and teacher as lines."""

    def plot(steps: Sequence[float], shares: Sequence[float], **look: Any) -> None:
        axes.plot(steps, [100 * share for share in shares], **look)

    for model, line in _REFERENCE_STYLES.items():
        if found := rate(results, model, selection):
            axes.axhline(
                100 * found.value, color="black", linestyle=line, linewidth=1.3, label=model
            )
    for place, (label, (colour, marker)) in enumerate(styles(results).items(), start=1):
        seeds = courses(results, label, selection)
        mean = mean_course(seeds)
        if not mean:
            continue
        for seed in seeds if len(seeds) > 1 else ():
            plot([*seed], [*seed.values()], color=colour, linewidth=0.6, alpha=0.35)
        plot([*mean], [*mean.values()], color=colour, marker=marker, label=_glyphs(label))
        if found := rate(results, label, selection):
            beside = max(mean) * (1 + 0.025 * place)  # the next label's bar stands next to it
            plot([beside] * 2, [found.low, found.high], color=colour, linewidth=2, alpha=0.7)
    bottom, top = axes.get_ylim()
    axes.set(xlabel="step", ylim=(max(0.0, bottom), min(101.0, top)))


def _paint_rates(axes: Any, results: Results, selection: Selection) -> None:
    """Paint success of the last evaluation, a line with its interval for every model."""
    looks = {**dict.fromkeys(REFERENCES, Style("black", "|")), **styles(results)}
    rows = [(m, look, f) for m, look in looks.items() if (f := rate(results, m, selection))]
    for place, (_, (colour, marker), found) in enumerate(rows):
        axes.plot([100 * found.low, 100 * found.high], [place, place], color=colour)
        axes.plot([100 * found.value], [place], color=colour, marker=marker, markersize=6)
    axes.set_yticks(range(len(rows)), [_glyphs(model) for model, _, _ in rows])
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="tasks solved (%)", ylim=(len(rows) - 0.4, -0.6))


def _paint_metrics(results: Results, panels: Sequence[Panel], figure: Any) -> None:
    """Paint metrics over steps, mean over replicates: two in a row, a line for each label."""
    grid = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False, sharex=True)
    looks = styles(results)
    for panel, axes in zip_longest(panels, grid.flat):
        if panel is None:
            axes.set_axis_off()
            continue
        for place, (label, (colour, marker)) in enumerate(looks.items()):
            course = mean_metric(results, label, panel.metric)
            values = smooth([panel.scale * value for value in course.values()], panel.window)
            # Lines that lie on each other have their markers at different steps.
            every = max(1, len(course) // 6)
            marked = (place * every // len(looks), every)
            axes.plot(
                [*course], values, color=colour, marker=marker, markevery=marked,
                label=_glyphs(label),
            )  # fmt: skip
        axes.set_title(panel.title)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    for axes in grid[-1]:
        axes.set_xlabel("step")
    _add_legend(grid[0][0])


def _glyphs(label: str) -> str:
    """Return a label, shortened, with glyphs that every font has."""
    return "".join(c if 32 <= ord(c) < 127 else "?" for c in label[:24])


def _add_legend(axes: Any) -> None:
    """Add a legend under the plot, where it hides nothing; as many columns as fit."""
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    width, height = axes.figure.get_size_inches()
    columns = max(1, min(len(labels), int(12 * width) // (6 + max(map(len, labels)))))
    rows = -(-len(labels) // columns)
    axes.figure.set_size_inches(width, height + 0.18 * (rows - 1))  # the plot keeps its size
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)
