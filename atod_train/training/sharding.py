"""Divide weights over the ranks during training (FSDP2)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from atod_train.distributed import Processes
from atod_train.models.policy import Computation, Policy


def shard(student: Policy, processes: Processes) -> Policy:
    """Return a copy of the student whose weights are divided over the ranks, layer by layer."""
    device = student.device
    # The copy is made in the memory of the CPU: the GPU may fit only one whole model.
    model = copy.deepcopy(nn.Module.to(student.model, "cpu"))
    nn.Module.to(student.model, device)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(processes.device, (processes.count,)),
        **(processes.sharding or {}),
    }
    layers = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, **settings)
    fully_shard(model, **settings)

    def run(computation: Computation) -> dict[str, Tensor]:
        return computation()

    # FSDP gathers the weights when this method is called, as it does for `forward`.
    sharded: Any = model
    sharded.forward_within = run
    register_fsdp_forward_method(sharded, "forward_within")
    return replace(student, model=model, forward_within=sharded.forward_within)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy the trained weights, whole or divided; all ranks must call this."""
    for name, weight in target.named_parameters():
        if weight.requires_grad:
            weight.copy_(divided_like(whole(source.get_parameter(name).detach()), weight))


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that may be divided over processes; all must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Divide a whole tensor over processes like a parameter of the same shape."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    mesh = parameter.device_mesh
    return distribute_tensor(tensor.to(mesh.device_type), mesh, parameter.placements)
