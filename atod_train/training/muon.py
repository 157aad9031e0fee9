"""Muon in float32, for processors without bfloat16 units.

The update of `torch.optim.Muon` (Keller Jordan's, with its constants), which orthogonalises in
bfloat16. A processor that emulates bfloat16 takes 4 (AVX-512) to 20 times (AVX2) longer for that,
more than for the forward and backward passes of a small model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic of an iteration, whose slope at zero is as steep as can be."""
ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, for the matrices inside of layers.

    Args:
        matrices: parameters with two dimensions.
        lr: step size; times the root of rows / columns for a matrix with more rows than columns.
        momentum: decay of the running mean of gradients.
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
        """Update the weights that have a gradient.

        Args:
            closure: not used.
        """
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"] = torch.zeros_like(weight)
                mean = state["mean"].lerp_(weight.grad, 1 - momentum)
                update = orthogonalized(weight.grad.lerp(mean, momentum))
                rows, columns = weight.shape
                weight.mul_(1 - lr * group["weight_decay"])
                weight.add_(update, alpha=-lr * math.sqrt(max(1.0, rows / columns)))


def orthogonalized(matrix: Tensor) -> Tensor:
    """Return a matrix with the same singular vectors, whose singular values are about one.

    Args:
        matrix: [rows, columns].

    Returns:
        Of the same shape; singular values that were not tiny end between about 0.5 and 1.5.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.mT if is_tall else matrix
    found = found / found.norm().clamp(min=_EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.mT if is_tall else found
