"""Write `report.html` of runs or of a study: one file that needs only a browser.

Each environment begins with the runs, the answer (`reports.answer`), one figure and the next
steps. All else is folded: tables, splits, task types, metrics over steps, cost, settings, and a few
trajectories turn by turn. The page loads nothing: no script, font or picture from an address; a
content policy in its head forbids it as well.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.files import write_text
from atod_train.reports.analysis import cost
from atod_train.reports.answer import Answer, answer
from atod_train.reports.figures import metrics_figure, signals_picture, success_figure
from atod_train.reports.results import Results
from atod_train.reports.run_summary import RunSummary
from atod_train.reports.tables import (
    claims_table,
    difference_table,
    first_pairs,
    main_table,
    phase_table,
    type_table,
)

REPORT_FILE = "report.html"
LONGEST_TEXT = 4000
"""Maximum number of characters of one observation or completion."""

MOST_TRAJECTORIES = 6
_NARROW = 4.6
"""Width in inches of a figure that can be read on a phone."""

_MEASURES = (
    ("disagreement", "d", "disagreement with the teacher, nats per token"),
    ("uncertainty", "h", "student's uncertainty, nats per token"),
    ("weight", "w", "turn weight of the teacher's signal"),
)
_PART_FACTS = ("env_id", "data", "env", "model", "parameters", "time", "platform", "device",
               "processes", "python", "packages")  # fmt: skip
_SAVED = {"last": "after the last step", "best": "of the best evaluation"}
"""Folders of a run's models with their descriptions."""

_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


class ReportError(AtodError):
    """A report cannot be made or written."""


def write_report(folder: Path, environments: Sequence[Results], *, pictures: bool = False) -> Path:
    """Write `folder/report.html`.

    Args:
        folder: made if absent.
        environments: the results; those made of run folders have trajectories, too.
        pictures: also write two PNG files for each environment, for other documents: success, and
            coefficients with the sizes of the signals. Needs evaluations.

    Raises:
        ReportError: there are no environments, or a file cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    if not environments:
        raise ReportError("A report needs at least one run.")
    here = Path(__file__).parent
    # Everything from outside the program is escaped, and loses control characters.
    template = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
    ).get_template("report.html.j2")
    text = template.render(
        title=", ".join(results.name for results in environments),
        css=(here / "report.css").read_text(encoding="utf-8"),
        claims=claims_table(environments) if len(environments) > 1 else None,
        parts=[_part(results) for results in environments],
        measures=_MEASURES,
        longest_text=LONGEST_TEXT,
    )
    path = folder / REPORT_FILE
    try:
        write_text(path, text)
        for results in environments if pictures else ():
            (folder / f"{results.name}-success.png").write_bytes(success_figure(results).png)
            (folder / f"{results.name}-signals.png").write_bytes(signals_picture(results))
    except OSError as error:
        raise ReportError(
            f"{folder} cannot be written ({error}); choose another folder."
        ) from error
    return path


def _printable(value: Any) -> Any:
    """Return text without control characters and lone surrogates."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return _UNPRINTABLE.sub("\ufffd", value)


def _part(results: Results) -> dict[str, Any]:
    """Return the values of an environment for the template."""
    tables, figures = [], []
    if results.tasks:
        tables = [main_table(results)]
        figures = [success_figure(results, None, [mode], _NARROW) for mode in results.modes]
        if pairs := first_pairs(results):
            tables.append(difference_table(results, pairs))
    splits = results.tasks if len(results.tasks) > 1 else ()
    types = [type_table(results, mode) for mode in results.modes]
    metrics = metrics_figure(results)
    found = answer(results)
    return {
        "name": results.name,
        "setup": _setup(results),
        "answer": found,
        "figures": figures,
        "next": _next_steps(results, found),
        "missing": _missing(results),
        "details": [
            ("All numbers", tables, []),
            (
                "Splits",
                [main_table(results, split) for split in splits],
                [success_figure(results, split) for split in splits],
            ),
            ("Task types", [table for table in types if table], []),
            ("Metrics over steps", [], [metrics] if metrics else []),
            ("Cost", [phase_table(results)], []),
        ],
        "facts": _facts(results),
        "trajectories": _latest_trajectories(results),
    }


