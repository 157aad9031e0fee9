from __future__ import annotations

import torch

from atod_train.training.supervised import Muon, orthogonalized


def test_singular_values_come_close_to_one_and_vectors_stay() -> None:
    torch.manual_seed(0)
    settings = torch.optim.Muon([torch.zeros(1, 1)]).defaults
    for shape in ((6, 6), (4, 9), (9, 4)):
        left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
        values = values.clamp(min=0.1 * float(values.max()))
        found = orthogonalized(left @ values.diag() @ right, settings)
        inner = left.mT @ found @ right.mT
        diagonal = inner.diagonal()
        assert (inner - diagonal.diag()).abs().max() < 1e-4
        assert diagonal.min() > 0.5
        assert diagonal.max() < 1.5


def test_a_zero_gradient_moves_nothing_but_decay() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    weight.grad = torch.zeros(2, 3)
    Muon([weight], 0.1, weight_decay=0.5).step()
    assert torch.allclose(weight, torch.full((2, 3), 0.95))


def test_it_is_the_muon_of_torch_but_for_its_rounding() -> None:
    torch.manual_seed(1)
    starts = [torch.randn(8, 8), torch.randn(16, 8), torch.randn(8, 16), torch.randn(8, 8)]
    gradients = [[torch.randn_like(w) for w in starts] for _ in range(4)]
    ours = [torch.nn.Parameter(w.clone()) for w in starts]
    theirs = [torch.nn.Parameter(w.clone()) for w in starts]
    optimizers = (
        (ours, Muon(ours, 0.02, weight_decay=0.1)),
        (theirs, torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1)),
    )
    for step in gradients:
        for weights, optimizer in optimizers:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for mine, other, start in zip(ours, theirs, starts, strict=True):
        moved = (other - start).norm()
        # bfloat16 holds three digits, and the iteration makes errors larger.
        assert (mine - other).norm() < 0.05 * moved
        assert (mine - start).norm() > 0.5 * moved


def test_a_weight_without_gradient_stays() -> None:
    first, second = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    first.grad = torch.eye(2)
    Muon([first, second], 0.1).step()
    assert torch.equal(second, torch.ones(2, 2))
    assert not torch.equal(first, torch.ones(2, 2))
