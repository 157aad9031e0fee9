"""Studies from one small file: named runs, each with several seeds, on one or more environments.

TOML, with the settings of `atod-train <preset>` by their names on the command line:

    seeds = [0, 1, 2]
    jobs = 2

    [environments.houses]             # a folder of the study; start, teacher and tasks are its own
    preset = "quickstart"
    "train.steps" = 60

    [runs.atod]                       # a line of the tables
    [runs.opd]
    "algorithm.method" = "opd"
    [runs.adaptive]
    "algorithm.shape" = "adaptive"

Runs may change `algorithm.*` and `train.*` alone, so that start, teacher and tasks are the same for
all of them; `train.seed` is for `seeds` to decide. Every step is saved unless `train.save_every`
says otherwise: a study that is killed loses no more than the step under way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from atod_gym.errors import InvalidSettingError
from atod_train.config import RunConfig
from atod_train.presets import PRESETS
from atod_train.reports.results import FOLDER_NAME, REFERENCES
from atod_train.studies.study import Run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ParseArguments = Callable[[list[str]], RunConfig]
"""Reads a command line that begins with a preset."""

_KEYS = {"seeds", "jobs", "environments", "runs"}


@dataclass(frozen=True)
class Selection:
    """Which part of a study is made, and how; None: what the file says."""

    seeds: Sequence[int] | None = None
    environments: Sequence[str] | None = None
    runs: Sequence[str] | None = None
    jobs: int | None = None
    """How many runs at the same time."""


@dataclass(frozen=True)
class StudyPart:
    """The runs on one environment."""

    name: str
    runs: tuple[Run, ...]
    """The selected ones; none where the environment is not selected."""
    folder: Path
    settings: Mapping[str, RunConfig]
    """Of all runs of the file, selected or not, by their labels; each run has a seed of its own."""

    @property
    def config(self) -> RunConfig:
        """What all runs share; it does not depend on the selection."""
        return next(iter(self.settings.values()))


def read_study(
    path: Path, out: Path, parse: ParseArguments, selection: Selection | None = None
) -> tuple[StudyPart, ...]:
    """Reads a study file.

    Args:
        path: the file.
        out: folder of the study; each environment has a folder in it.
        parse: reads settings as the command line has them.
        selection: makes a part of the study only.

    Returns:
        A part for every environment of the file.

    Raises:
        InvalidSettingError: the file cannot be read, or something in it has no meaning; says what.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettingError(f"Cannot read the study {path}: {error}.") from error
    try:
        return tuple(_parts(content, out, parse, selection or Selection()))
    except InvalidSettingError as error:
        raise InvalidSettingError(f"{path}: {error}") from error


def _parts(
    content: Mapping[str, Any], out: Path, parse: ParseArguments, selection: Selection
) -> list[StudyPart]:
    if unknown := sorted(set(content) - _KEYS):
        raise InvalidSettingError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}.")
    seeds, jobs = content.get("seeds", [0]), content.get("jobs", 1)
    if selection.seeds is not None:
        seeds = list(selection.seeds)
    if selection.jobs is not None:
        jobs = selection.jobs
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise InvalidSettingError("seeds must be a list of whole numbers, such as [0, 1, 2].")
    if len(set(seeds)) != len(seeds):
        raise InvalidSettingError("seeds has a number twice.")
    if type(jobs) is not int or jobs < 1:
        raise InvalidSettingError(f"jobs must be a whole number >= 1, not {jobs!r}.")
    environments, runs = (_tables(content, name) for name in ("environments", "runs"))
    chosen = _chosen("environment", selection.environments, environments)
    labels = _chosen("run", selection.runs, runs)
    return [
        _part(
            name, settings, runs, labels if name in chosen else (), seeds, jobs, out / name, parse
        )
        for name, settings in environments.items()
    ]


def _chosen(kind: str, names: Sequence[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    """The chosen ones in the order of the file; all of them if there was no choice."""
    for name in names or ():
        if name not in known:
            raise InvalidSettingError(f"there is no {kind} {name!r}; known: {', '.join(known)}.")
    return tuple(name for name in known if names is None or name in names)


def _tables(content: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    tables = content.get(key)
    if not isinstance(tables, dict) or not tables:
        raise InvalidSettingError(f"there is no table [{key}.NAME]; at least one is needed.")
    for name, settings in tables.items():
        if not isinstance(settings, dict):
            raise InvalidSettingError(f"{key}.{name} must be a table: [{key}.{name}].")
        if not FOLDER_NAME.fullmatch(name):
            raise InvalidSettingError(f"{key}: {name!r} cannot be the name of a folder.")
        if key == "runs" and name in REFERENCES:
            raise InvalidSettingError(
                f"a run cannot be called {name!r}: tables have a line of that name already."
            )
    return tables


def _part(
    name: str,
    settings: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]],
    selected: Sequence[str],
    seeds: list[int],
    jobs: int,
    folder: Path,
    parse: ParseArguments,
) -> StudyPart:
    shared = dict(settings)
    preset = shared.pop("preset", None)
    if preset not in PRESETS:
        known = ", ".join(PRESETS)
        raise InvalidSettingError(f"environments.{name}: preset must be one of {known}.")
    base = [preset, *_arguments(shared, f"environments.{name}", ("study",))]
    configs = {}
    for label, changes in runs.items():
        own = _arguments(changes, f"runs.{label}", ("env", "model", "start", "study"))
        try:
            config = parse([*base, *own])
        except SystemExit:
            raise InvalidSettingError(
                f"environments.{name}, runs.{label}: what is said above is wrong with a setting."
            ) from None
        named = replace(config.study, label=label, resume=True, jobs=jobs, methods=(), seeds=())
        configs[label] = replace(config, study=named)
    # By seeds, so that a study that is stopped early has all lines of its table.
    made = tuple(
        Run(
            configs[label].with_seed(seed),
            folder / f"{label}-seed{seed}",
        )
        for seed in seeds
        for label in selected
    )
    return StudyPart(name, made, folder, configs)


def _arguments(settings: Mapping[str, Any], where: str, closed: tuple[str, ...]) -> list[str]:
    """Settings as a command line has them."""
    arguments = []
    for key, value in settings.items():
        section, dot, name = key.partition(".")
        if isinstance(value, dict):  # { topk = 1 } is given as topk 1
            value = [part for pair in value.items() for part in pair]
        if not dot:
            raise InvalidSettingError(
                f'{where}: {key!r} is no setting; write it as "train.steps" = 60, with quotes.'
            )
        if key == "train.seed":
            raise InvalidSettingError(
                f"{where}: 'train.seed' cannot be set here; write seeds = [{value}] at the top."
            )
        if section in closed:
            raise InvalidSettingError(f"{where}: {key!r} cannot be set here.")
        flag = f"--{section}.{name}".replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else f"--{section}.no-{name}".replace("_", "-"))
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [flag, *map(str, values)]
    return arguments
