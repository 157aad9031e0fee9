from __future__ import annotations

import ast
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_train.algorithm import atod
from atod_train.algorithm.atod import (
    Schedule,
    atod_advantages,
    clipped_policy_loss,
    group_advantages,
    loss_normalizer,
    sampled_log_ratio,
    turn_statistics,
    turn_weights,
)

DOUBLE = torch.float64


def tensor(*values: object) -> torch.Tensor:
    return torch.tensor(values, dtype=DOUBLE)


def test_atod_file_needs_nothing_but_torch_and_stays_short() -> None:
    text = Path(str(atod.__file__)).read_text(encoding="utf-8")
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        str(node.module).split(".")[0]
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
    }
    assert imported == {"__future__", "dataclasses", "math", "torch", "typing"}
    assert len(text.splitlines()) <= 360


# --- Schedule ---


@pytest.mark.parametrize(
    ("step", "kappa", "rho"),
    [(0, 1.0, 1.0), (1, 0.98875, 1.0125), (40, 0.55, 1.5), (80, 0.1, 2.0), (150, 0.1, 2.0)],
)
def test_linear_schedule_is_the_published_one(step: int, kappa: float, rho: float) -> None:
    assert Schedule().coefficients(step) == pytest.approx((kappa, rho), abs=1e-12)


def test_cosine_schedule_shares_the_end_points_and_the_middle() -> None:
    schedule = Schedule(shape="cosine")
    assert schedule.coefficients(0) == (1.0, 1.0)
    assert schedule.coefficients(40) == pytest.approx((0.55, 1.5))
    quarter = (1 - math.sqrt(0.5)) / 2
    assert schedule.coefficients(20) == pytest.approx((1 - 0.9 * quarter, 1 + quarter))
    assert schedule.coefficients(80) == (0.1, 2.0)
    assert schedule.coefficients(1000) == (0.1, 2.0)


@pytest.mark.parametrize(
    "schedule", [Schedule(shape="constant"), Schedule(anneal_steps=0), Schedule(anneal_steps=-1)]
)
def test_without_annealing_the_initial_values_stay(schedule: Schedule) -> None:
    assert [schedule.coefficients(step) for step in (0, 1, 80, 10_000)] == [(1.0, 1.0)] * 4


def test_handoff_is_the_teacher_alone_and_then_the_return_alone() -> None:
    schedule = Schedule(0.8, 0.1, 1.5, 2.0, anneal_steps=40, shape="handoff")
    assert [schedule.coefficients(step) for step in (1, 40)] == [(0.8, 0.0)] * 2
    assert [schedule.coefficients(step) for step in (41, 1000)] == [(0.0, 1.5)] * 2


def test_coefficients_at_takes_any_progress() -> None:
    assert Schedule(shape="constant").coefficients_at(0.5) == pytest.approx((0.55, 1.5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"shape": "cubic"},
        {"kappa_init": 0.05},
        {"kappa_min": -0.1},
        {"rho_max": 0.5},
        {"rho_init": -1.0},
    ],
)
def test_wrong_schedules_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"choose"):
        Schedule(**wrong)  # type: ignore[arg-type]


@given(
    st.integers(-5, 300),
    st.integers(-5, 200),
    st.sampled_from(["linear", "cosine", "constant"]),
)
def test_kappa_never_rises_and_rho_never_falls(step: int, anneal_steps: int, shape: str) -> None:
    schedule = Schedule(anneal_steps=anneal_steps, shape=shape)  # type: ignore[arg-type]
    kappa, rho = schedule.coefficients(step)
    later_kappa, later_rho = schedule.coefficients(step + 1)
    assert 0.1 <= later_kappa <= kappa <= 1.0
    assert 1.0 <= rho <= later_rho <= 2.0


# --- Turn statistics ---


