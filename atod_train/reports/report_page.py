"""The pieces of the report's HTML: escaping, tables, figures, turns, and the page around them.

Everything that comes from outside the program passes `escape`. The page loads nothing: no
script, no font, no image by address; a content policy in its head forbids it as well.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from atod_train.reports.figures import ReportFigure
from atod_train.reports.metrics import TrajectoryRecord, TurnDisplay

NOTHING = "\u2013"
"""What a cell without a value shows."""

LONGEST_TEXT = 4000
"""Characters of one observation or completion that are shown."""

_CONTROLS = dict.fromkeys((*range(9), 11, 12, *range(14, 32), 127), "�")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --page: #f6f7f9;
  --card: #ffffff; --line: #d9dee5; --grid: #e3e7ec; --accent: #1f65b7; --good: #1d7a4c;
  --bad: #b3402e; --heat: 224, 110, 30; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa6b5; --page: #12161c;
  --card: #1a2028; --line: #323b47; --grid: #2c343f; --accent: #7ab4f5; --good: #62c796;
  --bad: #f08d7c; --heat: 220, 118, 45; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; }
h2 { font-size: 1.25rem; margin: 40px 0 10px; }
h3 { font-size: 1rem; margin: 0 0 2px; }
p { margin: 6px 0; max-width: 75ch; }
.note, figcaption { color: var(--soft); font-size: 0.875rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 14px 16px; }
.tiles { display: grid; gap: 12px; margin: 18px 0;
  grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
.tiles b { display: block; font-size: 1.45rem; line-height: 1.3; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 12px 0; padding: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 12px 16px 6px; font-weight: 600; }
th, td { text-align: right; padding: 7px 16px; white-space: nowrap;
  border-top: 1px solid var(--line); }
thead th { color: var(--soft); font-weight: 500; font-size: 0.875rem; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 500; }
td small { color: var(--soft); }
.figures { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; }
figure.card { display: flex; flex-direction: column; }
figcaption { margin-top: auto; }
details { margin: 12px 0; }
summary { cursor: pointer; font-weight: 500; overflow-wrap: anywhere; }
.mark { font-weight: 600; } .yes { color: var(--good); } .no { color: var(--bad); }
.heat { width: auto; margin: 10px 0; }
.heat th, .heat td { padding: 4px 8px; border: 0; text-align: center; font-size: 0.8125rem; }
.heat tbody th { text-align: left; color: var(--soft); min-width: 0; }
.heat td { border-radius: 4px; min-width: 3.2em; }
ol.turns { list-style: none; margin: 0; padding: 0; }
ol.turns li { border-top: 1px solid var(--line); padding: 10px 0; display: grid; gap: 4px 16px;
  grid-template-columns: minmax(0, 1fr) 15rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0;
  font: 0.8125rem/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.said.model { border-left: 3px solid var(--accent); padding-left: 10px; margin-top: 6px; }
.label { color: var(--soft); font-size: 0.75rem; }
.chips { display: flex; flex-wrap: wrap; gap: 4px; align-content: flex-start; }
.chip { border: 1px solid var(--line); border-radius: 5px; padding: 0 7px; font-size: 0.8125rem; }
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 640px) { main { padding: 16px 12px 48px; } h1 { font-size: 1.35rem; }
  th, td { padding: 6px 10px; } caption { padding: 10px 10px 4px; }
  tbody th { white-space: normal; min-width: 8em; }
  ol.turns li { grid-template-columns: minmax(0, 1fr); }
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
@media print { details > * { display: block; } .card { break-inside: avoid; } }
"""


def escape(text: object) -> str:
    """Any text as HTML text or attribute value; control characters and lone surrogates shown."""
    cleaned = str(text).translate(_CONTROLS).encode("utf-8", "replace").decode("utf-8")
    return html.escape(cleaned, quote=True)


def percent(share: float, digits: int = 1) -> str:
    """0.7214 -> "72.1 %" with a no-break space."""
    return f"{100 * share:.{digits}f}\u00a0%"


def percent_range(interval: tuple[float, float]) -> str:
    """(0.6421, 0.789) -> "64.2 to 78.9" (per cent, or points of a difference)."""
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}".replace("-", "\u2212")


def signed_points(difference: float) -> str:
    """0.043 -> "+4.3" points, with a real minus sign."""
    return f"{100 * difference:+.1f}".replace("-", "\u2212")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A scrollable table; cells are HTML already, the first of each row is its header."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{c}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll card" tabindex="0" role="region" aria-label="{caption}">'
        f"<table><caption>{caption}</caption><thead><tr>{columns}</tr></thead>"
        f"<tbody>{lines}</tbody></table></div>"
    )


def tiles(items: Sequence[tuple[str, str, str]]) -> str:
    """Key figures: (label, value, remark), all HTML already."""
    cells = "".join(
        f'<div class="card"><span class="label">{label}</span><b>{value}</b>'
        f'<span class="note">{remark}</span></div>'
        for label, value, remark in items
    )
    return f'<div class="tiles">{cells}</div>'


