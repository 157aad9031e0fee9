"""The folder of a run: its file names, and the files written once - config, manifest, summary.

Files of a run folder, all UTF-8 JSON or JSON lines:

    config.json         the resolved settings (`write_config`)
    manifest.json       what was run on what: data and its hash, seeds, versions (`write_manifest`)
    metrics.jsonl       one object per step (`MetricsWriter.write`)
    evaluations.jsonl   one `Evaluation` per evaluated model, split and step
    trajectories.jsonl  a few whole trajectories for people (`TrajectoryRecord`)
    summary.json        totals at the end (`write_summary`)
    tensorboard/        the numbers of metrics.jsonl as events
    checkpoints/        one safetensors file per checkpoint
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata as package_metadata
from pathlib import Path
from typing import Any

from atod_train.config import (
    SECTIONS,
    AlgorithmConfig,
    EnvConfig,
    ModelConfig,
    RunConfig,
    StartConfig,
    TrainConfig,
    is_url,
)
from atod_train.files import FileError, read_json, without_infinities, write_json

METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
TRAJECTORIES_FILE = "trajectories.jsonl"
CONFIG_FILE = "config.json"
MANIFEST_FILE = "manifest.json"
SUMMARY_FILE = "summary.json"
ANOTHER_FOLDER = "choose another folder (--out)"
PACKAGES = ("atod-gym", "torch", "transformers", "tokenizers", "safetensors", "gymnasium", "numpy")


class RunFolderError(FileError):
    """A file of a run folder is broken, absent, or was written out of order."""


class OtherSettingsError(RunFolderError):
    """A run folder holds a run of other settings than those wanted."""


def write_config(run_dir: Path, config: RunConfig) -> None:
    """Write the resolved settings as config.json."""
    write_json(run_dir / CONFIG_FILE, asdict(config))


def read_config(run_dir: Path) -> RunConfig:
    """Read config.json.

    Raises:
        RunFolderError: it is absent, or has settings that this version does not know.
    """
    path = run_dir / CONFIG_FILE
    try:
        return config_from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{path} is no config of this version: {error}") from error


def config_from_json(record: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a JSON object.

    Raises:
        KeyError, TypeError: a section is missing, or a setting is not of this version.
    """

    def plain(value: Any) -> Any:  # JSON has neither tuples nor infinity
        if not isinstance(value, list):
            return value
        return tuple(math.inf if item is None else item for item in value)

    parts: dict[str, dict[str, Any]] = {
        part: {key: plain(value) for key, value in record[part].items()} for part in SECTIONS
    }
    return RunConfig(
        env=EnvConfig(**parts["env"]),
        model=ModelConfig(**parts["model"]),
        start=StartConfig(**parts["start"]),
        algorithm=AlgorithmConfig(**parts["algorithm"]),
        train=TrainConfig(**parts["train"]),
    )


def check_same_settings(run_dir: Path, config: RunConfig) -> None:
    """Refuse to continue, or to count, a run that was made with other settings.

    What a step does not depend on, but for rounding, may change: the number of steps, when the
    student is evaluated and saved, devices, and what only costs memory or time.

    Raises:
        OtherSettingsError: a setting differs.
        RunFolderError: config.json cannot be read.
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
    """Return the first setting on which a run depends that differs, and both values."""
    free = {"steps", "eval_every", "save_every"}
    free |= {"device", "teacher_device", "tokens_per_microbatch", "gradient_checkpointing"}
    if is_url(saved.model.teacher) and is_url(wanted.model.teacher):
        free |= {"teacher"}  # its server may have moved
    for part in sections:
        # As JSON has them: no infinity, which is none of a value that is not finite.
        old, new = (
            without_infinities(asdict(getattr(settings, part))) for settings in (saved, wanted)
        )
        for name in new:
            if name not in free and old[name] != new[name]:
                return f"{part}.{name}", old[name], new[name]
    return None


def package_versions(names: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Installed versions; "absent" where a package is not installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = package_metadata.version(name)
        except package_metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def write_manifest(
    run_dir: Path,
    *,
    method: str,
    env_id: str,
    data: str,
    data_hash: str,
    seeds: Mapping[str, int],
    student_parameters: int,
    teacher_parameters: int | None = None,
    device: str = "cpu",
    processes: int = 1,
    inputs: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
) -> None:
    """Write manifest.json: method, data, seeds, models and versions.

    A manifest that is there already stays as it is, and the fact of resuming is added to its
    list `resumed`, with the versions and the devices of the resuming program.

    Args:
        run_dir: the run folder.
        method: such as `atod`, or what else the run is called.
        env_id: Gymnasium id.
        data: which data is played: `official`, `generated` or a path.
        data_hash: content hash of the task manifest.
        seeds: name -> seed.
        student_parameters: number of weights of the student.
        teacher_parameters: number of weights of the teacher; None: there is no teacher.
        device: such as `cpu` or the name of the GPU.
        processes: number of processes that train together.
        inputs: of the run that are not settings, see `training.inputs`.
        command: the command line; default: that of this process.
    """
    now = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(sys.argv if command is None else command),
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
        manifest = {
            "method": method,
            "env_id": env_id,
            "data": {"name": data, "hash": data_hash},
            "seeds": dict(seeds),
            "parameters": {"student": student_parameters, "teacher": teacher_parameters},
            "inputs": dict(inputs or {}),
            **now,
        }
    write_json(run_dir / MANIFEST_FILE, manifest)


def write_summary(
    run_dir: Path,
    *,
    steps: int,
    minutes: float,
    tokens: int = 0,
    trajectories: int = 0,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Write summary.json at the end of a run.

    Args:
        run_dir: the run folder.
        steps: steps done in all.
        minutes: wall time over all parts of a resumed run.
        tokens: completion tokens sampled.
        trajectories: episodes played for training.
        extra: further JSON values.
    """
    totals = {"steps": steps, "minutes": minutes, "tokens": tokens, "trajectories": trajectories}
    write_json(run_dir / SUMMARY_FILE, {**totals, **(extra or {})})


def is_finished(run_dir: Path, config: RunConfig) -> bool:
    """Return whether a run has all the steps wanted; one with fewer can be continued.

    Args:
        run_dir: the run folder; it need not exist.
        config: the settings wanted.

    Raises:
        OtherSettingsError: it has ended, with more steps or other settings.
        RunFolderError: a file is broken.
    """
    summary = read_json(run_dir / SUMMARY_FILE)
    if not summary.get("finished"):
        return False
    check_same_settings(run_dir, config)
    done, wanted = summary.get("steps"), config.train.steps
    if not isinstance(done, int):
        raise RunFolderError(
            f"{run_dir / SUMMARY_FILE} does not say how many steps were made; remove or repair it"
        )
    if done > wanted:
        raise OtherSettingsError(
            f"{run_dir} has {done} steps, more than train.steps={wanted}; ask for {done}, or "
            f"{ANOTHER_FOLDER}"
        )
    return done == wanted
