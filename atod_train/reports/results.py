"""Define the results of runs on one environment: the raw numbers of a study.

`results.json` contains, for each environment, the tasks, settings and versions, and
for each finished run its label, seed, settings, cost, course and evaluations. Success is one
digit per task, in the order of `tasks`, so that any difference can be computed again, paired by
task. Older files also have `plays`: the digit is then the number of these plays that succeeded.
`course` has [step, success rate] of every evaluation after the start, and `metrics` one value for
each step from 1 on (null: not measured). A run takes one line of the file.

A file is a part of a study: some seeds, with a start and a teacher that were made and evaluated on
one machine. Parts of the same environment can be merged if they played the same tasks with the same
settings; each (part, seed) of a label is one replicate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.config import is_url
from atod_train.files import read_json, write_text
from atod_train.reports.run_folder import FREE_SETTINGS, setting_differences
from atod_train.reports.run_summary import RunSummary, record_of

RESULTS_FILE = "results.json"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
"""Allowed names of environments and runs."""

REFERENCES = ("start", "teacher")
"""Models that a run does not train; no run may have their names."""

_RUN_KEYS = ("label", "seed", "minutes", "tokens", "episodes", "seconds", "last", "best",
             "course", "metrics")  # fmt: skip
_FREE_BETWEEN_PARTS = {"data", "seed", "eval_samples", "threads"}
"""Further settings that may differ without a change of the measured quantity."""


class ResultsError(AtodError):
    """Files that are not results of a study, or that cannot be merged."""


@dataclass(frozen=True)
class RunResult:
    """A run of a label with one seed."""

    label: str
    seed: int
    part: int
    """Number of its part, from 0."""
    record: Mapping[str, Any]
    """In the form of the module's docstring."""


@dataclass(frozen=True, eq=False)
class Results:
    """All data about one environment of a study."""

    name: str
    tasks: Mapping[str, tuple[str, ...]]
    """Split -> its task ids."""
    task_types: Mapping[str, tuple[str, ...]]
    """Split -> the type of each task; older files have none."""
    parts: tuple[Mapping[str, Any], ...]
    """Shared by the runs of each part: start, teacher, data, versions."""
    runs: tuple[RunResult, ...]
    folders: tuple[RunSummary, ...] = ()
    """The runs with the content of their folders; none if the results were read from files."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the runs, in order of appearance."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of the evaluations, in order of appearance."""
        keys = (key for part in self.parts for key in (*part["start"], *part["teacher"]))
        return tuple(dict.fromkeys(key.rpartition("/")[2] for key in keys))

    def of(self, label: str) -> tuple[RunResult, ...]:
        """Return the runs of a label."""
        return tuple(run for run in self.runs if run.label == label)


def results_of(name: str, runs: Sequence[RunSummary]) -> Results:
    """Return the results of runs that share environment, start, teacher and tasks."""
    return replace(_merged(name, [(Path(name), record_of(runs))]), folders=tuple(runs))


# -- files ----------------------------------------------------------------------------------------


def write_results(path: Path, environments: Sequence[Results]) -> None:
    """Write the results of environments of one part each, unless there are none."""
    texts = [f"{json.dumps(results.name)}: {_lines(results)}" for results in environments]
    if texts:
        write_text(path, "{\n" + ",\n".join(texts) + "\n}\n")


def _lines(results: Results) -> str:
    """Return an environment as JSON, one line for each of its keys and runs."""
    [part] = results.parts
    runs = ",\n".join(f"    {json.dumps(run.record)}" for run in results.runs)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in part.items()]
    return "{\n" + ",\n".join([*lines, f'  "runs": [\n{runs}\n  ]']) + "\n}"


def read_results(paths: Sequence[Path]) -> tuple[Results, ...]:
    """Read results files, and merge those of the same environment.

    Raises:
        ResultsError: a file is not a results file; tasks, data or settings of an environment
            differ between files; or a run occurs twice.
    """
    parts: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        if not path.is_file():
            raise ResultsError(f"{path} cannot be read: there is no such file.")
        content = read_json(path)
        try:
            if not content:
                raise ValueError("no environments")
            for name, record in content.items():
                _check(name, record)
                parts.setdefault(name, []).append((path, record))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ResultsError(
                f"{path} is not a results.json of this version of atod-train study ({error})."
            ) from error
    return tuple(_merged(name, found) for name, found in parts.items())