def test_turn_statistics_are_means_over_sampled_tokens() -> None:
    nan, inf = math.nan, math.inf
    student = tensor([-1.0, -2.0, nan], [-0.5, inf, nan], [nan, nan, nan])
    teacher = tensor([-0.5, -4.0, inf], [-0.25, nan, -inf], [-inf, 0.0, 0.0])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    disagreement, uncertainty = turn_statistics(student, teacher, mask)
    assert disagreement.tolist() == [1.25, 0.25, 0.0]
    assert uncertainty.tolist() == [1.5, 0.5, 0.0]
    log_ratio = sampled_log_ratio(student, teacher, mask)
    assert log_ratio.tolist() == [[0.5, -2.0, 0.0], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]


def test_statistics_carry_no_gradient() -> None:
    student = torch.full((2, 3), -1.0, requires_grad=True)
    teacher = torch.full((2, 3), -0.5, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    outputs = (sampled_log_ratio(student, teacher, mask), *turn_statistics(student, teacher, mask))
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("value", [-math.inf, math.nan, math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_log_probability_that_is_not_finite_is_named_with_its_row(value: float, which: int) -> None:
    logprobs = [torch.full((4, 2), -1.0), torch.full((4, 2), -1.0)]
    logprobs[which][2, 1] = value
    name = ("student", "teacher")[which]
    mask = torch.ones(4, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"{name}_logprobs is not finite .* 1 turn row.*\[2\]"):
        turn_statistics(logprobs[0], logprobs[1], mask)
    mask[2, 1] = False
    turn_statistics(logprobs[0], logprobs[1], mask)


def test_shapes_are_checked() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"teacher_logprobs has shape \[2, 2\], not \[2, 3\]"):
        turn_statistics(torch.zeros(2, 3), torch.zeros(2, 2), mask)
    with pytest.raises(ValueError, match="uncertainty has shape"):
        turn_weights(torch.zeros(3), torch.zeros(4))
    with pytest.raises(ValueError, match="advantages has shape"):
        clipped_policy_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2), mask)


def test_half_precision_is_lifted_to_float32() -> None:
    logprobs = torch.full((1, 2), -1.0, dtype=torch.bfloat16)
    mask = torch.ones(1, 2, dtype=torch.bool)
    disagreement, uncertainty = turn_statistics(logprobs, logprobs, mask)
    assert disagreement.dtype == uncertainty.dtype == torch.float32
    assert clipped_policy_loss(logprobs, logprobs, logprobs, mask)[0].dtype == torch.float32


# --- T-DUR weights ---

EPISODE_D = tensor(0.101, 0.228, 0.022, 0.019, 0.138)
EPISODE_H = tensor(0.037, 0.025, 0.010, 0.006, 0.008)


def test_weights_of_the_published_episode() -> None:
    weights = turn_weights(EPISODE_D, EPISODE_H)
    assert weights.tolist() == pytest.approx([1.000, 1.000, 0.142, 0.000, 0.597], abs=5e-4)


def test_turn_weight_variants() -> None:
    d, h = tensor(0.0, 0.5, 1.0), tensor(0.4, 0.2, 0.6)
    assert turn_weights(d, h, variant="disagreement").tolist() == pytest.approx([0, 0.5, 1])
    assert turn_weights(d, h, variant="uncertainty").tolist() == pytest.approx([0.5, 0, 1])
    assert turn_weights(d, h, variant="uniform").tolist() == [1.0, 1.0, 1.0]
    assert turn_weights(d, h).tolist() == pytest.approx([0.5, 0.5, 1.0])
    with pytest.raises(ValueError, match="no variant 'tokens'"):
        turn_weights(d, h, variant="tokens")  # type: ignore[arg-type]


def test_a_statistic_without_range_counts_half() -> None:
    d, h = tensor(0.2, 0.2, 0.2), tensor(0.0, 0.5, 1.0)
    assert turn_weights(d, h).tolist() == pytest.approx([0.5, 0.75, 1.0])
    assert turn_weights(d, tensor(1.0, 1.0, 1.0 + 1e-9)).tolist() == pytest.approx([0.75] * 3)


