"""Results of runs on one environment: the raw numbers of a study, written, read and merged.

`results.json` holds, for each environment, what was played, with which settings and versions, and
for each finished run its label, seed, settings, cost, course and evaluations. Success is one
digit a task, in the order of `tasks`, so that any difference can be computed again, paired by task.
Older files have `plays` too: the digit is then how many of these plays succeeded. `course` has
[step, success rate] of every evaluation after the start, and `metrics` one value for each step
from 1 on (null: not measured). A run takes one line of the file.

A file is a part of a study: some seeds, with a start and a teacher that were made and evaluated on
one machine. Parts of the same environment can be merged if they played the same tasks with the same
settings; each (part, seed) of a label is one replicate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.config import RunConfig, is_url
from atod_train.files import read_json, without_infinities, write_text
from atod_train.reports.evaluations import Evaluation, EvaluationResult
from atod_train.reports.run_folder import OtherSettingsError, is_finished
from atod_train.reports.run_summary import RunSummary, SplitMode, read_run

RESULTS_FILE = "results.json"
FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
"""Allowed names of environments and runs."""

REFERENCES = ("start", "teacher")
"""Models that a run does not train; no run may have their names."""

KEPT_METRICS = (
    "kappa",
    "rho",
    "opd_signal",
    "rl_signal",
    "turn_weight",
    "disagreement",
    "uncertainty",
    "train_success",
    "solved_groups",
    "invalid_share",
    "turns",
    "anneal_progress",
    "entropy",
)
_SHARED = ("env_id", "data", "python", "packages", "platform", "device", "processes", "time")
_RUN_KEYS = ("label", "seed", "minutes", "tokens", "episodes", "seconds", "last", "best",
             "course", "metrics")  # fmt: skip
_FREE = {
    "env": {"data", "eval_samples"},
    "model": {"device", "teacher_device"},
    "train": {"seed", "threads", "eval_every", "save_every", "tokens_per_microbatch"},
    "algorithm": set[str](),
}
"""Settings that may differ between parts without a change of what is measured."""


class ResultsError(AtodError):
    """Files that are no results of a study, or that cannot be merged."""


@dataclass(frozen=True)
class RunResult:
    """A run of a label with one seed."""

    label: str
    seed: int
    part: int
    """Number of its part, from 0."""
    record: Mapping[str, Any]
    """As the module's docstring describes it."""


