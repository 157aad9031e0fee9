"""Define studies, their TOML files, and the settings that are stored in their folders.

A study file has the settings of `atod-train <preset>` by their names on the command line:

    seeds = [0, 1, 2]
    jobs = 2
    log = ["tensorboard", "wandb"]    # tensorboard alone where it is not given

    [environments.houses]             # start, teacher and tasks are its own
    preset = "houses-tiny"
    "train.steps" = 60

    [runs.atod]                       # a line of the tables
    [runs.opd]
    "algorithm.method" = "opd"
    [runs.adaptive]
    "algorithm.schedule" = "adaptive"

Runs may change only `algorithm.*` and `train.*`, so that start, teacher and tasks are the same for
all of them; `seeds` sets `train.seed`.

The run `opd` with seed 1 is in the folder `opd-seed1` of the study. If the file has several
environments, each has a folder in that of the study. `study.json` has the settings of all runs, so
that runs that have not begun can be continued, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from atod_gym.errors import InvalidSettingError
from atod_train.config import Method, OptionValue, RunConfig
from atod_train.files import FileError, read_json, write_json
from atod_train.presets import PRESETS, completed, without_tables
from atod_train.reports.results import FOLDER_NAME, REFERENCES
from atod_train.reports.run_folder import (
    ANOTHER_FOLDER,
    CONFIG_FILE,
    OtherSettingsError,
    config_from_json,
    first_difference,
)
from atod_train.training.loggers import LoggerName, LogTo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STUDY_FILE = "study.json"
_KEYS = {"seeds", "jobs", "log", "environments", "runs"}


@dataclass(frozen=True)
class Run:
    """One run of a study."""

    label: str
    """Its name in tables; runs that differ only in their seed share it."""
    config: RunConfig
    folder: Path

    @property
    def is_begun(self) -> bool:
        """Whether the folder contains the run."""
        return (self.folder / CONFIG_FILE).is_file()


@dataclass(frozen=True)
class StudyPart:
    """The runs on one environment: they share the start, the teacher and the tasks."""

    name: str
    folder: Path
    runs: tuple[Run, ...]
    settings: Mapping[str, RunConfig]
    """Settings of all labels, selected or not; each run has its own seed."""

    @property
    def config(self) -> RunConfig:
        """Settings that all runs share; start and teacher are evaluated once."""
        return next(iter(self.settings.values())).with_seed(0)


@dataclass(frozen=True)
class Study:
    """Runs, the number of runs at the same time, and the loggers of their numbers.

    Raises:
        InvalidSettingError: jobs is less than 1.
    """

    parts: tuple[StudyPart, ...]
    jobs: int = 1
    log: tuple[LoggerName, ...] = LogTo().loggers

    def __post_init__(self) -> None:
        if type(self.jobs) is not int or self.jobs < 1:
            raise InvalidSettingError(f"jobs must be a whole number >= 1, not {self.jobs!r}.")

    @property
    def runs(self) -> list[Run]:
        """The runs of all environments."""
        return [run for part in self.parts for run in part.runs]


@dataclass(frozen=True)
class StudySelection:
    """The part of a study to make, and how; None: as in the file."""

    seeds: tuple[int, ...] | None = None
    """Seeds of each run, instead of those of the file."""
    environments: tuple[str, ...] | None = None
    """Environments of the file to use, instead of all."""
    runs: tuple[str, ...] | None = None
    """Runs of the file to make, instead of all."""
    jobs: int | None = None
    """Number of runs at the same time, each in its own process, instead of that of the file."""
    log: tuple[LoggerName, ...] | None = None
    """Loggers of the runs' numbers, instead of those of the file."""


def study_of(
    config: RunConfig,
    out: Path,
    methods: Sequence[Method] = (),
    seeds: Sequence[int] = (),
    *,
    name: str = "run",
    jobs: int = 1,
    log: tuple[LoggerName, ...] = LogTo().loggers,
) -> Study:
    """Return the study of some methods with some seeds; none: those of the settings.

    `name` is the name of its environment in the results.
    """
    settings: dict[str, RunConfig] = {
        method: replace(config, algorithm=replace(config.algorithm, method=method))
        for method in methods or [config.algorithm.method]
    }
    part = _part(name, out, settings, seeds or [config.train.seed], settings)
    return Study((part,), jobs, log)