def _setup(results: Results) -> str:
    """Return a description of the runs, in a few short sentences."""
    part, labels = results.parts[0], results.labels
    data = (part.get("data") or {}).get("name")
    sizes = {split: len(tasks) for split, tasks in results.tasks.items()}
    seeds = sorted({run.seed for run in results.runs})
    steps = {int((run.record.get("train") or {}).get("steps") or 0) for run in results.runs} - {0}
    model = part.get("model") or {}
    roles = [f"{r} {Path(str(model[r])).name}" for r in ("student", "teacher") if model.get(r)]
    minutes = [cost(results, label).minutes for label in labels]
    sentences = [
        f"{part.get('env_id') or results.name}" + (f", {Path(data).name} data" if data else ""),
        f"{sum(sizes.values()):,} tasks ({', '.join(f'{s} {n:,}' for s, n in sizes.items())})"
        if sizes
        else "",
        f"{len(results.runs)} run{'s' * (len(results.runs) > 1)}: {', '.join(labels)}; "
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        + (f"; {' or '.join(f'{count:,}' for count in sorted(steps))} steps" if steps else ""),
        "; ".join(roles).capitalize(),
        f"{max(minutes):.0f} minutes a run at most" if max(minutes) >= 1 else "",
        _day(part.get("time")),
    ]
    return ". ".join(filter(None, sentences)) + "."


def _day(time: object) -> str:
    """Return the day of an ISO time, such as 26 November 2026; empty if it is not one."""
    try:
        day = datetime.fromisoformat(str(time))
    except ValueError:
        return ""
    return f"{day.day} {day:%B %Y}"


def saved_models(results: Results, found: Answer) -> list[Path]:
    """Return the folders of the winner's models: the last and the best of its first run."""
    runs = [run for run in results.folders if run.label == found.winner]
    folders = [run.folder / "models" / name for run in runs[:1] for name in _SAVED]
    return [folder for folder in folders if folder.is_dir()]


def _next_steps(results: Results, found: Answer | None) -> list[tuple[str, str]]:
    """Return possible uses of the winner's model: a heading and lines to copy, each."""
    folders = saved_models(results, found) if found else []
    if not folders:
        return []
    model = folders[0]
    run = next(run for run in results.folders if run.folder in model.parents)
    split = next(iter(results.tasks))
    return [
        (
            f"The model of {run.label}, seed {run.seed}",
            "\n".join(f"{path}  ({_SAVED[path.name]})" for path in folders),
        ),
        (
            "Load it with transformers",
            f"folder = {json.dumps(str(model))}\n"
            "model = AutoModelForCausalLM.from_pretrained(folder)\n"
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
        ),
        (
            "Evaluate it again",
            shlex.join(["atod-eval", "--agent", f"model:{model}", "--split", split]),
        ),
        ("Train it for more steps", _continued(run)),
        ("All curves", shlex.join(["tensorboard", "--logdir", str(run.folder.parent)])),
    ]


def _continued(run: RunSummary) -> str:
    """Return the command that continues a finished run, or how to find it."""
    program, *words = map(str, run.manifest.get("command") or [""])
    steps = run.config.get("train", {}).get("steps", 0)
    is_ours = Path(program).name in ("atod-train", "cli.py")
    if not is_ours or not words or words[0] in ("study", "resume"):
        return "the command of the run, with --resume and a larger train.steps"
    if "--train.steps" in words[:-1]:
        place = words.index("--train.steps")
        del words[place : place + 2]
    more = [word for word in ("--resume",) if word not in words]
    return shlex.join(["atod-train", *words, *more, "--train.steps", str(2 * steps)])


def _missing(results: Results) -> list[str]:
    part, folders = results.parts[0], results.folders
    recorded = {
        "metrics of the steps": any(run.record["metrics"] for run in results.runs),
        "evaluations": results.tasks,
        "an evaluation of the start": any(part["start"].values()),
        "an evaluation of the teacher": any(part["teacher"].values()),
        "trajectories": not folders or any(run.trajectories for run in folders),
        "the manifest (data, seeds, versions)": part.get("data"),
    }
    return [name for name, found in recorded.items() if not found]


def _facts(results: Results) -> dict[str, str]:
    """Return the different values of each fact, settings included, by name."""
    records = [
        *({name: part.get(name) for name in _PART_FACTS} for part in results.parts),
        *({name: run.record.get(name) for name in ("algorithm", "train")} for run in results.runs),
        *(
            {
                "command": shlex.join(map(str, run.manifest.get("command", ()))),
                "times resumed": len(run.manifest.get("resumed", ())),
            }
            for run in results.folders
        ),
    ]
    facts: dict[str, dict[str, None]] = {}
    for record in records:
        for name, value in record.items():
            values = value if isinstance(value, dict) else {"": value}
            for key, item in values.items():
                text = f"{item:,}" if type(item) is int else str(item)
                if item not in (None, "", [], {}):
                    facts.setdefault(f"{name}.{key}".rstrip("."), {})[text] = None
    return {name: ", ".join(texts) for name, texts in facts.items()}


def _latest_trajectories(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Return the latest trajectories, run after run in turn, until there are enough."""
    by_run = [
        [(f"{run.label}, seed {run.seed}", row) for row in reversed(run.trajectories)]
        for run in results.folders
    ]
    found = [pair for pairs in zip_longest(*by_run) for pair in pairs if pair]
    return found[:MOST_TRAJECTORIES]