def definitions(items: Sequence[tuple[str, str]]) -> str:
    """A list of facts: (name, HTML value)."""
    pairs = "".join(f"<dt>{escape(name)}</dt><dd>{value}</dd>" for name, value in items)
    return f'<dl class="card">{pairs}</dl>'


def figure(item: ReportFigure) -> str:
    """A figure with title, caption and a text for those who cannot see it."""
    return (
        f'<figure class="card"><h3>{escape(item.title)}</h3>'
        f'<div role="img" aria-label="{escape(item.alt)}">{item.svg}</div>'
        f"<figcaption>{escape(item.note)}</figcaption></figure>"
    )


def _shade(strength: float) -> str:
    """A background whose opacity shows 0..1; weak enough for the text to stay readable."""
    return f"background: rgba(var(--heat), {0.06 + 0.54 * min(1.0, max(0.0, strength)):.2f})"


_MEASURES = (
    ("disagreement", "d", "disagreement with the teacher, nats per token"),
    ("uncertainty", "h", "student's uncertainty, nats per token"),
    ("weight", "w", "turn weight of the teacher's signal"),
)


def _strengths(turns: Sequence[TurnDisplay], measure: str) -> list[float]:
    """Values on 0..1 for shading: w as it is, d and h by their largest of the trajectory."""
    values = [getattr(turn, measure) or 0.0 for turn in turns]
    largest = 1.0 if measure == "weight" else max([1e-8, *values])
    return [value / largest for value in values]


def _heat_map(turns: Sequence[TurnDisplay]) -> str:
    rows = ""
    for measure, symbol, meaning in _MEASURES:
        if all(getattr(turn, measure) is None for turn in turns):
            continue
        cells = ""
        strengths = _strengths(turns, measure)
        for number, (turn, strength) in enumerate(zip(turns, strengths, strict=True), start=1):
            value = getattr(turn, measure)
            if value is None:
                cells += "<td>\u2013</td>"
                continue
            tip = escape(f"turn {number}: {meaning} = {value:.4f}; {turn.action}")
            cells += f'<td style="{_shade(strength)}" title="{tip}">{value:.2f}</td>'
        rows += f'<tr><th scope="row" title="{meaning}">{symbol}</th>{cells}</tr>'
    if not rows:
        return (
            '<p class="note">No teacher scored this trajectory: there is no heat map of '
            "disagreement, uncertainty and weight.</p>"
        )
    head = "".join(f'<th scope="col">{number}</th>' for number in range(1, len(turns) + 1))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="heat map of the turns">'
        f'<table class="heat"><thead><tr><th scope="col">turn</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _shortened(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return escape(text)
    return f"{escape(text[:LONGEST_TEXT])}\u2026 ({len(text) - LONGEST_TEXT} more characters)"


def _said(label: str, text: str) -> str:
    return f'<p class="said model"><span class="label">{label}</span>\n{_shortened(text)}</p>'


def _turn(number: int, turn: TurnDisplay, strengths: dict[str, float]) -> str:
    validity = "valid" if turn.valid else "not valid"
    css = "yes" if turn.valid else "no"
    chips = f'<span class="chip {css}">{validity}</span>'
    chips += f'<span class="chip" title="reward of this turn">reward {turn.reward:+.2f}</span>'
    for measure, symbol, meaning in _MEASURES:
        value = getattr(turn, measure)
        if value is not None:
            style = _shade(strengths[measure])
            chips += (
                f'<span class="chip" style="{style}" title="{meaning}">{symbol} {value:.3f}</span>'
            )
    shown = (
        f'<p class="said model"><span class="label">model</span>\n{_shortened(turn.completion)}</p>'
    )
    if turn.action.strip() != turn.completion.strip():
        shown += _said("action", turn.action)
    return (
        f'<li><div><span class="label">turn {number}, environment</span>'
        f'<p class="said">{_shortened(turn.text)}</p>{shown}</div>'
        f'<div class="chips">{chips}</div></li>'
    )


def trajectory(record: TrajectoryRecord, run_name: str, *, is_open: bool = False) -> str:
    """A trajectory turn by turn under a line that opens and closes it."""
    outcome = "solved" if record.success else "not solved"
    css = "yes" if record.success else "no"
    total = sum(turn.reward for turn in record.turns)
    strengths = {measure: _strengths(record.turns, measure) for measure, _, _ in _MEASURES}
    turns = "".join(
        _turn(index + 1, turn, {measure: strengths[measure][index] for measure in strengths})
        for index, turn in enumerate(record.turns)
    )
    return (
        f'<details class="card"{" open" if is_open else ""}><summary>'
        f'<span class="mark {css}">{outcome}</span> \u00b7 {escape(run_name)} \u00b7 '
        f"step {record.step} \u00b7 {len(record.turns)} turns \u00b7 return {total:.2f} \u00b7 "
        f"<code>{escape(record.task_id)}</code></summary>"
        f'{_heat_map(record.turns)}<ol class="turns">{turns}</ol></details>'
    )


def page(title: str, body: str) -> str:
    """The whole document."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def distinct(values: Sequence[object]) -> str:
    """The distinct values in order, as HTML."""
    shown = dict.fromkeys(escape(value) for value in values if value not in (None, "", {}))
    return ", ".join(shown) or NOTHING