def _part(
    name: str,
    folder: Path,
    settings: Mapping[str, RunConfig],
    seeds: Sequence[int],
    labels: Iterable[str],
) -> StudyPart:
    if len(set(seeds)) != len(seeds):
        raise InvalidSettingError("seeds has a number twice.")
    # By seeds, so that a study that is stopped early has all rows of its table.
    runs = [
        Run(label, settings[label].with_seed(seed), folder / f"{label}-seed{seed}")
        for seed in seeds
        for label in labels
    ]
    return StudyPart(name, folder, tuple(runs), settings)


# -- study files -----------------------------------------------------------------------------------


def read_study(path: Path, out: Path, selection: StudySelection | None = None) -> Study:
    """Read a study file for the folder `out`, or the selected part of it.

    Returns:
        A part for every environment of the file; one that is not selected has no runs.

    Raises:
        InvalidSettingError: the file cannot be read or is invalid; the message names the entry.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidSettingError(f"Cannot read the study {path}: {error}.") from error
    try:
        return _study(content, out, selection or StudySelection())
    except InvalidSettingError as error:
        raise InvalidSettingError(f"{path}: {error}") from error


def _study(content: Mapping[str, Any], out: Path, selection: StudySelection) -> Study:
    if unknown := sorted(set(content) - _KEYS):
        raise InvalidSettingError(f"unknown key {unknown[0]!r}; known: {', '.join(sorted(_KEYS))}.")
    seeds = content.get("seeds", [0]) if selection.seeds is None else list(selection.seeds)
    jobs = content.get("jobs", 1) if selection.jobs is None else selection.jobs
    log = content.get("log", LogTo().loggers) if selection.log is None else selection.log
    if not (isinstance(seeds, list) and seeds and all(type(seed) is int for seed in seeds)):
        raise InvalidSettingError("seeds must be a list of whole numbers, such as [0, 1, 2].")
    if not isinstance(log, list | tuple):
        raise InvalidSettingError('log must be a list of loggers, such as ["wandb"].')
    environments, runs = (_tables(content, name) for name in ("environments", "runs"))
    chosen = _chosen("environment", selection.environments, environments)
    labels = _chosen("run", selection.runs, runs)
    parts = []
    for name, settings in environments.items():
        where = f"environments.{name}"
        changes = dict(settings)
        preset = changes.pop("preset", "")
        if preset not in PRESETS:
            raise InvalidSettingError(
                f"{where}: preset must be one of {', '.join(PRESETS)}, not {preset!r}."
            )
        shared = _changed(PRESETS[preset].config, changes, where)
        configs = {
            label: _changed(shared, changes, f"{where}, runs.{label}", ("env", "model", "start"))
            for label, changes in runs.items()
        }
        folder = out / name if len(environments) > 1 else out
        parts.append(_part(name, folder, configs, seeds, labels if name in chosen else ()))
    return Study(tuple(parts), jobs, tuple(log))


def _chosen(kind: str, names: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """Return the chosen names in the order of the file; all of them without a choice."""
    for name in names or ():
        if name not in known:
            raise InvalidSettingError(f"unknown {kind} {name!r}; known: {', '.join(known)}.")
    return [name for name in known if names is None or name in names]


def _tables(content: Mapping[str, Any], key: str) -> dict[str, dict[str, Any]]:
    tables = content.get(key)
    if not isinstance(tables, dict) or not tables:
        raise InvalidSettingError(f"the table [{key}.NAME] is missing; at least one is needed.")
    for name, settings in tables.items():
        if not isinstance(settings, dict):
            raise InvalidSettingError(f"{key}.{name} must be a table: [{key}.{name}].")
        if not FOLDER_NAME.fullmatch(name):
            raise InvalidSettingError(f"{key}: {name!r} cannot be the name of a folder.")
        if key == "runs" and name in REFERENCES:
            raise InvalidSettingError(
                f"{name!r} cannot be the name of a run: tables have a row of that name already."
            )
    return tables


def _changed(
    default: RunConfig, changes: Mapping[str, Any], where: str, closed: Sequence[str] = ()
) -> RunConfig:
    """Return settings with the changes of a table, parsed by tyro like a command line.

    Sections that are `closed` cannot be changed; `where` is the table.
    """
    words = []
    tables: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        section, dot, name = key.partition(".")
        if not dot:
            raise InvalidSettingError(
                f'{where}: {key!r} is not a setting; write it as "train.steps" = 60, with quotes.'
            )
        if key == "train.seed":
            raise InvalidSettingError(
                f"{where}: 'train.seed' cannot be set here; write seeds = [{value}] at the top."
            )
        if section in closed:
            raise InvalidSettingError(f"{where}: {key!r} cannot be set here.")
        if isinstance(value, dict):  # the values of TOML have types
            table = name.replace("-", "_")
            if (section, table) not in (("env", "options"), ("env", "template_options")):
                raise InvalidSettingError(f"{where}: {key!r} is not a table, as {value!r} is.")
            for option, chosen in value.items():
                if not isinstance(chosen, OptionValue):
                    raise InvalidSettingError(
                        f"{where}: {option} of {key!r} must be a text, a number, true or false, "
                        f"not {chosen!r}."
                    )
            tables[table] = value
            continue
        no = "no-" if value is False else ""
        words.append(f"--{section}.{no}{name}".replace("_", "-"))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    try:
        config = tyro.cli(
            RunConfig, default=without_tables(default), args=words, prog="atod-train study"
        )
    except SystemExit:
        raise InvalidSettingError(f"{where}: invalid setting, see the message above.") from None
    config = completed(config, default, words)
    merged = {name: getattr(config.env, name) | table for name, table in tables.items()}
    return replace(config, env=replace(config.env, **merged))


# -- settings in the folder ------------------------------------------------------------------------


def keep_study(study: Study, out: Path) -> Study:
    """Add a study's runs to those of its folder.

    Returns:
        All runs of the folder.

    Raises:
        OtherSettingsError: the folder contains runs with another start, teacher or other tasks.
    """
    shared = {part.name: part.config for part in study.parts}
    parts = []
    for part in read_kept_study(out)[0].parts if (out / STUDY_FILE).is_file() else ():
        alike = [run for run in part.runs if _is_alike(run, shared.get(part.name, run.config))]
        parts.append(replace(part, runs=tuple(alike)))
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
    write_json(out / STUDY_FILE, {"jobs": study.jobs, "log": study.log, "runs": runs_of_all})
    return Study(merged, study.jobs, study.log)


def _is_alike(run: Run, config: RunConfig) -> bool:
    """Return whether a run has the start, teacher and tasks of others; refuse a begun run."""
    difference = first_difference(run.config, config, ("env", "model", "start"))
    if difference and run.is_begun:
        name, old, new = difference
        raise OtherSettingsError(
            f"{run.folder} was run with {name}={old!r}, not {new!r}, and runs of one "
            f"folder share start, teacher and tasks; {ANOTHER_FOLDER}"
        )
    return not difference


def read_kept_study(folder: Path) -> tuple[Study, Path]:
    """Return the study of a folder or of a run's folder, and the study's folder.

    Raises:
        FileError: there is no study, or study.json is damaged.
    """
    folders = (folder, *folder.absolute().parents[:2])
    out = next((found for found in folders if (found / STUDY_FILE).is_file()), None)
    if out is None:
        raise FileError(f"{folder} is not the folder of a study: it has no {STUDY_FILE}.")
    record = read_json(out / STUDY_FILE)
    try:
        parts = []
        for entry in record["runs"]:
            config = config_from_json(entry["config"])
            run = Run(entry["label"], config, out / entry["folder"])
            settings = {run.label: config}
            parts.append(StudyPart(entry["environment"], run.folder.parent, (run,), settings))
        log = tuple(record.get("log", LogTo().loggers))
        return Study(_merged(parts), int(record["jobs"]), log), out
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{out / STUDY_FILE} is not of this version ({error}).") from error


def _merged(parts: Iterable[StudyPart]) -> tuple[StudyPart, ...]:
    """Return one part for each environment; later settings of a run replace earlier ones."""
    merged: dict[str, StudyPart] = {}
    for part in parts:
        old = merged.get(part.name, replace(part, runs=(), settings={}))
        runs = {run.folder: run for run in (*old.runs, *part.runs)}
        settings = {**old.settings, **part.settings}
        merged[part.name] = replace(part, runs=tuple(runs.values()), settings=settings)
    return tuple(merged.values())
