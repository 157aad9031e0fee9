"""Checkpoints: one safetensors file for each saved step, never pickle.

    run/checkpoints/step-000020.safetensors

The tensors are the trained weights and the optimiser's moments. The file's header contains
the JSON metadata. A save writes another file, flushes it to disk and renames it: a process killed
at any moment leaves only complete checkpoints. No checkpoint contains NaN or infinity.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from atod_gym.errors import AtodError
from atod_train.files import PARTIAL, replacing
from atod_train.training.sharding import divided_like, whole

_MODEL, _OPTIMIZER = "model.", "optimizer."
_METADATA = "atod"


class CheckpointError(AtodError):
    """A checkpoint cannot be written, read or used; the message says what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a run needs to continue as if it had not stopped."""

    tensors: dict[str, Tensor]
    """`model.<parameter>` and `optimizer.<parameter>.<moment>`, of any shape and dtype."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values; neither NaN nor infinity."""


# -- files -----------------------------------------------------------------------------------------


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Return the path of a step's checkpoint."""
    return run_dir / "checkpoints" / f"step-{step:06d}.safetensors"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; at every moment `path` is the complete old or new file.

    Raises:
        CheckpointError: a tensor is not finite, or the file cannot be written. No incomplete file
            remains.
        TypeError, ValueError: the metadata is not JSON.
    """
    if name := first_not_finite(checkpoint.tensors):
        raise CheckpointError(f"The checkpoint {path} is not written: {name} has NaN or infinity")
    metadata = json.dumps(checkpoint.metadata, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, sync=True) as partial:
            ready = {name: t.detach().cpu().contiguous() for name, t in checkpoint.tensors.items()}
            save_file(ready, partial, {_METADATA: metadata})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error}). Free disk space, or make the "
            "folder writable; the checkpoints saved before are unchanged."
        ) from error


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU, bit for bit as it was saved.

    Raises:
        CheckpointError: the file is missing, truncated, of another format, or contains NaN.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = (file.metadata() or {}).get(_METADATA)
            if metadata is None:
                raise CheckpointError(f"{path} is not a checkpoint of this program")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            checkpoint = Checkpoint(tensors, json.loads(metadata))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error
    if name := first_not_finite(tensors):
        raise CheckpointError(f"The checkpoint {path} cannot be used: {name} has NaN or infinity")
    return checkpoint


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest step first."""
    found = (run_dir / "checkpoints").glob("step-*.safetensors")
    return sorted(found, key=lambda path: (len(path.name), path.name))


def load_latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest readable checkpoint.

    Returns:
        The checkpoint, None if the run has none; and for each newer one that was skipped a
        line with the reason.

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
    """Delete all except the newest `keep` checkpoints, and the partial files of killed saves."""
    strays = (run_dir / "checkpoints").glob(f"*{PARTIAL}")
    for path in (*saved_checkpoints(run_dir)[:-keep], *strays):
        path.unlink(missing_ok=True)


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of a tensor that contains NaN or infinity; empty: none does."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), "")


# -- tensors of live objects -----------------------------------------------------------------------


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights and the buffers, as `model.<name>`; no copy.

    Frozen weights, such as those below adapters, equal those at the start of the run. Tied
    weights are returned once.
    """
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    left_out = {name for name, _ in model.named_parameters(remove_duplicate=False)} - trained
    return {
        _MODEL + name: tensor for name, tensor in model.state_dict().items() if name not in left_out
    }


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load the `model.` tensors of a checkpoint into a model of the same shapes.

    Raises:
        CheckpointError: the checkpoint belongs to another model; names the differing tensors.
    """
    saved, own = (
        {name.removeprefix(_MODEL): t for name, t in of.items() if name.startswith(_MODEL)}
        for of in (tensors, model_tensors(model))
    )
    theirs, ours = (
        {name: f"{t.dtype} {list(t.shape)}" for name, t in of.items()} for of in (saved, own)
    )
    if differing := sorted({name for name, _ in ours.items() ^ theirs.items()}):
        lines = [
            f"  {name}: saved {theirs.get(name, 'absent')}, model {ours.get(name, 'absent')}"
            for name in differing[:5]
        ]
        raise CheckpointError(
            "The checkpoint belongs to another model. Choose the model that it was saved from, or "
            f"start a new run. {len(differing)} tensors differ:\n" + "\n".join(lines)
        )
    model.load_state_dict(saved, strict=False)


def optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, keep: bool = True
) -> dict[str, Tensor]:
    """Return the optimiser's moments and step counts as `optimizer.<parameter>.<moment>`.

    Moments that are divided over processes are gathered one parameter at a time and moved to the
    CPU, so all processes must call this; without `keep`, a process returns nothing. Learning rates
    follow from the settings and are left out.
    """
    names: dict[Tensor, str] = {weight: name for name, weight in model.named_parameters()}
    found = {}
    for weight, values in optimizer.state.items():
        for key, value in values.items():
            tensor = whole(value)
            if keep:
                # A gathered tensor must not stay on the GPU until all are gathered.
                tensor = tensor if tensor is value else tensor.cpu()
                found[f"{_OPTIMIZER}{names[weight]}.{key}"] = tensor
    return found


def restore_optimizer(
    optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Load the result of `optimizer_tensors` into an optimiser over the same parameters."""
    names = {weight: name for name, weight in model.named_parameters()}
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    index_of = {names[weight]: index for index, weight in enumerate(weights)}
    restored: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(_OPTIMIZER):
            name, _, key = full_name.removeprefix(_OPTIMIZER).rpartition(".")
            # A copy: the optimiser changes its moments in place.
            moment = divided_like(tensor.clone(), model.get_parameter(name))
            restored.setdefault(index_of[name], {})[key] = moment
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})
