"""Name the files of a run folder, and write those that are written once: config, manifest, summary.

Files of a run folder, all UTF-8 JSON or JSON lines:

    config.json         the resolved settings (`write_config`)
    manifest.json       the run: data and its hash, seeds, versions (`write_manifest`)
    metrics.jsonl       one object per step (`MetricsWriter.write`)
    evaluations.jsonl   one `Evaluation` per evaluated model, split and step
    trajectories.jsonl  a few trajectories for people: rows as in `rows`, without tokens
    summary.json        totals at the end: steps, minutes (wall time, over all parts of a resumed
                        run), tokens (sampled), trajectories, best_step, finished
    tensorboard/        the numbers of metrics.jsonl and of evaluations as events
    wandb/              the same, in the format of Weights & Biases; with --log wandb only
    checkpoints/        one safetensors file per checkpoint
"""

from __future__ import annotations

import math
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any, get_type_hints

from atod_train.config import SECTIONS, RunConfig, is_url
from atod_train.files import FileError, read_json, without_infinities, write_json

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
ANOTHER_FOLDER = "choose another folder (--out)"
PACKAGES = ("atod-gym", "torch", "transformers", "tokenizers", "safetensors", "gymnasium", "numpy")

FREE_SETTINGS = {
    "eval_every", "save_every", "device", "tokens_per_microbatch", "gradient_checkpointing",
}  # fmt: skip
"""Settings that a step does not depend on, except for rounding: evaluation and saving of the
student, devices, and settings that only affect memory or time."""


class RunFolderError(FileError):
    """A file of a run folder is damaged, absent, or was written out of order."""


class OtherSettingsError(RunFolderError):
    """A run folder contains a run with settings other than the requested ones."""


# -- settings -------------------------------------------------------------------------------------


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved settings as config.json."""
    write_json(run_dir / CONFIG_FILE, asdict(config))


def read_config(run_dir: Path) -> RunConfig:
    """Read config.json.

    Raises:
        RunFolderError: it is absent, or has settings that are unknown in this version.
        FileError: it cannot be read.
    """
    path = run_dir / CONFIG_FILE
    try:
        return config_from_json(read_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is not a config of this version: {error}") from error


def config_from_json(record: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a JSON object.

    Raises:
        KeyError, TypeError, AttributeError: a section is missing, or a setting is not of this
            version.
    """

    def plain(value: Any) -> Any:  # JSON has neither tuples nor infinity
        if not isinstance(value, list):
            return value
        return tuple(math.inf if item is None else item for item in value)

    sections = {
        name: section(**{key: plain(value) for key, value in record[name].items()})
        for name, section in get_type_hints(RunConfig).items()
    }
    return RunConfig(**sections)


def check_same_settings(run_dir: Path, config: RunConfig) -> None:
    """Refuse to continue, or to count, a run with other settings.

    Raises:
        OtherSettingsError: a setting differs that is neither free nor the number of steps.
        FileError: config.json cannot be read.
    """
    if difference := first_difference(read_config(run_dir), config):
        name, old, new = difference
        raise OtherSettingsError(
            f"{run_dir} was run with {name}={old!r}, not {new!r}; continue it with the same "
            f"settings, or {ANOTHER_FOLDER}"
        )


def first_difference(
    saved: RunConfig, wanted: RunConfig, sections: Sequence[str] = SECTIONS
) -> tuple[str, Any, Any] | None:
    """Return the first different setting on which a run depends, and both values."""
    free = FREE_SETTINGS | {"steps"}
    if is_url(saved.model.teacher) and is_url(wanted.model.teacher):
        free |= {"teacher"}  # its server may have moved
    if saved.model.sampler.partition(":")[0] == wanted.model.sampler.partition(":")[0]:
        free |= {"sampler"}  # its share of memory may change
    # In the form of JSON: without infinity, and None for a value that is not finite.
    old, new = (without_infinities(asdict(settings)) for settings in (saved, wanted))
    return next(setting_differences(old, new, sections, free), None)


def setting_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], sections: Sequence[str], free: AbstractSet[str]
) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and both values of each different setting that two JSON objects have.

    They contain settings by section and name; those with a name in `free` may differ.
    """
    for section in sections:
        a, b = old.get(section) or {}, new.get(section) or {}
        for name in b:
            if name in a and name not in free and a[name] != b[name]:
                yield f"{section}.{name}", a[name], b[name]


# -- manifest and summary -------------------------------------------------------------------------


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return installed versions; "absent" if a package is not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = package_metadata.version(name)
        except package_metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def without_passwords(words: Sequence[str]) -> list[str]:
    """Return a command line without user names and passwords in its URLs."""
    return [re.sub(r"(://)[^/\s\"']*@", r"\1", word) for word in words]


def write_manifest(
    run_dir: Path, beginning: Mapping[str, Any], device: str = "cpu", processes: int = 1
) -> None:
    """Write manifest.json: the run, and the time, command line and versions.

    An existing manifest is kept, and the resuming is added to its
    list `resumed`, with the time, command line, versions and devices of the resuming program.

    Args:
        run_dir: the run folder.
        beginning: of a new run: `run_id` (unique), `method` (or another name of the
            run), `env_id`, `data` (its name and the hash of the task manifest), `seeds`,
            `parameters` (number of weights of student and teacher; None: no teacher),
            `inputs` (see `training.inputs`).
        device: such as `cpu` or the name of the GPU.
        processes: number of processes that train together.
    """
    now = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": without_passwords(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "processes": processes,
        "packages": package_versions(),
    }
    manifest = read_json(run_dir / MANIFEST_FILE)
    if manifest:
        manifest.setdefault("resumed", []).append(now)
    else:
        manifest = {**beginning, **now}
    write_json(run_dir / MANIFEST_FILE, manifest)


def is_finished(run_dir: Path, config: RunConfig) -> bool:
    """Return whether a run has all requested steps; one with fewer can be continued.

    Raises:
        OtherSettingsError: it has ended, with more steps or other settings.
        RunFolderError: a file is damaged.
    """
    summary = read_json(run_dir / SUMMARY_FILE)
    if not summary.get("finished"):
        return False
    check_same_settings(run_dir, config)
    done, wanted = summary.get("steps"), config.train.steps
    if not isinstance(done, int):
        raise RunFolderError(
            f"{run_dir / SUMMARY_FILE} does not contain the number of steps; remove or repair it"
        )
    if done > wanted:
        raise OtherSettingsError(
            f"{run_dir} has {done} steps, more than train.steps={wanted}; use "
            f"--train.steps {done}, or {ANOTHER_FOLDER}"
        )
    return done == wanted
