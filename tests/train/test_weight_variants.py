from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_train.algorithm.weight_variants import (
    keep_top_fraction,
    preserve_mean,
    smooth_weights,
    token_weights,
)


def test_token_weights_scale_over_the_batch() -> None:
    log_ratio = torch.tensor([[-1.0, 0.0], [0.5, math.nan]], dtype=torch.float64)
    student = torch.tensor([[-1.0, -3.0], [-2.0, math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False]])
    weights = token_weights(log_ratio, student, mask, quantile=1.0)
    assert weights.flatten().tolist() == pytest.approx([1.0, 1.0, 0.75, 0.0])


def test_token_weights_clip_the_uncertainty_at_its_quantile() -> None:
    # 101 values 0..100: the 0.98 quantile is 98, so 98 and above count as 1.
    student = -torch.arange(101.0, dtype=torch.float64).unsqueeze(0)
    log_ratio = torch.zeros_like(student)
    log_ratio[0, 0] = 1e-12
    mask = torch.ones_like(student, dtype=torch.bool)
    weights = token_weights(log_ratio, student, mask)[0]
    # No range in |delta|: it counts 0.5, so w = 1 - 0.5 (1 - h).
    assert float(weights[0]) == pytest.approx(0.5)
    assert float(weights[49]) == pytest.approx(0.75)
    assert weights[98:].tolist() == pytest.approx([1.0, 1.0, 1.0])
    # Between two values the quantile is interpolated: 0.98 * 10 = 9.8.
    weights = token_weights(log_ratio[:, :11], student[:, :11], mask[:, :11])[0]
    assert float(weights[5]) == pytest.approx(1 - 0.5 * (1 - 5 / 9.8))


def test_quantile_agrees_with_torch() -> None:
    values = torch.rand(53, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(1, 53, dtype=torch.bool)
    weights = token_weights(torch.zeros(1, 53, dtype=torch.float64), -values[None], mask)[0]
    bound = torch.quantile(values, 0.98)
    h = (values.minimum(bound) - values.min()) / (bound - values.min())
    assert torch.allclose(weights, 1 - 0.5 * (1 - h))


def test_token_weights_without_tokens() -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool)
    assert token_weights(torch.ones(2, 3), torch.ones(2, 3), mask).tolist() == [[0.0] * 3] * 2


def test_top_fraction_counts_per_trajectory() -> None:
    index = torch.tensor([1, 0, 1, 0, 1, 0, 1, 3])
    weights = torch.tensor([0.1, 0.9, 0.8, 0.2, 0.3, 0.5, 0.7, 0.0])
    assert keep_top_fraction(weights, 0.5, index).tolist() == [0, 1, 1, 0, 0, 1, 1, 1]
    assert keep_top_fraction(weights, 0.01, index).tolist() == [0, 1, 1, 0, 0, 0, 0, 1]
    assert keep_top_fraction(weights, 1.0, index).tolist() == [1.0] * 8


def test_top_fraction_keeps_ties_and_rounds_products_sensibly() -> None:
    index = torch.zeros(10, dtype=torch.int64)
    assert keep_top_fraction(torch.ones(10), 0.3, index).tolist() == [1.0] * 10
    assert float(keep_top_fraction(torch.arange(10.0), 0.3, index).sum()) == 3.0
    assert float(keep_top_fraction(torch.arange(10.0), 0.31, index).sum()) == 4.0
    assert keep_top_fraction(torch.zeros(0), 0.5, index[:0]).shape == (0,)
    with pytest.raises(ValueError, match="top_fraction is 0"):
        keep_top_fraction(torch.ones(10), 0.0, index)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=20),
    st.floats(0.01, 1.0),
    st.randoms(use_true_random=False),
)
def test_top_fraction_follows_its_turns(rows, fraction, random) -> None:
    index, values = torch.tensor(rows).unbind(-1)
    kept = keep_top_fraction(values.float(), fraction, index)
    order = torch.tensor(random.sample(range(len(rows)), len(rows)))
    assert torch.equal(
        keep_top_fraction(values[order].float(), fraction, index[order]), kept[order]
    )


def test_smoothing() -> None:
    weights = torch.tensor([0.0, 0.5, 1.0])
    assert smooth_weights(weights, 0.2).tolist() == pytest.approx([0.2, 0.6, 1.0])
    assert torch.equal(smooth_weights(weights, 0.0), weights)
    with pytest.raises(ValueError, match="weight_smoothing"):
        smooth_weights(weights, 1.5)


def test_preserve_mean_weights_by_tokens_within_the_trajectory() -> None:
    weights = torch.tensor([1.0, 0.5, 0.1, 0.9, 0.0], dtype=torch.float64)
    mask = torch.tensor([[True, False, False], [True] * 3, [True] * 3, [False] * 3, [False] * 3])
    index = torch.tensor([0, 0, 1, 1, 2])
    scaled = preserve_mean(weights, mask, index)
    # Trajectory 0: mean (1 + 1.5) / 4 = 0.625, factor 1.6. Trajectory 1: mean 0.1, factor 2.
    assert scaled.tolist() == pytest.approx([1.6, 0.8, 0.2, 1.8, 0.0])
    means = (scaled * mask.sum(-1))[:2].sum() / 4
    assert float(means) == pytest.approx(1.0)


def test_preserve_mean_of_token_weights_and_of_zeros() -> None:
    weights = torch.tensor([[0.5, 1.0, math.nan], [0.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    scaled = preserve_mean(weights, mask, torch.tensor([0, 1]))
    assert scaled[0, :2].tolist() == pytest.approx([2 / 3, 4 / 3])
    assert scaled[1].tolist() == [0.0, 0.0, 0.0]
