"""Checkpoints: a folder with one safetensors file and one JSON file, never pickle.

A save writes the tensors beside whatever the folder holds, forces them to disk, and then puts
`checkpoint.json` in place with one atomic rename. That rename is the moment at which the
checkpoint exists: a process killed earlier leaves the previous checkpoint whole, and a folder
without `checkpoint.json` is no checkpoint. The JSON names the tensors file and its sha256.

    run/checkpoints/step-000020/checkpoint.json
    run/checkpoints/step-000020/tensors-<first 16 hex digits of its sha256>.safetensors
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from atod_gym.errors import AtodError

MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
RNG_PREFIX = "rng."
FORMAT = 1
_JSON_NAME = "checkpoint.json"
_PARTIAL = "tensors.partial"
_STEP_FOLDER = re.compile(r"step-(\d+)")


class CheckpointError(AtodError):
    """A checkpoint cannot be written, read or used; the message says what to do."""


@dataclass(frozen=True)
class CheckpointState:
    """Everything a run needs to go on exactly where it stopped."""

    tensors: dict[str, Tensor]
    """Flat names: `model.*`, `optimizer.*`, `rng.*`, in any shape and dtype, on any device."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values: global_step, config, numpy generator states, best score, versions."""


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step of a run lies."""
    return run_dir / "checkpoints" / f"step-{step:06d}"


def model_signature(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> dtype and shape of a model's tensors (names with or without `model.`), sorted."""
    return {
        name.removeprefix(MODEL_PREFIX): f"{str(tensor.dtype).removeprefix('torch.')}"
        f"{list(tensor.shape)}"
        for name, tensor in sorted(tensors.items())
        if not name.startswith((OPTIMIZER_PREFIX, RNG_PREFIX))
    }


def model_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Sha256 over names, shapes and dtypes of a model's tensors: equal if weights can be loaded."""
    return _digest_of_json(model_signature(tensors))


