"""Checkpoints: one safetensors file for each saved step, never pickle.

    run/checkpoints/step-000020.safetensors

The tensors are the weights that are trained and the optimiser's moments. The file's header holds
the JSON metadata. A save writes another file, forces it to disk and renames it: a process killed at
any moment leaves whole checkpoints only. No checkpoint holds NaN or infinity.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from atod_gym.errors import AtodError
from atod_train.files import PARTIAL, replacing

_MODEL, _OPTIMIZER = "model.", "optimizer."
_METADATA = "atod"
_NAME = re.compile(r"step-(\d+)\.safetensors")


class CheckpointError(AtodError):
    """A checkpoint cannot be written, read or used; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue as if it had not stopped."""

    tensors: dict[str, Tensor]
    """`model.<parameter>` and `optimizer.<parameter>.<moment>`, of any shape and dtype."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values."""


# -- files -----------------------------------------------------------------------------------------


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:06d}.safetensors"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; at every moment `path` holds the old file or the new one, whole.

    Raises:
        CheckpointError: a tensor is not finite, the metadata is not JSON, or the file cannot be
            written. Nothing half-written stays.
    """
    check_finite(checkpoint.tensors, f"The checkpoint {path} is not written")
    try:
        metadata = json.dumps(checkpoint.metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"The metadata of a checkpoint must be plain JSON without NaN or infinity: {error}."
        ) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=True) as partial:
            ready = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
            save_file(ready, partial, {_METADATA: metadata})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error}). Free disk space, or make the "
            "folder writable; the checkpoints saved before are untouched."
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, bit for bit as it was saved.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or holds NaN.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = (file.metadata() or {}).get(_METADATA)
            if record is None:
                raise CheckpointError(f"{path} is no checkpoint of this program")
            checkpoint = Checkpoint(
                {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
                json.loads(record),
            )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    check_finite(checkpoint.tensors, f"The checkpoint {path} cannot be used")
    return checkpoint


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest step first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    found = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def load_latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint that can be read.

    Returns:
        The checkpoint, None where the run has none; and for each newer one that was passed over a
        line that says why.

    Raises:
        CheckpointError: there are checkpoints, and none can be read.
    """
    passed: list[str] = []
    for path in reversed(saved_checkpoints(run_dir)):
        try:
            return load_checkpoint(path), passed
        except CheckpointError as error:
            passed.append(str(error))
    if passed:
        raise CheckpointError(
            f"No checkpoint of {run_dir} can be used: {'; '.join(passed)}. Remove "
            f"{run_dir / 'checkpoints'} to begin the run again."
        )
    return None, passed


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed saves left.

    Raises:
        CheckpointError: a file cannot be deleted.
    """
    strays = (run_dir / "checkpoints").glob(f"*{PARTIAL}")
    try:
        for path in (*saved_checkpoints(run_dir)[:-keep], *strays):
            path.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"An old checkpoint could not be deleted ({error}).") from error


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse tensors that hold NaN or infinity.

    Raises:
        CheckpointError: one does; the message begins with `what`.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{what}: {name} holds NaN or infinity")


# -- tensors of live objects -----------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights that are trained and the buffers, as `model.<name>`; no copy.

    Frozen weights, such as those below adapters, are those that the run began with. Weights that
    are tied are returned once.
    """
    every = model.named_parameters(remove_duplicate=False)
    left_out = {name for name, _ in every} - {
        name for name, weight in model.named_parameters() if weight.requires_grad
    }
    return {
        _MODEL + name: tensor for name, tensor in model.state_dict().items() if name not in left_out
    }


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the `model.` tensors of a checkpoint into a model of the same shapes.

    Raises:
        CheckpointError: the checkpoint belongs to another model; names the differing tensors.
    """
    saved = {name: tensor for name, tensor in tensors.items() if name.startswith(_MODEL)}
    ours, theirs = (
        {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in of.items()}
        for of in (model_tensors(model), saved)
    )
    differing = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    if differing:
        lines = [
            f"  {name.removeprefix(_MODEL)}: saved {theirs.get(name, 'absent')}, model "
            f"{ours.get(name, 'absent')}"
            for name in differing[:5]
        ]
        raise CheckpointError(
            "The checkpoint belongs to another model. Choose the model that it was saved from, or "
            f"start a new run. {len(differing)} tensors differ:\n" + "\n".join(lines)
        )
    weights = {name.removeprefix(_MODEL): tensor for name, tensor in saved.items()}
    model.load_state_dict(weights, strict=False)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, keep: bool = True
) -> dict[str, Tensor]:
    """Return the optimiser's moments and step counts as `optimizer.<parameter>.<moment>`.

    Moments that are divided over processes are gathered one parameter at a time and moved to the
    CPU, so all processes must call this. Learning rates follow from the settings and are left out.

    Args:
        optimizer: over parameters of `model`.
        model: names the parameters.
        keep: whether this process needs the result; another returns nothing.
    """
    names = _parameter_names(optimizer, model)
    found = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensor = whole(value)
                if keep:
                    # What was gathered must not stay on the GPU until all are gathered.
                    tensor = tensor if tensor is value else tensor.cpu()
                    found[f"{_OPTIMIZER}{names[index]}.{key}"] = tensor
    return found


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Put the result of `optimizer_tensors` into an optimiser over the same parameters.

    Raises:
        CheckpointError: a saved name is no parameter of this optimiser.
    """
    index_of = {name: index for index, name in enumerate(_parameter_names(optimizer, model))}
    parameters = dict(model.named_parameters())
    restored: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if not full_name.startswith(_OPTIMIZER):
            continue
        name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(".")
        if name not in index_of:
            raise CheckpointError(
                f"The checkpoint has optimiser state for {name!r}, which this run does not train. "
                "Choose the model and the settings of the run that saved it."
            )
        # A copy: the optimiser changes its moments in place.
        moment = divided_like(tensor.clone(), parameters[name])
        restored.setdefault(index_of[name], {})[key] = moment
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimiser's parameters in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(weight)] for group in optimizer.param_groups for weight in group["params"]]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be divided over processes, gathered; all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Divide a whole tensor over processes as a parameter of the same shape is, if it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)
