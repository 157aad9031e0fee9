"""Muon in float32 with like matrices together: what a processor without bfloat16 units can afford.

The same update as `torch.optim.Muon` (Keller Jordan's, with its constants), which orthogonalises in
bfloat16, one matrix after the other. Where the processor emulates bfloat16 that takes longer than
the forward and backward passes of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic of an iteration; its slope at zero is as steep as can be."""
ITERATIONS = 5
_EPSILON = 1e-7


class Muon(Optimizer):
    """Momentum whose update is orthogonalised; for the matrices inside of layers.

    Args:
        matrices: parameters with two dimensions.
        lr: step size; one of a matrix with more rows than columns is raised by the root of their
            ratio.
        momentum: share of the running mean of gradients that stays at each step (Nesterov).
        weight_decay: decoupled.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves the weights.

        Args:
            closure: as in torch; not used.
        """
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for (rows, columns), weights in by_shape.items():
                updates = orthogonalized(
                    torch.stack([self._nesterov(weight, group) for weight in weights])
                )
                size = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for weight, update in zip(weights, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(update, alpha=-size)

    def _nesterov(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["mean"] = torch.zeros_like(weight.grad)
        mean: Tensor = state["mean"].lerp_(weight.grad, 1 - group["momentum"])
        return weight.grad.lerp(mean, group["momentum"])


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices with the same singular vectors whose singular values are all about one.

    Args:
        matrices: [n, rows, columns].

    Returns:
        Of the same shape; singular values that were not tiny end between 0.5 and 1.5 or so.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.mT if is_tall else matrices
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.baddbmm(
            found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a
        )
    return found.mT if is_tall else found