def _digest_of_json(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Forces a file or folder to disk; systems that cannot open folders skip those."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows and folders
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _for_saving(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors without shared memory (tied weights), as safetensors wants them."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return ready


def save_checkpoint(folder: Path, state: CheckpointState) -> None:
    """Writes a checkpoint; at every moment `folder` holds the old one, or the new one, whole.

    Args:
        folder: such as `checkpoint_folder(run_dir, step)`; made if absent, replaced if present.
        state: tensors and JSON metadata.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or the metadata is not
            JSON. Nothing half-written stays.
    """
    try:
        digest_of_metadata = _digest_of_json(state.metadata)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the metadata of a checkpoint must be plain JSON without NaN or infinity: {error}"
        ) from error
    is_new = not folder.exists()
    partial, json_partial = folder / _PARTIAL, folder / f"{_JSON_NAME}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_for_saving(state.tensors), partial)
        _sync(partial)
        digest = _digest_of_file(partial)
        tensors_path = folder / f"tensors-{digest[:16]}.safetensors"
        record = {
            "format": FORMAT,
            "tensors_file": tensors_path.name,
            "tensors_sha256": digest,
            "model_fingerprint": model_fingerprint(state.tensors),
            "metadata_sha256": digest_of_metadata,
            "metadata": state.metadata,
        }
        with json_partial.open("w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, tensors_path)
        _sync(folder)  # the tensors' name must be on disk before the JSON speaks of it
        os.replace(json_partial, folder / _JSON_NAME)
    except (OSError, SafetensorError) as error:
        _discard(folder, is_new)
        raise CheckpointError(
            f"the checkpoint {folder} could not be written ({error}). Free disk space, or choose "
            "a folder that can be written; the checkpoints saved before are untouched."
        ) from error
    except BaseException:
        _discard(folder, is_new)
        raise
    _sync(folder)
    _sync(folder.parent)
    _remove_strays(folder, keep=tensors_path.name)


def _remove_strays(folder: Path, keep: str) -> None:
    """Removes the tensors of replaced or interrupted saves from a folder."""
    for path in folder.iterdir():
        is_tensors = path.name.startswith("tensors-") and path.suffix == ".safetensors"
        if path.suffix == ".partial" or (is_tensors and path.name != keep):
            path.unlink(missing_ok=True)


def _discard(folder: Path, is_new: bool) -> None:
    """Removes what a failed save wrote and leaves a checkpoint that was there before."""
    if not folder.is_dir():
        return
    if is_new:
        shutil.rmtree(folder, ignore_errors=True)
        return
    try:
        record = json.loads((folder / _JSON_NAME).read_text(encoding="utf-8"))
        _remove_strays(folder, keep=record["tensors_file"])
    except (OSError, ValueError, KeyError):
        # Without a readable checkpoint.json it is not known which tensors are precious.
        for name in (_PARTIAL, f"{_JSON_NAME}.partial"):
            (folder / name).unlink(missing_ok=True)


def _read_verified(folder: Path) -> tuple[dict[str, Any], Path]:
    """The JSON record and the tensors path of an intact checkpoint, or a CheckpointError."""
    try:
        record = json.loads((folder / _JSON_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no finished checkpoint (no {_JSON_NAME})") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _JSON_NAME} cannot be read ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / _JSON_NAME} is not of checkpoint format {FORMAT}; "
            "use the version of the program that wrote it"
        )
    try:
        path = folder / Path(record["tensors_file"]).name
        if _digest_of_json(record["metadata"]) != record["metadata_sha256"]:
            raise CheckpointError(f"{folder / _JSON_NAME} was altered after it was saved")
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if _digest_of_file(path) != record["tensors_sha256"]:
            raise CheckpointError(f"{path} is truncated or was altered after it was saved")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / _JSON_NAME} lacks {error}") from error
    except OSError as error:
        raise CheckpointError(f"the checkpoint {folder} cannot be read ({error})") from error
    return record, path


def _steps(parent: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished or unfinished step checkpoint, oldest first."""
    if not parent.is_dir():
        return []
    found = []
    for path in parent.iterdir():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match.group(1)), path))
    return sorted(found)


def _previous_good(folder: Path) -> Path | None:
    """The newest other checkpoint beside a damaged one that is intact."""
    for _, path in reversed(_steps(folder.parent)):
        if path.resolve() == folder.resolve():
            continue
        try:
            _read_verified(path)
        except CheckpointError:
            continue
        return path
    return None


def load_checkpoint(folder: Path, *, model: Mapping[str, Tensor] | None = None) -> CheckpointState:
    """Reads a checkpoint after checking that it is whole.

    Args:
        folder: the checkpoint, as saved.
        model: tensors of the model that will take the weights (`model_tensors(..)` or a
            state_dict); a checkpoint of another model is refused before anything is loaded.

    Returns:
        The state, all tensors on the CPU, bit for bit as saved.

    Raises:
        CheckpointError: missing, truncated, altered, of another format or of another model. The
            message names the newest intact checkpoint beside it, if there is one.
    """
    try:
        record, path = _read_verified(folder)
        tensors = load_file(path)
    except (CheckpointError, SafetensorError) as error:
        good = _previous_good(folder)
        advice = f"Resume from {good} instead." if good else "No intact checkpoint lies beside it."
        raise CheckpointError(f"{error}. {advice}") from error
    if model is not None and model_fingerprint(model) != record["model_fingerprint"]:
        _refuse_other_model(folder, model_signature(tensors), model_signature(model))
    return CheckpointState(tensors, record["metadata"])


def _refuse_other_model(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differing = [name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
    lines = [
        f"  {name}: saved {saved.get(name, 'absent')}, model {wanted.get(name, 'absent')}"
        for name in differing[:5]
    ]
    more = f"\n  and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise CheckpointError(
        f"the checkpoint {folder} belongs to another model. Choose the model it was saved from, "
        "or start a new run. Differing tensors:\n" + "\n".join(lines) + more
    )


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The finished checkpoint of the highest step under `run_dir/checkpoints`; None if none.

    Folders that an interrupted save left behind are passed over. Intactness is checked when the
    checkpoint is loaded.
    """
    for _, path in reversed(_steps(run_dir / "checkpoints")):
        if (path / _JSON_NAME).is_file():
            return path
    return None


def prune_checkpoints(run_dir: Path, keep: int) -> tuple[Path, ...]:
    """Deletes all but the newest `keep` step checkpoints, and leftovers of interrupted saves.

    Folders with other names, such as `checkpoints/best`, are left alone. Not to be called while
    another process saves into the same run.

    Returns:
        The folders deleted.

    Raises:
        CheckpointError: `keep` is below 1, or a folder cannot be deleted.
    """
    if keep < 1:
        raise CheckpointError(f"at least one checkpoint must be kept, not {keep}")
    folders = [path for _, path in _steps(run_dir / "checkpoints")]
    finished = [path for path in folders if (path / _JSON_NAME).is_file()]
    kept = set(finished[-keep:])
    deleted = tuple(path for path in folders if path not in kept)
    try:
        for path in deleted:
            # The JSON goes first, so that a half-deleted folder is no checkpoint.
            (path / _JSON_NAME).unlink(missing_ok=True)
            shutil.rmtree(path)
    except OSError as error:
        raise CheckpointError(f"an old checkpoint could not be deleted ({error})") from error
    return deleted
