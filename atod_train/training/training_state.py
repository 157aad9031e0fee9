"""What a checkpoint holds, taken from live objects and put back: model, optimiser, randomness.

Each pair of functions is exact: a run restored with them goes on bit for bit as if it had not
stopped, on the same machine and with the same number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from atod_train.training.checkpoint import (
    MODEL_PREFIX,
    OPTIMIZER_PREFIX,
    RNG_PREFIX,
    CheckpointError,
)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict under `model.` names; no copy.

    Weights that are not trained, such as those beside adapters, are left out: they are those that
    the run began with.
    """
    named = model.named_parameters(remove_duplicate=False)  # tied weights have two names
    frozen = {name for name, weight in named if not weight.requires_grad}
    return {
        MODEL_PREFIX + name: tensor
        for name, tensor in model.state_dict().items()
        if name not in frozen
    }


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts the `model.` tensors of a checkpoint into a model of the same signature.

    Raises:
        CheckpointError: a tensor that is trained is missing.
    """
    weights = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in tensors.items()
        if name.startswith(MODEL_PREFIX)
    }
    result = model.load_state_dict(weights, strict=False)
    trained = {name.removeprefix(MODEL_PREFIX) for name in model_tensors(model)}
    if lacking := sorted(trained.intersection(result.missing_keys) | {*result.unexpected_keys}):
        raise CheckpointError(f"the checkpoint does not fit the model at {', '.join(lacking[:5])}")


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided over several processes, gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor divided over processes as a parameter of the same shape is, if it is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)


def _parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of the optimiser's parameters in its own order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in order):
        raise CheckpointError("the optimizer holds parameters that the model does not name")
    return [names[id(parameter)] for parameter in order]


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's moments and step counts as `optimizer.<parameter>.<key>`; no copy.

    Learning rates and other settings are not in it: they follow from the config and the step.
    Moments that are divided over several processes are gathered, so all of them must call this.
    """
    names = _parameter_names(optimizer, model)
    return {
        f"{OPTIMIZER_PREFIX}{names[index]}.{key}": whole(value)
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]
) -> None:
    """Puts what `optimizer_tensors` gave back into an optimiser made in the same way.

    Args:
        optimizer: such as torch.optim.AdamW over the parameters of `model`.
        model: names the parameters.
        tensors: a checkpoint's tensors; names that do not begin with `optimizer.` are ignored.

    Raises:
        CheckpointError: a saved name is no parameter of this optimiser.
    """
    index_of = {name: index for index, name in enumerate(_parameter_names(optimizer, model))}
    parameters = dict(model.named_parameters())
    restored: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if not full_name.startswith(OPTIMIZER_PREFIX):
            continue
        name, _, key = full_name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")
        if name not in index_of:
            raise CheckpointError(
                f"the checkpoint has optimizer state for {name!r}, which this optimizer does not "
                "train; make it over the same parameters as in the saved run"
            )
        # A copy: the optimiser changes its moments in place, the checkpoint must not change.
        restored.setdefault(index_of[name], {})[key] = divided_like(
            tensor.clone(), parameters[name]
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": restored})


def rng_state(
    torch_generators: Mapping[str, torch.Generator] | None = None,
    numpy_generators: Mapping[str, np.random.Generator] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of all sources of randomness: torch's CPU default and the named generators.

    Returns:
        Tensors (uint8, `rng.default` and `rng.torch.<name>`) for `CheckpointState.tensors`, and
        a JSON object (name -> state of the bit generator) for its metadata.
    """
    tensors = {f"{RNG_PREFIX}default": torch.get_rng_state()}
    for name, generator in (torch_generators or {}).items():
        tensors[f"{RNG_PREFIX}torch.{name}"] = generator.get_state()
    states = {
        name: _arrays_to_lists(generator.bit_generator.state)
        for name, generator in (numpy_generators or {}).items()
    }
    return tensors, states


def restore_rng_state(
    tensors: Mapping[str, Tensor],
    states: Mapping[str, Any],
    torch_generators: Mapping[str, torch.Generator] | None = None,
    numpy_generators: Mapping[str, np.random.Generator] | None = None,
) -> None:
    """Sets torch's CPU default and the named generators to what `rng_state` gave.

    Raises:
        CheckpointError: a generator's state is not in the checkpoint, or is of another kind.
    """
    try:
        torch.set_rng_state(tensors[f"{RNG_PREFIX}default"])
        for name, generator in (torch_generators or {}).items():
            generator.set_state(tensors[f"{RNG_PREFIX}torch.{name}"])
        for name, numpy_generator in (numpy_generators or {}).items():
            numpy_generator.bit_generator.state = _lists_to_arrays(states[name])
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint lacks the state of a random generator, or has another kind: {error}"
        ) from error


def _arrays_to_lists(value: Any) -> Any:
    """A numpy bit generator's state as JSON; arrays become {"array": [..], "dtype": ..}."""
    if isinstance(value, Mapping):
        return {key: _arrays_to_lists(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": str(value.dtype)}
    return value.item() if isinstance(value, np.generic) else value


def _lists_to_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"array", "dtype"}:
            return np.array(value["array"], dtype=value["dtype"])
        return {key: _lists_to_arrays(item) for key, item in value.items()}
    return value