def _check(name: str, record: Mapping[str, Any]) -> None:
    """Raise one of several errors if an environment has another form than `results.json`."""
    if not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the name of an environment")
    lengths = {split: len(tasks) for split, tasks in record["tasks"].items()}
    if not record["runs"] or not lengths or not {**record["start"], **record["teacher"]}:
        raise ValueError(f"{name} has no runs, tasks or evaluations")
    _check_evaluations(record, REFERENCES, lengths)
    for run in record["runs"]:
        if missing := [key for key in _RUN_KEYS if key not in run]:
            raise ValueError(f"a run of {name} has no {missing[0]!r}")
        if not (isinstance(run["label"], str) and isinstance(run["seed"], int)):
            raise ValueError(f"a run of {name} has no label and seed")
        _check_evaluations(run, ("last", "best"), lengths)


def _check_evaluations(
    record: Mapping[str, Any], keys: Sequence[str], lengths: Mapping[str, int]
) -> None:
    found = [(key, *item) for key in keys for item in record[key].items() if item[1]]
    for key, name, evaluation in found:
        tasks, plays = lengths[name.rpartition("/")[0]], evaluation.get("plays", 1)
        digits = rf"[0-{plays:d}]{{{tasks}}}"
        if plays not in range(1, 10) or not re.fullmatch(digits, evaluation["success"]):
            raise ValueError(
                f"{key} of {name} is not one digit, 0 to {plays}, for each of {tasks} tasks"
            )
        if not isinstance(evaluation.get("score"), int | float):
            raise ValueError(f"{key} of {name} has no score")


# -- merging --------------------------------------------------------------------------------------


def _merged(name: str, parts: Sequence[tuple[Path, dict[str, Any]]]) -> Results:
    """Return one environment made of its parts, each with the file it comes from.

    Raises:
        ResultsError: parts with other tasks or settings, a run that occurs
            twice, or a label with other settings.
    """
    first_path, first = parts[0]
    runs: list[RunResult] = []
    for number, (path, record) in enumerate(parts):
        if difference := _difference(first, record):
            raise ResultsError(
                f"{name}: {difference} differs between {first_path} and {path}; such files cannot "
                "be merged. Use each file alone, or give the environment another name."
            )
        for run in record["runs"]:
            label, seed = run["label"], run["seed"]
            for other in (other for other in runs if other.label == label):
                other_path = parts[other.part][0]
                if other.record == run or (other.part, other.seed) == (number, seed):
                    raise ResultsError(
                        f"{name}: {label}, seed {seed} of {path} is also in {other_path}; give "
                        "each run once."
                    )
                if difference := _setting_difference(run, other.record, ("algorithm", "train")):
                    raise ResultsError(
                        f"{name}: the runs {label!r} of {other_path} and {path} differ in "
                        f"{difference}; runs of one label must have equal settings."
                    )
            runs.append(RunResult(label, seed, number, run))
    return Results(
        name,
        {split: tuple(ids) for split, ids in first["tasks"].items()},
        {split: tuple(types) for split, types in first.get("task_types", {}).items()},
        tuple({key: record[key] for key in record if key != "runs"} for _, record in parts),
        tuple(runs),
    )


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """Return the difference that prevents merging two parts; empty: none."""
    if a["tasks"] != b["tasks"]:
        return "the list of tasks"
    hashes = [(record.get("data") or {}).get("hash") for record in (a, b)]
    if None not in hashes and hashes[0] != hashes[1]:
        return "the hash of the training data"
    return _setting_difference(a, b, ("env", "model"))


def _setting_difference(a: Mapping[str, Any], b: Mapping[str, Any], sections: Sequence[str]) -> str:
    """Return the first common setting with different values; empty: none."""
    old_settings, new_settings = (
        {section: _renamed(record.get(section) or {}) for section in sections} for record in (a, b)
    )
    free = FREE_SETTINGS | _FREE_BETWEEN_PARTS
    for name, old, new in setting_differences(old_settings, new_settings, sections, free):
        is_model = name in ("model.student", "model.teacher")
        if not is_model or _model_name(old) != _model_name(new):
            return f"{name} ({old!r} and {new!r})"
    return ""


def _renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section's settings in today's form; older files have other numbers for the same."""
    found = dict(settings)
    if reward := found.pop("success_reward", 0.0):
        found["invalid_action_penalty"] = found.get("invalid_action_penalty", 0.0) / reward
    if "minibatches" in found:
        found["minibatches"] = str(found["minibatches"])
    return found


def _model_name(model: object) -> str:
    """Return a model's name without its location, which may be another folder or URL."""
    name = str(model)
    return "a server" if is_url(name) else Path(name).name