@pytest.mark.parametrize("variant", ["soft_or", "disagreement", "uncertainty", "uniform"])
def test_guards_give_weight_one(variant: str) -> None:
    few = turn_weights(tensor(0.1, 0.9), tensor(0.3, 0.1), variant=variant)  # type: ignore[arg-type]
    assert few.tolist() == [1.0, 1.0]
    agreeing = turn_weights(
        tensor(0.0, 0.002, 0.0099),
        tensor(0.1, 0.2, 0.3),
        variant=variant,  # type: ignore[arg-type]
    )
    assert agreeing.tolist() == [1.0, 1.0, 1.0]


def test_guards_are_strict_and_adjustable() -> None:
    d, h = tensor(0.0, 0.01, 0.005), tensor(0.1, 0.1, 0.2)
    assert turn_weights(d, h).tolist() == pytest.approx([0.0, 1.0, 1.0])
    assert turn_weights(d[:2], h[:2], min_turns=2).tolist() == pytest.approx([0.5, 1.0])
    assert turn_weights(d, h, min_disagreement=0.02).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.5, 30.0])
def test_one_ulp_is_no_range(dtype: torch.dtype, size: float) -> None:
    d = torch.full((4,), size, dtype=dtype)
    d[1] = torch.nextafter(d[1], torch.tensor(100.0, dtype=dtype))
    assert turn_weights(d, d).tolist() == [0.75] * 4


def test_many_trajectories_at_once_equal_one_at_a_time() -> None:
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor([4, 0, 0, 2, 0, 2, 2, 0, 4, 2, 4, 4, 1])
    d = torch.rand(13, generator=generator, dtype=DOUBLE)
    h = torch.rand(13, generator=generator, dtype=DOUBLE)
    weights = turn_weights(d, h, trajectory_index=index)
    for trajectory in index.unique():
        rows = index == trajectory
        assert torch.equal(weights[rows], turn_weights(d[rows], h[rows]))


def test_no_rows_give_no_weights() -> None:
    assert turn_weights(torch.zeros(0), torch.zeros(0)).shape == (0,)


