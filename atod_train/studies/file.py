"""Studies: what they are, their TOML files, and the settings that are kept in their folders.

A study file has the settings of `atod-train <preset>` by their names on the command line:

    seeds = [0, 1, 2]
    jobs = 2

    [environments.houses]             # start, teacher and tasks are its own
    preset = "houses-tiny"
    "train.steps" = 60

    [runs.atod]                       # a line of the tables
    [runs.opd]
    "algorithm.method" = "opd"
    [runs.adaptive]
    "algorithm.shape" = "adaptive"

Runs may change `algorithm.*` and `train.*` alone, so that start, teacher and tasks are the same for
all of them; `train.seed` is for `seeds` to decide.

The run `opd` with seed 1 lies in the folder `opd-seed1` of the study. Where the file has several
environments, each has a folder in that of the study. `study.json` has the settings of all runs, so
that those which have not begun continue too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from atod_gym.errors import InvalidSettingError
from atod_train.config import RunConfig
from atod_train.files import FileError, read_json, write_json
from atod_train.presets import PRESETS, keep_loaded_models, parse_settings
from atod_train.reports.results import FOLDER_NAME, REFERENCES
from atod_train.reports.run_folder import (
    ANOTHER_FOLDER,
    CONFIG_FILE,
    OtherSettingsError,
    config_from_json,
    first_difference,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUICKSTART = Path(__file__).with_name("quickstart.toml")
STUDY_FILE = "study.json"
_KEYS = {"seeds", "jobs", "environments", "runs"}


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    label: str
    """Its name in tables; runs that differ only in their seed share it."""
    config: RunConfig
    folder: Path

    @property
    def is_begun(self) -> bool:
        """Whether the folder holds the run."""
        return (self.folder / CONFIG_FILE).is_file()


@dataclass(frozen=True)
class StudyPart:
    """The runs on one environment: they share the start, the teacher and the tasks."""

    name: str
    folder: Path
    runs: tuple[Run, ...]
    settings: Mapping[str, RunConfig]
    """Of all labels, whether their runs are selected or not; each run has a seed of its own."""

    @property
    def config(self) -> RunConfig:
        """Settings that all runs share; start and teacher are evaluated once."""
        return next(iter(self.settings.values())).with_seed(0)


@dataclass(frozen=True)
class Study:
    """Runs, and how many of them are made at the same time."""

    parts: tuple[StudyPart, ...]
    jobs: int = 1

    @property
    def runs(self) -> list[Run]:
        """The runs of all environments."""
        return [run for part in self.parts for run in part.runs]


@dataclass(frozen=True)
class Selection:
    """Which part of a study is made, and how; None: what the file says."""

    seeds: Sequence[int] | None = None
    environments: Sequence[str] | None = None
    runs: Sequence[str] | None = None
    jobs: int | None = None
    """Number of runs at the same time."""


def study_of(config: RunConfig, out: Path, *, name: str = "run", label: str = "") -> Study:
    """Return the study of one run.

    Args:
        config: its settings.
        out: folder of the study.
        name: of its environment in the results.
        label: of the run; empty: its method.
    """
    label = label or config.algorithm.method
    run = Run(label, config, out / f"{label}-seed{config.train.seed}")
    return Study((StudyPart(name, out, (run,), {label: config}),))


def read_study(
    path: Path, out: Path, selection: Selection | None = None, base: RunConfig | None = None
) -> Study:
    """Read a study file.

    Args:
        path: the file.
        out: folder of the study.
        selection: makes a part of the study only.
        base: settings of the environment, in place of those of the file.

    Returns:
        A part for every environment of the file; one that is not selected has no runs.

    Raises:
        InvalidSettingError: the file cannot be read, or something in it has no meaning; says what.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettingError(f"Cannot read the study {path}: {error}.") from error
    try:
        return _study(content, out, selection or Selection(), base)
    except InvalidSettingError as error:
        raise InvalidSettingError(f"{path}: {error}") from error