@dataclass(frozen=True)
class Results:
    """All that is known about one environment of a study."""

    name: str
    tasks: Mapping[str, tuple[str, ...]]
    """Split -> its task ids."""
    task_types: Mapping[str, tuple[str, ...]]
    """Split -> the type of each task; older files have none."""
    parts: tuple[Mapping[str, Any], ...]
    """Shared by the runs of each part: start, teacher, data, versions."""
    runs: tuple[RunResult, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the runs, in order of appearance."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    @property
    def modes(self) -> tuple[str, ...]:
        """Modes of the evaluations, in order of appearance."""
        keys = (key for part in self.parts for key in part["start"])
        return tuple(dict.fromkeys(key.rpartition("/")[2] for key in keys))

    def of(self, label: str) -> tuple[RunResult, ...]:
        """The runs of a label."""
        return tuple(run for run in self.runs if run.label == label)


# -- from the folders of runs ---------------------------------------------------------------------


def finished_runs(
    folder: Path, settings: Mapping[str, RunConfig]
) -> tuple[list[RunSummary], list[str]]:
    """Return the finished runs in the folder of an environment.

    Args:
        folder: of the environment; a run lies in `<label>-seed<seed>`.
        settings: of the runs to look for, by label, whatever their seeds; the order is that of the
            runs of one seed.

    Returns:
        The runs, by seeds, then labels; and a line for each that was left out since it was made
        with other settings, so that what a table compares had the same start, teacher and budget.

    Raises:
        FileError: a file of a run is broken.
    """
    found, left_out = [], []
    for place, (label, config) in enumerate(settings.items()):
        for path in sorted(folder.glob(f"{label}-seed*")):
            match = re.fullmatch(r"-seed(-?\d+)", path.name.removeprefix(label))
            if not match:
                continue
            seed = int(match[1])
            try:
                if is_finished(path, config.with_seed(seed)):
                    found.append((seed, place, path, label))
            except OtherSettingsError as error:
                left_out.append(str(error))
    runs = [read_run(path, label=label, seed=seed) for seed, _, path, label in sorted(found)]
    return runs, left_out


def results_of(name: str, runs: Sequence[RunSummary]) -> Results:
    """Return the results of runs that share environment, start, teacher and tasks."""
    return _merged(name, [(Path(name), record_of(runs))])


def record_of(runs: Sequence[RunSummary]) -> dict[str, Any]:
    """Return runs that share environment, start, teacher and tasks as one part; JSON values."""
    keys = tuple(dict.fromkeys(key for run in runs for key in run.split_modes))
    first = runs[0]
    # Methods without a teacher do not name its size.
    sizes = [run.manifest.get("parameters", {}) for run in runs]
    teachers = {key: [r for run in runs if (r := run.teacher(key))] for key in keys}
    played = {e.result.split: e.result for run in runs for e in reversed(run.evaluations)}
    splits = dict.fromkeys(split for split, _ in keys)
    return {
        **{name: first.manifest.get(name) for name in _SHARED},
        "parameters": next((size for size in sizes if size.get("teacher")), sizes[0]),
        "env": first.config.get("env"),
        # `start` is taken by the evaluations of the start.
        "model": {**first.config.get("model", {}), "start": first.config.get("start")},
        "tasks": {split: [task.task_id for task in played[split].tasks] for split in splits},
        "task_types": {split: [t.task_type for t in played[split].tasks] for split in splits},
        "start": {_key(key): _evaluation(first.start(key)) for key in keys},
        "teacher": {_key(key): _evaluation(next(iter(teachers[key]), None)) for key in keys},
        "runs": [_run_record(run, keys) for run in runs],
    }


def _run_record(run: RunSummary, keys: Sequence[SplitMode]) -> dict[str, Any]:
    prefix = "seconds/"
    phases = dict.fromkeys(key for step in run.metrics for key in step if key.startswith(prefix))
    return {
        "label": run.label,
        "seed": run.seed,
        "algorithm": run.config.get("algorithm"),
        "train": run.config.get("train"),
        "minutes": run.summary.get("minutes"),
        "tokens": run.summary.get("tokens"),
        "episodes": run.summary.get("trajectories"),
        "seconds": {
            phase.removeprefix(prefix): round(sum(run.curve(phase).values()), 1) for phase in phases
        },
        "last": {_key(key): _at_step(run.last(key)) for key in keys},
        "best": {_key(key): _at_step(run.best(key)) for key in keys},
        "course": {
            _key(key): [
                [e.step, round(e.result.success_rate, 4)] for e in run.course(key) if e.step > 0
            ]
            for key in keys
        },
        "metrics": _metrics(run),
    }


def _metrics(run: RunSummary) -> dict[str, list[float | None]]:
    """The kept metrics with four significant digits, a value for each step from 1 on."""
    steps = range(1, max((record["step"] for record in run.metrics), default=0) + 1)
    curves = {name: run.curve(name) for name in KEPT_METRICS}
    return {
        name: [float(f"{curve[step]:.4g}") if step in curve else None for step in steps]
        for name, curve in curves.items()
        if curve
    }


def _key(key: SplitMode) -> str:
    return "/".join(key)


def _at_step(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {"step": evaluation.step, **(_evaluation(evaluation.result) or {})}


def _evaluation(result: EvaluationResult | None) -> dict[str, Any] | None:
    if result is None:
        return None
    return {
        "success": "".join(str(int(task.success)) for task in result.tasks),
        "success_rate": round(result.success_rate, 6),
        "score": round(result.mean_score, 6),
        "turns": round(result.mean_turns, 3),
        "invalid_share": round(result.invalid_share, 6),
    }


# -- files ----------------------------------------------------------------------------------------


def write_results(path: Path, studies: Mapping[str, Sequence[RunSummary]]) -> None:
    """Write the results of finished runs, unless there are none.

    Args:
        path: of the file.
        studies: name of an environment -> its finished runs; one without any is left out.
    """
    parts = [f"{json.dumps(name)}: {_lines(runs)}" for name, runs in studies.items() if runs]
    if parts:
        write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _lines(runs: Sequence[RunSummary]) -> str:
    """An environment as JSON, a line for each of its keys and runs."""
    record = without_infinities(record_of(runs))
    run_lines = ",\n".join(f"    {json.dumps(run)}" for run in record.pop("runs"))
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
    return "{\n" + ",\n".join([*lines, f'  "runs": [\n{run_lines}\n  ]']) + "\n}"


def read_results(paths: Sequence[Path]) -> tuple[Results, ...]:
    """Read results files and merge what belongs to the same environment.

    Args:
        paths: of files that `atod-train study` wrote.

    Returns:
        The environments in order of appearance.

    Raises:
        ResultsError: a file is no results file; tasks, data or settings of an environment differ
            between files; or a run is there twice.
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
                f"{path} is no results.json of this version of atod-train study ({error})."
            ) from error
    return tuple(_merged(name, found) for name, found in parts.items())


def _check(name: str, record: Mapping[str, Any]) -> None:
    """Raise one of several errors unless an environment has the form that is written."""
    if not FOLDER_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an environment")
    lengths = {split: len(tasks) for split, tasks in record["tasks"].items()}
    if not record["runs"] or not lengths or not {**record["start"], **record["teacher"]}:
        raise ValueError(f"{name} has no runs, tasks or evaluations")
    _check_evaluations(record, REFERENCES, lengths)
    seen = set()
    for run in record["runs"]:
        if missing := [key for key in _RUN_KEYS if key not in run]:
            raise ValueError(f"a run of {name} has no {missing[0]!r}")
        if not (isinstance(run["label"], str) and isinstance(run["seed"], int)):
            raise ValueError(f"a run of {name} has no label and seed")
        if (run["label"], run["seed"]) in seen:
            raise ValueError(f"{name} has {run['label']}, seed {run['seed']} twice")
        seen.add((run["label"], run["seed"]))
        _check_evaluations(run, ("last", "best"), lengths)


def _check_evaluations(
    record: Mapping[str, Any], keys: Sequence[str], lengths: Mapping[str, int]
) -> None:
    evaluations = [(key, *item) for key in keys for item in record[key].items() if item[1]]
    for key, split_mode, evaluation in evaluations:
        tasks, plays = lengths[split_mode.rpartition("/")[0]], evaluation.get("plays", 1)
        if plays not in range(1, 10) or not re.fullmatch(
            rf"[0-{plays:d}]{{{tasks}}}", evaluation["success"]
        ):
            raise ValueError(
                f"{key} of {split_mode} is not one digit, 0 to {plays}, for each of {tasks} tasks"
            )
        if not isinstance(evaluation.get("score"), int | float):
            raise ValueError(f"{key} of {split_mode} has no score")


# -- merging --------------------------------------------------------------------------------------


def _merged(name: str, parts: Sequence[tuple[Path, dict[str, Any]]]) -> Results:
    """Return one environment made of its parts, each with the file it comes from."""
    first_path, first = parts[0]
    runs: list[RunResult] = []
    paths = [path for path, _ in parts]
    for number, (path, record) in enumerate(parts):
        if difference := next(_differences(first, record), None):
            raise ResultsError(
                f"{name}: {difference} differs between {first_path} and {path}; such files cannot "
                "be merged. Look at each alone, or give the environment another name."
            )
        for run in record["runs"]:
            _check_against(name, run, path, runs, paths)
            runs.append(RunResult(run["label"], run["seed"], number, run))
    return Results(
        name,
        {split: tuple(ids) for split, ids in first["tasks"].items()},
        {split: tuple(types) for split, types in first.get("task_types", {}).items()},
        tuple({key: record[key] for key in record if key != "runs"} for _, record in parts),
        tuple(runs),
    )


def _check_against(
    name: str,
    run: Mapping[str, Any],
    path: Path,
    others: Sequence[RunResult],
    paths: Sequence[Path],
) -> None:
    """Refuse a run that is there already, and one whose label had other settings."""
    for other in others:
        if other.label != run["label"]:
            continue
        if other.record == run:
            raise ResultsError(
                f"{name}: {other.label}, seed {other.seed} of {path} is in {paths[other.part]} "
                "too; give each run once."
            )
        found = _setting_differences(run, other.record, ("algorithm", "train"))
        if difference := next(found, None):
            raise ResultsError(
                f"{name}: the runs {other.label!r} of {paths[other.part]} and {path} differ in "
                f"{difference}; one label must mean one thing."
            )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Yield what keeps two parts apart."""
    if a["tasks"] != b["tasks"]:
        yield "the list of tasks"
    hashes = [(record.get("data") or {}).get("hash") for record in (a, b)]
    if None not in hashes and hashes[0] != hashes[1]:
        yield "the hash of the training data"
    yield from _setting_differences(a, b, ("env", "model"))


def _setting_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], sections: Sequence[str]
) -> Iterator[str]:
    """Yield the settings that both have with different values."""
    for section in sections:
        old, new = a.get(section) or {}, b.get(section) or {}
        for key in (key for key in old if key in new and key not in _FREE[section]):
            if _comparable(key, old[key]) != _comparable(key, new[key]):
                yield f"{section}.{key} ({old[key]!r} and {new[key]!r})"


def _comparable(key: str, value: Any) -> Any:
    """A setting as it is compared: a model may lie in another folder, or behind another URL."""
    if key not in ("student", "teacher") or not isinstance(value, str):
        return value
    return "a server" if is_url(value) else value.rstrip("/").rpartition("/")[2]
