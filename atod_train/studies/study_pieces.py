"""The results files of a study, read and put together: one file for each machine it was made on.

A file is a piece of the study: some seeds, with a start and a teacher that were made and evaluated
on that machine. Pieces with the same environment belong together if they played the same tasks
with the same settings; each (piece, seed) of a label is one replicate.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atod_gym.errors import AtodError
from atod_train.config import is_url
from atod_train.studies.study_results import FOLDER_NAME, MOST_PLAYS, STILL

_EVALUATIONS = ("last", "best")
_RUN_KEYS = ("minutes", "tokens", "episodes", "seconds", *_EVALUATIONS, "course", "metrics")
# What may differ between pieces without a change of what is measured (the best of a run is that of
# the evaluations that it had).
_FREE = {
    "env": {"data", "eval_samples"},
    "model": {"device", "teacher_device"},
    "train": {"seed", "threads", "eval_every", "save_every", "tokens_per_microbatch"},
    "algorithm": set[str](),
}


class ResultsError(AtodError):
    """Files that are no results of a study, or that do not belong together."""


@dataclass(frozen=True)
class StudyRun:
    """A finished run."""

    label: str
    seed: int
    piece: int
    """Number of its piece, from 0."""
    record: Mapping[str, Any]
    """As `study_results` describes it."""


@dataclass(frozen=True)
class StudyEnvironment:
    """All that is known about one environment of a study."""

    name: str
    tasks: Mapping[str, tuple[str, ...]]
    """Split -> its task ids."""
    pieces: tuple[Mapping[str, Any], ...]
    """What the runs of a piece share: start, teacher, data, versions."""
    runs: tuple[StudyRun, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the runs, in order of appearance."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    @property
    def modes(self) -> tuple[str, ...]:
        """How completions were chosen in evaluations, in order of appearance."""
        boards = (board for piece in self.pieces for board in piece["start"])
        return tuple(dict.fromkeys(board.rpartition("/")[2] for board in boards))

    def of(self, label: str) -> tuple[StudyRun, ...]:
        """The runs of a label."""
        return tuple(run for run in self.runs if run.label == label)


def read_results(paths: Sequence[Path]) -> tuple[StudyEnvironment, ...]:
    """Reads results files and puts together what belongs to the same environment.

    Args:
        paths: of files that `atod-train study` wrote.

    Returns:
        The environments in order of appearance.

    Raises:
        ResultsError: a file is no results file; tasks, data or settings of an environment differ
            between files; or a run is there twice.
    """
    pieces: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for path in paths:
        for name, record in _read(path).items():
            pieces.setdefault(name, []).append((path, record))
    return tuple(_merged(name, found) for name, found in pieces.items())


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read: {error}.") from error
    try:
        if not isinstance(content, dict) or not content:
            raise ValueError("no object with environments")
        for name, record in content.items():
            if not FOLDER_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment")
            _check(name, record)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ResultsError(
            f"{path} is no results.json of this version of atod-train study ({error})."
        ) from error
    return content


def _check(name: str, record: Mapping[str, Any]) -> None:
    """Raises one of several errors unless an environment has the form that is written."""
    lengths = {split: len(tasks) for split, tasks in record["tasks"].items()}
    boards = {**record["start"], **record["teacher"]}
    if not record["runs"] or not lengths or not boards:
        raise ValueError(f"{name} has no runs, tasks or evaluations")
    _check_evaluations(record, STILL, lengths)
    seen = set()
    for run in record["runs"]:
        if missing := [key for key in ("label", "seed", *_RUN_KEYS) if key not in run]:
            raise ValueError(f"a run of {name} has no {missing[0]!r}")
        if not (isinstance(run["label"], str) and isinstance(run["seed"], int)):
            raise ValueError(f"a run of {name} has no label and seed")
        if (run["label"], run["seed"]) in seen:
            raise ValueError(f"{name} has {run['label']}, seed {run['seed']} twice")
        seen.add((run["label"], run["seed"]))
        _check_evaluations(run, _EVALUATIONS, lengths)


def _check_evaluations(
    record: Mapping[str, Any], keys: Sequence[str], lengths: Mapping[str, int]
) -> None:
    for key in keys:
        for board, evaluation in record[key].items():
            tasks = lengths[board.rpartition("/")[0]]
            if not evaluation:
                continue
            plays = evaluation.get("plays", 1)
            if plays not in range(1, MOST_PLAYS + 1) or not re.fullmatch(
                rf"[0-{plays:d}]{{{tasks}}}", evaluation["success"]
            ):
                raise ValueError(
                    f"{key} of {board} is not one digit, 0 to {plays}, for each of {tasks} tasks"
                )
            if not isinstance(evaluation.get("score"), int | float):
                raise ValueError(f"{key} of {board} has no score")


def _merged(name: str, pieces: Sequence[tuple[Path, dict[str, Any]]]) -> StudyEnvironment:
    """One environment from its pieces."""
    first_path, first = pieces[0]
    runs: list[StudyRun] = []
    known: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for number, (path, record) in enumerate(pieces):
        if difference := next(_differences(first, record), None):
            raise ResultsError(
                f"{name}: {difference} differs between {first_path} and {path}; such files cannot "
                "be put together. Look at each alone, or give the environment another name."
            )
        for run in record["runs"]:
            _check_alone(name, run, path, known)
            runs.append(StudyRun(run["label"], run["seed"], number, run))
    shared = tuple({key: record[key] for key in record if key != "runs"} for _, record in pieces)
    tasks = {split: tuple(ids) for split, ids in first["tasks"].items()}
    return StudyEnvironment(name, tasks, shared, tuple(runs))


def _check_alone(
    name: str, run: Mapping[str, Any], path: Path, known: dict[str, tuple[Path, Mapping[str, Any]]]
) -> None:
    """Refuses a run that is there already, and one whose label had other settings."""
    label = run["label"]
    fingerprint = json.dumps(run, sort_keys=True)
    if fingerprint in known:
        raise ResultsError(
            f"{name}: {label}, seed {run['seed']} of {path} is in {known[fingerprint][0]} too; "
            "give each run once."
        )
    known[fingerprint] = (path, run)
    for other_path, other in known.values():
        if other["label"] != label:
            continue
        if difference := next(_setting_differences(run, other, ("algorithm", "train")), None):
            raise ResultsError(
                f"{name}: the runs {label!r} of {other_path} and {path} differ in {difference}; "
                "one label must mean one thing."
            )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """What keeps two pieces apart."""
    if a["tasks"] != b["tasks"]:
        yield "the list of tasks"
    hashes = [(record.get("data") or {}).get("hash") for record in (a, b)]
    if None not in hashes and hashes[0] != hashes[1]:
        yield "the hash of the training data"
    yield from _setting_differences(a, b, ("env", "model"))


def _setting_differences(
    a: Mapping[str, Any], b: Mapping[str, Any], sections: Sequence[str]
) -> Iterator[str]:
    """The settings that both have with different values."""
    for section in sections:
        old, new = a.get(section) or {}, b.get(section) or {}
        for key in old:
            if key not in new or key in _FREE[section]:
                continue
            if _plain(key, old[key]) != _plain(key, new[key]):
                yield f"{section}.{key} ({old[key]!r} and {new[key]!r})"


def _plain(key: str, value: Any) -> Any:
    """A setting as it is compared: a model may lie in another folder, or behind another URL."""
    if key not in ("student", "teacher") or not isinstance(value, str):
        return value
    return "a server" if is_url(value) else value.rstrip("/").rpartition("/")[2]