def _study(
    content: Mapping[str, Any], out: Path, selection: Selection, base: RunConfig | None
) -> Study:
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
    parts = []
    for name, settings in environments.items():
        folder = out / name if len(environments) > 1 else out
        shared = _shared(name, settings) if base is None else base
        configs = {
            label: _changed(
                shared,
                f"environments.{name}, runs.{label}",
                _arguments(changes, f"runs.{label}", ("env", "model", "start")),
            )
            for label, changes in runs.items()
        }
        # By seeds, so that a study that is stopped early has all lines of its table.
        made = tuple(
            Run(label, configs[label].with_seed(seed), folder / f"{label}-seed{seed}")
            for seed in seeds
            for label in (labels if name in chosen else ())
        )
        parts.append(StudyPart(name, folder, made, configs))
    return Study(tuple(parts), jobs)


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


def _shared(name: str, settings: Mapping[str, Any]) -> RunConfig:
    """Return the settings of an environment's table."""
    shared = dict(settings)
    preset = shared.pop("preset", None)
    if preset not in PRESETS:
        raise InvalidSettingError(
            f"environments.{name}: preset must be one of {', '.join(PRESETS)}, not {preset!r}."
        )
    arguments = _arguments(shared, f"environments.{name}", ())
    config = _changed(PRESETS[preset].config, f"environments.{name}", arguments)
    return config if "--start.epochs" in arguments else keep_loaded_models(config)


def _changed(config: RunConfig, where: str, arguments: list[str]) -> RunConfig:
    try:
        return parse_settings(config, arguments, "atod-train study")
    except SystemExit:
        raise InvalidSettingError(f"{where}: invalid setting, see the message above.") from None


def _arguments(settings: Mapping[str, Any], where: str, closed: tuple[str, ...]) -> list[str]:
    """Return settings as a command line has them."""
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


# -- settings that are kept in the folder ----------------------------------------------------------


def keep_study(study: Study, out: Path) -> Study:
    """Add a study's runs to those of its folder.

    Returns:
        All runs of the folder.

    Raises:
        OtherSettingsError: the folder holds runs with another start, teacher or other tasks.
    """
    kept = read_kept_study(out)[0] if (out / STUDY_FILE).is_file() else Study(())
    wanted = {part.name: part for part in study.parts}
    parts = []
    for part in kept.parts:
        shared = wanted.get(part.name)
        runs = []
        for run in part.runs:
            difference = shared and first_difference(
                run.config, shared.config, ("env", "model", "start")
            )
            if not difference:
                runs.append(run)
            elif run.is_begun:
                name, old, new = difference
                raise OtherSettingsError(
                    f"{run.folder} was run with {name}={old!r}, not {new!r}, and runs of one "
                    f"folder share start, teacher and tasks; {ANOTHER_FOLDER}"
                )
        parts.append(replace(part, runs=tuple(runs)))
    merged = _merged([*parts, *study.parts])
    runs_of_all = [
        {
            "environment": part.name,
            "folder": run.folder.relative_to(out).as_posix(),
            "label": run.label,
            "config": asdict(run.config),
        }
        for part in merged
        for run in part.runs
    ]
    write_json(out / STUDY_FILE, {"jobs": study.jobs, "runs": runs_of_all})
    return Study(merged, study.jobs)


def read_kept_study(folder: Path) -> tuple[Study, Path]:
    """Return the study that has a folder, or whose run has it, and the study's folder.

    Raises:
        FileError: there is no study; or study.json is broken.
    """
    out = next((f for f in (folder, *folder.parents[:2]) if (f / STUDY_FILE).is_file()), None)
    if out is None:
        raise FileError(f"{folder} is no folder of a study: it has no {STUDY_FILE}.")
    record = read_json(out / STUDY_FILE)
    try:
        parts = [
            _part_of(
                entry["environment"],
                Run(entry["label"], config_from_json(entry["config"]), out / entry["folder"]),
            )
            for entry in record["runs"]
        ]
        return Study(_merged(parts), int(record["jobs"])), out
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{out / STUDY_FILE} is not of this version ({error}).") from error


def _part_of(name: str, run: Run) -> StudyPart:
    return StudyPart(name, run.folder.parent, (run,), {run.label: run.config})


def _merged(parts: Iterable[StudyPart]) -> tuple[StudyPart, ...]:
    """Return one part for each environment; later settings of a run take the place of earlier."""
    merged: dict[str, StudyPart] = {}
    for part in parts:
        old = merged.get(part.name, replace(part, runs=(), settings={}))
        runs = {run.folder: run for run in (*old.runs, *part.runs)}
        settings = {**old.settings, **part.settings}
        merged[part.name] = replace(part, runs=tuple(runs.values()), settings=settings)
    return tuple(merged.values())
