"""The figures of a report that show metrics over steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atod_train.reports.figures import (
    METHOD_COLOURS,
    ReportFigure,
    draw,
    legend,
    method_colour,
    method_label,
    time_figure,
)
from atod_train.reports.report_data import RunSummary, by_method, mean_curve, smooth

_STYLES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class _Line:
    key: str
    label: str
    style: str = "-"
    scale: float = 1.0


def _curves_figure(
    key: str,
    runs: Sequence[RunSummary],
    title: str,
    note: str,
    ylabel: str,
    lines: Sequence[_Line],
    window: int = 1,
) -> ReportFigure | None:
    """Metrics over steps: one line per method and key, averaged over seeds."""
    groups = by_method(runs)
    drawn: list[tuple[str, str, str, list[int], list[float]]] = []
    for index, (method, seeds) in enumerate(groups.items()):
        for place, line in enumerate(lines):
            steps, values = mean_curve(seeds, line.key)
            if not steps:
                continue
            several = len(groups) > 1
            label = f"{method_label(method)} {line.label}" if several else line.label
            label = method_label(method) if several and len(lines) == 1 else label
            # One method: colours tell the keys apart; several: colours are methods, styles keys.
            colour = (
                method_colour(method, index) if several else list(METHOD_COLOURS.values())[place]
            )
            style = line.style if several else "-"
            values = smooth([line.scale * value for value in values], window)
            drawn.append((label, colour, style, steps, values))
    if not drawn:
        return None

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        for label, colour, style, steps, values in drawn:
            axes.plot(steps, values, color=colour, linestyle=style, label=label)
        axes.set(xlabel="step", ylabel=ylabel)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        legend(axes)

    ends = "; ".join(
        f"{label} from {values[0]:.3g} to {values[-1]:.3g}" for label, _, _, _, values in drawn
    )
    return ReportFigure(title, note, f"{title} over steps: {ends}.", draw(key, paint))


def metric_figures(runs: Sequence[RunSummary]) -> list[ReportFigure]:
    """The figures made of metrics.jsonl; those without any data are left out."""
    window = 5
    figures = [
        _curves_figure(
            "coefficients",
            runs,
            "Coefficients kappa and rho",
            "kappa weighs the teacher's signal, rho the reward; annealing moves from one to "
            "the other.",
            "coefficient",
            [_Line("kappa", "kappa"), _Line("rho", "rho", "--")],
        ),
        _curves_figure(
            "signals",
            runs,
            "Size of the two signals",
            "Mean over tokens of the absolute advantage from teacher (kappa w delta) and reward "
            "(rho A), mean of 5 steps: what really drives the update.",
            "mean |advantage|",
            [
                _Line("opd_signal", "|kappa w delta|"),
                _Line("rl_signal", "|rho A|", "--"),
            ],
            window,
        ),
        _curves_figure(
            "training-success",
            runs,
            "Success and score while training",
            "Share of sampled training trajectories that reach the goal, and mean of the "
            "benchmark's own score, which may count what was reached in part; means of 5 steps.",
            "%",
            [
                _Line("train_success", "success", scale=100.0),
                _Line("train_score", "score", "--", scale=100.0),
            ],
            window,
        ),
        _curves_figure(
            "return",
            runs,
            "Return while training",
            "What the algorithm sees: the scaled rewards of a trajectory, penalties included; "
            "mean of 5 steps.",
            "mean return",
            [_Line("return", "return")],
            window,
        ),
        _curves_figure(
            "turn-weight",
            runs,
            "Mean turn weight",
            "How much of the teacher's signal passes the turn weights: 1 means all turns alike.",
            "mean w",
            [_Line("turn_weight", "turn weight w")],
            window,
        ),
        _curves_figure(
            "turn-statistics",
            runs,
            "Disagreement and uncertainty",
            "d: distance between the log-probabilities of student and teacher; h: mean negative "
            "log-probability of the student's own tokens. Means of 5 steps.",
            "nats per token",
            [_Line("disagreement", "disagreement d"), _Line("uncertainty", "uncertainty h", "--")],
            window,
        ),
        _curves_figure(
            "behaviour",
            runs,
            "Turns per episode",
            "Mean length of a training trajectory, mean of 5 steps.",
            "turns",
            [_Line("turns", "turns")],
            window,
        ),
        _curves_figure(
            "actions",
            runs,
            "Actions per episode",
            "Valid actions of a training trajectory by their first word, the most used ones; mean "
            "of 5 steps.",
            "actions",
            _action_lines(runs),
            window,
        ),
        _curves_figure(
            "shares",
            runs,
            "Invalid actions and clipped tokens",
            "Share of turns without a valid action, and share of tokens at the ratio clip.",
            "share (%)",
            [
                _Line("invalid_share", "invalid turns", scale=100.0),
                _Line("clip_fraction", "clipped tokens", "--", scale=100.0),
            ],
            window,
        ),
        _curves_figure(
            "entropy",
            runs,
            "Entropy of the policy",
            "A fall to zero means that the policy has stopped to explore.",
            "nats per token",
            [_Line("entropy", "entropy")],
            window,
        ),
        _curves_figure(
            "gradient",
            runs,
            "Gradient norm",
            "Before clipping; spikes announce an unstable run.",
            "norm",
            [_Line("grad_norm", "gradient norm")],
        ),
        time_figure("time", runs),
    ]
    return [figure for figure in figures if figure is not None]


def _action_lines(runs: Sequence[RunSummary]) -> list[_Line]:
    """One line for each of the most used verbs."""
    totals: Counter[str] = Counter()
    for run in runs:
        for record in run.metrics:
            for key, value in record.items():
                if key.startswith("actions/") and value:
                    totals[key] += value
    chosen = sorted(key for key, _ in totals.most_common(len(_STYLES)))
    return [
        _Line(key, key.removeprefix("actions/"), style)
        for key, style in zip(chosen, _STYLES, strict=False)
    ]
