from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_train.algorithm.weights import (
    keep_top_fraction,
    parse_turn_weights,
    preserve_mean,
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
    log_ratio = torch.full_like(student, 0.5)
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
    weights = token_weights(torch.full((1, 53), 0.5, dtype=torch.float64), -values[None], mask)[0]
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


def test_preserve_mean_weights_by_tokens_within_the_trajectory() -> None:
    weights = torch.tensor([1.0, 0.5, 0.1, 0.9, 0.0], dtype=torch.float64)
    mask = torch.tensor([[True, False, False], [True] * 3, [True] * 3, [True, False, False]])
    mask = torch.cat([mask, torch.zeros(1, 3, dtype=torch.bool)])
    index = torch.tensor([0, 0, 1, 1, 2])
    scaled = preserve_mean(weights, mask, index)
    # Trajectory 0: mean (1 + 1.5) / 4 = 0.625, ratios 1.6 and 0.8. Trajectory 1: mean 0.3, ratios
    # 1/3 and 3, clipped to 0.5 and 2, whose mean is 0.875: 4/7 and 16/7.
    assert scaled.tolist() == pytest.approx([1.6, 0.8, 4 / 7, 16 / 7, 1.0])
    assert preserve_mean(
        torch.zeros(3), torch.ones(3, 2, dtype=torch.bool), index[:3]
    ).tolist() == ([1.0, 1.0, 1.0])


@settings(deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12), st.integers(0, 1000))
def test_preserve_mean_gives_a_mean_of_one(values: list[float], seed: int) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(len(values), 4, generator=random) < 0.7
    mask[:, 0] = True
    scaled = preserve_mean(weights, mask, torch.zeros(len(values), dtype=torch.int64))
    assert float((scaled * mask.sum(-1)).sum() / mask.sum()) == pytest.approx(1.0)


def test_token_weights_where_the_teacher_agrees_are_one() -> None:
    mask = torch.tensor([[True, True, False]])
    agrees = torch.tensor([[0.009, -0.001, math.nan]])
    student = torch.tensor([[-2.0, -1.0, -3.0]])
    assert token_weights(agrees, student, mask).tolist() == [[1.0, 1.0, 0.0]]
    assert token_weights(2 * agrees, student, mask).tolist() == [[1.0, 0.0, 0.0]]


def test_turn_weights_are_named_in_one_word() -> None:
    assert parse_turn_weights("soft_or") == ("soft_or", 0.0)
    assert parse_turn_weights("top:0.25") == ("top", 0.25)
    assert parse_turn_weights("smooth:1") == ("smooth", 1.0)
    for wrong in ("top", "soft_or:1", "top:0", "top:1.5", "smooth:x", "best", "", "top:nan"):
        with pytest.raises(ValueError, match="turn_weights is"):
            parse_turn_weights(wrong)