lists_of_pairs = st.lists(
    st.tuples(st.floats(0, 10, width=32), st.floats(0, 10, width=32)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(
    lists_of_pairs,
    st.randoms(use_true_random=False),
    st.sampled_from(["soft_or", "uniform", "disagreement", "uncertainty"]),
)
def test_weights_are_shares_and_follow_their_turns(pairs, random, variant) -> None:
    d, h = torch.tensor(pairs).unbind(-1)
    weights = turn_weights(d, h, variant=variant)
    assert bool(((weights >= 0) & (weights <= 1)).all())
    order = torch.tensor(random.sample(range(len(pairs)), len(pairs)))
    assert torch.equal(turn_weights(d[order], h[order], variant=variant), weights[order])


# --- Group advantages ---


def test_group_advantages_use_the_unbiased_deviation() -> None:
    assert group_advantages(tensor(0.0, 10.0)).tolist() == pytest.approx(
        [-5 / (math.sqrt(50) + 1e-6), 5 / (math.sqrt(50) + 1e-6)], rel=1e-12
    )
    assert group_advantages(tensor(1.0, 2.0, 3.0), eps=1.0).tolist() == pytest.approx(
        [-0.5, 0, 0.5]
    )


def test_equal_returns_and_single_trajectories_give_exactly_zero() -> None:
    assert group_advantages(torch.tensor([0.1] * 7)).tolist() == [0.0] * 7
    assert group_advantages(torch.tensor([3.0])).tolist() == [0.0]
    assert group_advantages(torch.zeros(0)).shape == (0,)
    assert group_advantages(torch.tensor([1, 1, 1])).tolist() == [0.0] * 3


def test_equal_returns_summed_in_another_order_give_zero() -> None:
    penalties = torch.tensor([-0.1] * 7)
    first = torch.tensor(10.0)
    for penalty in penalties:
        first = first + penalty
    second = penalties.sum() + 10.0
    returns = torch.stack([first, second])
    assert returns[0] != returns[1]
    assert group_advantages(returns).tolist() == [0.0, 0.0]


def test_groups_are_normalised_apart() -> None:
    returns = tensor(0.0, 5.0, 10.0, 5.0, 7.0, 2.0)
    labels = torch.tensor([70, -3, 70, -3, 12, -3])
    advantages = group_advantages(returns, group_index=labels)
    for label in labels.unique():
        rows = labels == label
        assert torch.allclose(advantages[rows], group_advantages(returns[rows]), atol=1e-15)


def test_returns_must_be_finite() -> None:
    with pytest.raises(ValueError, match="returns must be finite"):
        group_advantages(torch.tensor([0.0, math.nan]))


returns_lists = st.lists(st.integers(-50, 50), min_size=1, max_size=16)


@settings(deadline=None)
@given(returns_lists, st.integers(1, 9), st.integers(-20, 20))
def test_group_advantages_sum_to_zero_and_ignore_affine_maps(returns, scale, shift) -> None:
    values = torch.tensor(returns, dtype=DOUBLE)
    advantages = group_advantages(values)
    assert float(advantages.sum()) == pytest.approx(0.0, abs=1e-9)
    mapped = group_advantages(scale * values + shift)
    # eps = 1e-6 against a deviation of at least 0.25 changes a value of at most 4 by < 2e-5.
    assert torch.allclose(mapped, advantages, atol=2e-5)


# --- Advantages ---


def test_atod_advantages_in_closed_form() -> None:
    log_ratio = tensor([1.0, -2.0], [0.5, 0.0])
    group_advantage = tensor(1.5, -1.0)
    per_turn = atod_advantages(log_ratio, tensor(0.5, 1.0), group_advantage, 0.4, 2.0)
    assert per_turn.flatten().tolist() == pytest.approx([3.2, 2.6, -1.8, -2.0])
    weights = tensor([0.5, 0.25], [1.0, 1.0])
    mask = torch.tensor([[True, True], [True, False]])
    per_token = atod_advantages(log_ratio, weights, group_advantage, 0.4, 2.0, mask)
    assert per_token.flatten().tolist() == pytest.approx([3.2, 2.8, -1.8, 0.0])


# --- Loss ---


def loss_of_token(log_ratio: float, advantage: float, **options: float) -> float:
    logprobs = tensor([log_ratio])
    mask = torch.ones(1, 1, dtype=torch.bool)
    loss, _ = clipped_policy_loss(
        logprobs, torch.zeros_like(logprobs), tensor([advantage]), mask, **options
    )
    return float(loss)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [
        (1.1, 2.0, -2.2),  # inside the bounds
        (1.5, 2.0, -2.4),  # clipped at 1.2
        (0.5, 2.0, -1.0),  # a lower ratio is not clipped where A > 0
        (0.5, -2.0, 1.6),  # clipped at 0.8
        (1.5, -2.0, 3.0),  # a higher ratio is not clipped where A < 0 ..
        (5.0, -2.0, 6.0),  # .. up to the dual clip
        (5.0, 0.0, 0.0),
    ],
)
def test_loss_of_one_token(ratio: float, advantage: float, loss: float) -> None:
    assert loss_of_token(math.log(ratio), advantage) == pytest.approx(loss)


def test_clip_bounds_are_settings() -> None:
    assert loss_of_token(math.log(1.5), 1.0, clip_high=0.3) == pytest.approx(-1.3)
    assert loss_of_token(math.log(0.5), -1.0, clip_low=0.4) == pytest.approx(0.6)
    assert loss_of_token(math.log(50.0), -1.0, dual_clip=math.inf) == pytest.approx(50.0)
    with pytest.raises(ValueError, match="dual_clip is 1"):
        loss_of_token(0.0, 1.0, dual_clip=1.0)


def test_huge_ratios_stay_finite() -> None:
    logprobs = torch.tensor([[200.0, 200.0, -200.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, stats = clipped_policy_loss(logprobs, torch.zeros(1, 3), advantages, mask)
    loss.backward()
    assert logprobs.grad is not None
    assert bool(torch.isfinite(logprobs.grad).all())
    assert math.isfinite(float(stats.approx_kl))
    assert float(loss.detach()) == pytest.approx((-1.2 + 3.0 + 0.0) / 3)


def random_loss_inputs(rows: int = 7, tokens: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    old = -2.0 * torch.rand(rows, tokens, generator=generator, dtype=DOUBLE)
    new = old + 0.8 * torch.randn(rows, tokens, generator=generator, dtype=DOUBLE)
    advantages = torch.randn(rows, tokens, generator=generator, dtype=DOUBLE)
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    mask = torch.arange(tokens) < lengths[:, None]
    index = torch.randint(0, 3, (rows,), generator=generator)
    return new, old, advantages, mask, index


@pytest.mark.parametrize("aggregation", ["token-mean", "trajectory-mean"])
def test_gradient_equals_finite_differences_in_every_region(aggregation: str) -> None:
    log_ratios = torch.log(tensor([1.05, 1.5, 0.5, 0.9], [0.5, 1.5, 5.0, 1.15]))
    advantages = tensor([1.0, 2.0, 0.7, -0.3], [-2.0, -1.0, -0.5, -1.5])
    old = tensor([-1.0, -2.0, -0.1, -0.7], [-0.3, -1.1, -1.9, -2.5])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    index = torch.tensor([1, 0])

    def loss_at(logprobs: torch.Tensor) -> torch.Tensor:
        return clipped_policy_loss(
            logprobs,
            old,
            advantages,
            mask,
            aggregation=aggregation,  # type: ignore[arg-type]
            trajectory_index=index,
        )[0]

    logprobs = (old + log_ratios).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_at(logprobs), logprobs)
    step = 1e-6
    for position in range(logprobs.numel()):
        shift = torch.zeros(8, dtype=DOUBLE)
        shift[position] = step
        shift = shift.view(2, 4)
        with torch.no_grad():
            difference = (loss_at(logprobs + shift) - loss_at(logprobs - shift)) / (2 * step)
        assert float(gradient.flatten()[position]) == pytest.approx(float(difference), abs=1e-8)
    # -ratio * A over the normaliser, and 0 where clipped (1.5 up, 0.5 down), dual-clipped, padded.
    share = 7.0 if aggregation == "token-mean" else None
    denominators = [share or 6.0, share or 8.0]
    expected = [[-1.05, 0.0, -0.35, 0.0], [0.0, 1.5, 0.0, 1.725]]
    for row in range(2):
        scaled = [value / denominators[row] for value in expected[row]]
        assert gradient[row].tolist() == pytest.approx(scaled)


def test_gradcheck_where_the_loss_is_smooth() -> None:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(3, 4, generator=generator, dtype=DOUBLE)
    advantages = torch.randn(3, 4, generator=generator, dtype=DOUBLE)
    mask = torch.rand(3, 4, generator=generator) < 0.8
    shift = 0.1 * (2 * torch.rand(3, 4, generator=generator, dtype=DOUBLE) - 1)
    logprobs = (old + shift).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, old, advantages, mask)[0], (logprobs,)
    )


def test_gradient_flows_through_the_current_policy_only() -> None:
    new, old, advantages, mask, _ = random_loss_inputs()
    for leaf in (new, old, advantages):
        leaf.requires_grad_()
    clipped_policy_loss(new, old, advantages, mask)[0].backward()
    assert new.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    _, old, advantages, mask, _ = random_loss_inputs()
    new = old.clone().requires_grad_()
    loss, stats = clipped_policy_loss(new, old, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, new)
    expected = torch.where(mask, -advantages, 0.0) / mask.sum()
    assert torch.allclose(gradient, expected, atol=1e-15)
    assert float(stats.clip_fraction) == float(stats.approx_kl) == 0.0


def test_aggregations_in_closed_form() -> None:
    advantages = tensor([1.0, 2.0, 3.0], [4.0, 0.0, 0.0], [10.0, 20.0, 0.0])
    mask = torch.tensor([[True] * 3, [True, False, False], [True, True, False]])
    zeros = torch.zeros(3, 3, dtype=DOUBLE)
    loss, stats = clipped_policy_loss(zeros, zeros, advantages, mask)
    assert float(loss) == pytest.approx(-40 / 6)
    assert int(stats.tokens) == 6
    loss, _ = clipped_policy_loss(
        zeros,
        zeros,
        advantages,
        mask,
        aggregation="trajectory-mean",
        trajectory_index=torch.tensor([0, 0, 2]),  # trajectory 1 has no rows here
    )
    assert float(loss) == pytest.approx(-(10 / 4 + 30 / 2) / 2)
    with pytest.raises(ValueError, match="trajectory_index"):
        clipped_policy_loss(zeros, zeros, advantages, mask, aggregation="trajectory-mean")
    with pytest.raises(ValueError, match="choose token-mean"):
        loss_normalizer(mask, "sum")  # type: ignore[arg-type]


def test_loss_statistics() -> None:
    ratios = tensor([1.5, 0.5, 1.0, 5.0, 2.0])
    advantages = tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    mask = torch.tensor([[True, True, True, True, False]])
    _, stats = clipped_policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, mask)
    assert float(stats.clip_fraction) == 0.5
    kl = sum(ratio - 1 - math.log(ratio) for ratio in (1.5, 0.5, 1.0, 5.0)) / 4
    assert float(stats.approx_kl) == pytest.approx(kl)


def test_no_tokens_give_no_loss() -> None:
    logprobs = torch.zeros(2, 3, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    loss, stats = clipped_policy_loss(logprobs, torch.zeros(2, 3), torch.ones(2, 3), mask)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert logprobs.grad is not None
    assert not bool(logprobs.grad.any())
    assert int(stats.tokens) == 0
    empty = torch.zeros(0, 3)
    assert float(clipped_policy_loss(empty, empty, empty, empty.bool())[0]) == 0.0


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["token-mean", "trajectory-mean"]),
    st.integers(1, 7),
)
def test_microbatches_add_up_to_the_minibatch(seed: int, aggregation, pieces: int) -> None:
    new, old, advantages, mask, index = random_loss_inputs(seed=seed)
    new.requires_grad_()
    whole, _ = clipped_policy_loss(
        new, old, advantages, mask, aggregation=aggregation, trajectory_index=index
    )
    (whole_gradient,) = torch.autograd.grad(whole, new)
    normalizer = loss_normalizer(mask, aggregation, index)
    rows = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
    parts = [
        clipped_policy_loss(
            new[part], old[part], advantages[part], mask[part], normalizer=normalizer[part]
        )[0]
        for part in rows.chunk(pieces)
    ]
    (parts_gradient,) = torch.autograd.grad(torch.stack(parts).sum(), new)
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-12, abs=1e-14)
    assert torch.equal(parts_gradient, whole_gradient)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_padding_never_influences_the_loss(seed: int, junk: float) -> None:
    new, old, advantages, mask, index = random_loss_inputs(seed=seed)
    results = []
    for dirty in (False, True):
        inputs = [
            values.masked_fill(~mask, junk) if dirty else values
            for values in (new, old, advantages)
        ]
        logprobs = inputs[0].clone().requires_grad_()
        loss, stats = clipped_policy_loss(
            logprobs,
            inputs[1],
            inputs[2],
            mask,
            aggregation="trajectory-mean",
            trajectory_index=index,
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        results.append((loss, gradient, stats.clip_fraction, stats.approx_kl))
    for clean, dirtied in zip(*results, strict=True):
        assert torch.equal(clean, dirtied)


def test_the_package_has_the_functions_and_imports_torch_only_for_them() -> None:
    import atod_train
    from atod_train.algorithm import atod

    for name in atod_train.__all__:
        assert getattr(atod_train, name) is getattr(atod, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        getattr(atod_train, "nothing")  # noqa: B009
    code = "import sys, atod_train; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
