from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_policy import make_policy, random_batch

from atod_train.algorithm.atod import group_advantages, loss_normalizer, turn_weights
from atod_train.algorithm.methods import (
    LOW_PRECISION_DISAGREEMENT,
    Advantages,
    auxiliary_loss,
    compute_advantages,
    needs_teacher,
    turn_limit,
)
from atod_train.algorithm.weights import sod_weights
from atod_train.config import AlgorithmConfig, RunConfig, TrainConfig
from atod_train.distributed import Processes
from atod_train.progress import PhaseTimes
from atod_train.records import Batch, TokenScores
from atod_train.training.update import Learner, score_batch, update_policy

METHODS = ("atod", "opd", "grpo", "mix", "sod", "tcod", "sdar")


def turn_rows(
    mask: torch.Tensor,
    trajectory_index: torch.Tensor,
    turn_index: torch.Tensor,
    returns: torch.Tensor,
    group_index: torch.Tensor,
    turn_penalties: torch.Tensor | None = None,
) -> Batch:
    """A batch without what only models need."""
    nothing = torch.zeros(0)
    return Batch(
        input_ids=nothing,
        attention_mask=nothing,
        completion_ids=nothing,
        completion_mask=mask,
        sampling_logprobs=nothing,
        sequence_index=nothing,
        start=nothing,
        rows=nothing,
        trajectory_index=trajectory_index,
        turn_index=turn_index,
        turn_penalties=torch.zeros(len(mask)) if turn_penalties is None else turn_penalties,
        group_index=group_index,
        returns=returns,
    )


def make_step(
    seed: int = 0, *, tokens: int = 4, max_turns: int = 6, groups: int = 2
) -> tuple[Batch, TokenScores]:
    """Two groups (by default) of three trajectories of 1 to max_turns turns, rows in any order."""
    generator = torch.Generator().manual_seed(seed)
    trajectories = 3 * groups
    turns = torch.randint(1, max_turns + 1, (trajectories,), generator=generator)
    index = torch.repeat_interleave(torch.arange(trajectories), turns)
    turn_index = torch.cat([torch.arange(int(count)) for count in turns])
    order = torch.randperm(len(index), generator=generator)
    index, turn_index = index[order], turn_index[order]
    rows = len(index)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    rewards = 10.0 * torch.randint(0, 2, (rows,), generator=generator).double()
    penalties = 0.1 * torch.randint(0, 2, (rows,), generator=generator).double()
    student, teacher = (
        -3.0 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    returns = torch.zeros(trajectories, dtype=torch.float64)
    batch = turn_rows(
        torch.arange(tokens) < lengths[:, None],
        index,
        turn_index,
        returns.index_add(0, index, rewards - penalties),
        torch.arange(trajectories) % groups + 5,
        penalties,
    )
    return batch, TokenScores(logprobs=student, reference_logprobs=teacher)


def with_method(method: str, **options: object) -> AlgorithmConfig:
    return AlgorithmConfig(method=method, **options)  # type: ignore[arg-type]


def delta(batch: Batch, scores: TokenScores) -> torch.Tensor:
    assert scores.reference_logprobs is not None
    difference = scores.reference_logprobs - scores.logprobs
    return torch.where(batch.completion_mask, difference, 0.0)


def grpo_values(batch: Batch) -> torch.Tensor:
    advantage = group_advantages(batch.returns, group_index=batch.group_index)
    per_row = advantage[batch.trajectory_index].unsqueeze(-1)
    return torch.where(batch.completion_mask, per_row, 0.0)


def tensors_of(advantages: Advantages) -> list[torch.Tensor]:
    values = [getattr(advantages, field.name) for field in dataclasses.fields(advantages)]
    return [value for value in values if isinstance(value, torch.Tensor)]


# --- Identities between methods ---


def test_grpo_shares_the_group_advantage_among_all_tokens() -> None:
    batch, scores = make_step()
    advantages = compute_advantages(batch, scores, with_method("grpo"), 1)
    assert torch.equal(advantages.values, grpo_values(batch))
    assert not bool(advantages.opd_term.any())
    assert (advantages.kappa, advantages.rho) == (0.0, 1.0)
    alone = compute_advantages(batch, TokenScores(logprobs=scores.logprobs), with_method("grpo"), 1)
    assert torch.equal(alone.values, advantages.values)


@pytest.mark.parametrize("step", [1, 40, 200])
def test_atod_without_teacher_share_is_grpo_bit_for_bit(step: int) -> None:
    batch, scores = make_step()
    atod = with_method("atod", kappa=(0.0, 0.0), rho=(1.0, 1.0))
    values = compute_advantages(batch, scores, atod, step).values
    assert torch.equal(values, compute_advantages(batch, scores, with_method("grpo"), step).values)


@pytest.mark.parametrize("method", ["opd", "tcod"])
@pytest.mark.parametrize("step", [1, 40, 200])
def test_atod_without_reward_share_and_weights_is_opd_bit_for_bit(method: str, step: int) -> None:
    batch, scores = make_step()
    atod = with_method("atod", kappa=(1.0, 1.0), rho=(0.0, 0.0), turn_weights="uniform")
    opd = compute_advantages(batch, scores, with_method(method), step)
    assert torch.equal(compute_advantages(batch, scores, atod, step).values, opd.values)
    assert torch.equal(opd.values, delta(batch, scores))
    assert not bool(opd.rl_term.any())


def test_mix_is_opd_plus_grpo() -> None:
    batch, scores = make_step()
    mix, opd, grpo = (
        compute_advantages(batch, scores, with_method(method), 1)
        for method in ("mix", "opd", "grpo")
    )
    assert torch.equal(mix.values, opd.values + grpo.values)
    assert torch.equal(mix.opd_term, opd.values)
    assert torch.equal(mix.rl_term, grpo.values)


def test_sdar_has_the_advantages_of_grpo() -> None:
    batch, scores = make_step()
    sdar = compute_advantages(batch, scores, with_method("sdar"), 1)
    assert torch.equal(sdar.values, grpo_values(batch))
    assert bool((sdar.disagreement > 0).all())


def test_atod_in_closed_form() -> None:
    # One group of two; trajectory 0 is the published episode, with one token a turn.
    d = torch.tensor([0.101, 0.228, 0.022, 0.019, 0.138], dtype=torch.float64)
    h = torch.tensor([0.037, 0.025, 0.010, 0.006, 0.008], dtype=torch.float64)
    student = torch.cat([-h, torch.tensor([-1.0], dtype=torch.float64)])[:, None]
    teacher = student + torch.cat([-d, torch.tensor([0.5], dtype=torch.float64)])[:, None]
    batch = turn_rows(
        torch.ones(6, 1, dtype=torch.bool),
        torch.tensor([0, 0, 0, 0, 0, 1]),
        torch.tensor([0, 1, 2, 3, 4, 0]),
        torch.tensor([10.0, 0.0], dtype=torch.float64),
        torch.tensor([0, 0]),
    )
    scores = TokenScores(logprobs=student, reference_logprobs=teacher)
    advantages = compute_advantages(batch, scores, AlgorithmConfig(), 40)
    assert (advantages.kappa, advantages.rho) == pytest.approx((0.55, 1.5))
    assert advantages.disagreement.tolist() == pytest.approx([*d.tolist(), 0.5])
    assert advantages.uncertainty.tolist() == pytest.approx([*h.tolist(), 1.0])
    weights = [1.000, 1.000, 0.142, 0.000, 0.597, 1.0]
    assert advantages.turn_weights.tolist() == pytest.approx(weights, abs=5e-4)
    reward = 1.5 * math.sqrt(0.5)
    expected = [0.55 * w * -x + reward for w, x in zip(weights, d.tolist(), strict=False)]
    expected.append(0.55 * 0.5 - reward)
    assert advantages.values.flatten().tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_terms_add_up_and_everything_is_detached(method: str) -> None:
    batch, scores = make_step(3)
    scores.logprobs.requires_grad_()
    advantages = compute_advantages(batch, scores, with_method(method), 7)
    assert torch.equal(advantages.values, advantages.opd_term + advantages.rl_term)
    assert not any(tensor.requires_grad for tensor in tensors_of(advantages))
    assert not bool(advantages.values[~batch.completion_mask].any())


# --- Turn weights ---


@pytest.mark.parametrize("variant", ["soft_or", "uniform", "disagreement", "uncertainty"])
def test_atod_takes_the_chosen_turn_weights(variant: str) -> None:
    batch, scores = make_step(1)
    advantages = compute_advantages(batch, scores, with_method("atod", turn_weights=variant), 1)
    expected = turn_weights(
        advantages.disagreement,
        advantages.uncertainty,
        variant=variant,  # type: ignore[arg-type]
        trajectory_index=batch.trajectory_index,
    )
    assert torch.equal(advantages.turn_weights, expected)
    term = advantages.kappa * expected.unsqueeze(-1) * delta(batch, scores)
    assert torch.allclose(advantages.opd_term, term, atol=1e-15)


def test_top_fraction_smoothing_and_mean_preserving_are_settings() -> None:
    batch, scores = make_step(1)

    def weights(name: str) -> torch.Tensor:
        return compute_advantages(
            batch, scores, with_method("atod", turn_weights=name), 1
        ).turn_weights

    assert set(weights("top:0.25").tolist()) == {0.0, 1.0}
    assert torch.allclose(weights("smooth:0.3"), 0.7 * weights("soft_or") + 0.3)
    preserving, tokens = weights("mean_preserving"), batch.completion_mask.sum(-1)
    for trajectory in range(6):
        rows = batch.trajectory_index == trajectory
        mean = (preserving * tokens)[rows].sum() / tokens[rows].sum()
        assert float(mean) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="turn_weights is"):
        weights("best")


def test_rounding_is_no_disagreement() -> None:
    """Two equal models, scored with 0.03 nats of noise, as low precision has it."""
    batch, scores = make_step(1)
    random = torch.Generator().manual_seed(0)
    noise = 0.03 * torch.randn(scores.logprobs.shape, generator=random)
    scores = dataclasses.replace(scores, reference_logprobs=scores.logprobs + noise)
    config = with_method("atod")
    assert compute_advantages(batch, scores, config, 1).turn_weights.min() < 0.5
    guarded = compute_advantages(
        batch, scores, config, 1, min_disagreement=LOW_PRECISION_DISAGREEMENT
    )
    assert guarded.turn_weights.tolist() == [1.0] * len(guarded.turn_weights)


def test_token_level_weights_report_the_mean_of_each_turn() -> None:
    batch, scores = make_step(1)
    advantages = compute_advantages(batch, scores, with_method("atod", turn_weights="token"), 1)
    mask = batch.completion_mask
    size = delta(batch, scores).abs()
    size_range = size[mask].min(), size[mask].max()
    nll = -scores.logprobs
    bound = torch.quantile(nll[mask], 0.98)
    nll = nll.clamp(max=float(bound))
    scaled_d = (size - size_range[0]) / (size_range[1] - size_range[0])
    scaled_h = (nll - nll[mask].min()) / (bound - nll[mask].min())
    weights = torch.where(mask, 1 - (1 - scaled_d) * (1 - scaled_h), 0.0)
    assert torch.allclose(advantages.opd_term, advantages.kappa * weights * delta(batch, scores))
    assert torch.allclose(advantages.turn_weights, weights.sum(-1) / mask.sum(-1))


def test_sod_weights_in_closed_form() -> None:
    d = torch.tensor([0.2, 0.4, 0.1, 0.8, 0.0, 0.3], dtype=torch.float64)
    index = torch.tensor([0, 0, 0, 0, 0, 1])
    turn = torch.arange(6)
    expected, product = [1.0], 1.0
    for earlier, later in zip(d[:4].tolist(), d[1:5].tolist(), strict=True):
        product *= (earlier + 1e-6) / (later + 1e-6)
        expected.append(min(product, 1.2))
    assert expected[1:] == pytest.approx([0.5, 1.2, 0.25, 1.2], abs=1e-5)
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    weights = torch.empty(6, dtype=torch.float64)
    weights[order] = sod_weights(d[order], index[order], turn[order])
    assert weights.tolist() == pytest.approx([*expected, 1.0])
    assert sod_weights(d[:0], index[:0], turn[:0]).shape == (0,)


def test_sod_adds_weighted_distillation_to_grpo() -> None:
    batch, scores = make_step(2)
    advantages = compute_advantages(batch, scores, with_method("sod"), 1)
    weights = sod_weights(advantages.disagreement, batch.trajectory_index, batch.turn_index)
    expected = grpo_values(batch) + weights.unsqueeze(-1) * delta(batch, scores)
    assert torch.allclose(advantages.values, expected, atol=1e-15)
    assert float(weights.max()) <= 1.2


# --- Reward part ---


def test_normalising_over_turns_in_closed_form() -> None:
    # Trajectory 0 won (10) with one penalty; trajectory 1 lost with two. Rows: 10, 9.9, -0.1, -0.1
    penalties = torch.tensor([0.0, 0.1, 0.1, 0.1], dtype=torch.float64)
    scores = TokenScores(logprobs=torch.full((4, 1), -1.0, dtype=torch.float64))
    batch = turn_rows(
        torch.ones(4, 1, dtype=torch.bool),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([0, 1, 0, 1]),
        torch.tensor([9.9, -0.2], dtype=torch.float64),
        torch.tensor([3, 3]),
        penalties,
    )
    over_turns = with_method("grpo", advantage_over="turns")
    values = compute_advantages(batch, scores, over_turns, 1).values.flatten()
    expected = group_advantages(torch.tensor([10.0, 9.9, -0.1, -0.1], dtype=torch.float64))
    assert values.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    over_trajectories = compute_advantages(batch, scores, with_method("grpo"), 1).values.flatten()
    half = math.sqrt(0.5)
    assert over_trajectories.tolist() == pytest.approx([half, half, -half, -half])


def test_normalising_over_turns_keeps_groups_apart() -> None:
    batch, scores = make_step(4)
    values = compute_advantages(
        batch, scores, with_method("grpo", advantage_over="turns"), 1
    ).values
    row_group = batch.group_index[batch.trajectory_index]
    for group in row_group.unique():
        # Every row has a first token; its advantages sum to 0 over the rows of the group.
        assert float(values[row_group == group, 0].sum()) == pytest.approx(0.0, abs=1e-9)


# --- What the trainer asks ---


def test_needs_teacher() -> None:
    assert [method for method in METHODS if not needs_teacher(method)] == ["grpo"]
    with pytest.raises(ValueError, match="unknown method 'ppo'; choose one of atod, grpo"):
        needs_teacher("ppo")
    with pytest.raises(ValueError, match="unknown method"):
        compute_advantages(*make_step(), with_method("ppo"), 1)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "grpo"])
def test_a_missing_teacher_is_refused(method: str) -> None:
    batch, scores = make_step()
    scores = dataclasses.replace(scores, reference_logprobs=None)
    with pytest.raises(ValueError, match=f"method {method} needs reference_logprobs"):
        compute_advantages(batch, scores, with_method(method), 1)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_token_the_teacher_cannot_score_is_refused(value: float) -> None:
    batch, scores = make_step()
    assert scores.reference_logprobs is not None
    scores.reference_logprobs[4, 0] = value
    with pytest.raises(ValueError, match=r"teacher_logprobs is not finite .*\[4\]"):
        compute_advantages(batch, scores, with_method("opd"), 1)


def test_tcod_lets_episodes_grow() -> None:
    tcod = with_method("tcod")
    steps = (1, 5, 6, 11, 12, 60, 173, 174, 500)
    assert [turn_limit(tcod, step, 30) for step in steps] == [1, 1, 2, 2, 3, 11, 29, 30, 30]
    assert {turn_limit(with_method(m), 1, 30) for m in METHODS if m != "tcod"} == {30}


# --- SDAR's loss ---


def test_auxiliary_loss_in_closed_form() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, 0.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[-0.6, -3.0, 0.0], [-0.5, -math.inf, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    logprobs.requires_grad_()
    teacher.requires_grad_()
    loss = auxiliary_loss("sdar", logprobs, teacher, mask, loss_normalizer(mask))
    assert loss is not None

    def gate(gap: float) -> float:
        return 1 / (1 + math.exp(-5 * gap))

    expected = 0.01 * (gate(0.4) * 0.4 + gate(-1.0) * -1.0 + gate(0.0) * 0.0) / 3
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert teacher.grad is None
    assert logprobs.grad is not None
    share = -0.01 / 3
    assert logprobs.grad.flatten().tolist() == pytest.approx(
        [share * gate(0.4), share * gate(-1.0), 0.0, share * 0.5, 0.0, 0.0]
    )


def test_auxiliary_loss_adds_up_over_microbatches() -> None:
    batch, scores = make_step()
    teacher, mask = scores.reference_logprobs, batch.completion_mask
    assert teacher is not None
    normalizer = loss_normalizer(mask)
    whole = auxiliary_loss("sdar", scores.logprobs, teacher, mask, normalizer)
    parts = 0.0
    for rows in torch.arange(len(mask)).chunk(3):
        part = auxiliary_loss(
            "sdar",
            scores.logprobs[rows],
            teacher[rows],
            mask[rows],
            normalizer[rows],
        )
        assert part is not None
        parts += float(part)
    assert whole is not None
    assert parts == pytest.approx(float(whole), rel=1e-12)


def test_only_sdar_has_an_auxiliary_loss() -> None:
    zeros, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    one = torch.ones(1)
    assert all(auxiliary_loss(m, zeros, zeros, mask, one) is None for m in METHODS if m != "sdar")
    with pytest.raises(ValueError, match="sdar needs teacher_logprobs"):
        auxiliary_loss("sdar", zeros, None, mask, one)


# --- Properties ---


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10_000),
    st.sampled_from(METHODS),
    st.sampled_from(["soft_or", "token", "top:0.5", "mean_preserving"]),
    st.sampled_from([math.nan, math.inf, -math.inf, -1e30]),
)
def test_padding_never_influences_anything(seed, method, variant, junk) -> None:
    batch, scores = make_step(seed)
    assert scores.reference_logprobs is not None
    padding = ~batch.completion_mask
    dirty = dataclasses.replace(
        scores,
        logprobs=scores.logprobs.masked_fill(padding, junk),
        reference_logprobs=scores.reference_logprobs.masked_fill(padding, junk),
    )
    config = with_method(method, turn_weights=variant)
    for clean, dirtied in zip(
        tensors_of(compute_advantages(batch, scores, config, 9)),
        tensors_of(compute_advantages(batch, dirty, config, 9)),
        strict=True,
    ):
        assert torch.equal(clean, dirtied)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from(METHODS), st.sampled_from(["trajectories", "turns"]))
def test_order_of_rows_does_not_matter(seed, method, advantage_over) -> None:
    batch, scores = make_step(seed)
    assert scores.reference_logprobs is not None
    rows = len(batch.turn_index)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed + 1))
    shuffled_scores = TokenScores(
        logprobs=scores.logprobs[order],
        reference_logprobs=scores.reference_logprobs[order],
    )
    shuffled = dataclasses.replace(
        batch,
        completion_mask=batch.completion_mask[order],
        trajectory_index=batch.trajectory_index[order],
        turn_index=batch.turn_index[order],
        turn_penalties=batch.turn_penalties[order],
    )
    config = with_method(method, advantage_over=advantage_over)
    for straight, permuted in zip(
        tensors_of(compute_advantages(batch, scores, config, 9)),
        tensors_of(compute_advantages(shuffled, shuffled_scores, config, 9)),
        strict=True,
    ):
        assert torch.allclose(straight[order], permuted, atol=1e-9)


def test_a_large_batch_takes_no_loops() -> None:
    # 128 groups of 3 trajectories of up to 50 turns: about 10,000 turn rows.
    batch, scores = make_step(tokens=8, max_turns=50, groups=128)
    for method in METHODS:
        advantages = compute_advantages(batch, scores, with_method(method), 10)
        assert bool(torch.isfinite(advantages.values).all())


@pytest.mark.parametrize("bonus", [-0.1, 0.1])
def test_the_entropy_bonus_has_either_sign(bonus: float) -> None:
    batch = random_batch()
    batch = dataclasses.replace(batch, returns=torch.zeros_like(batch.returns))
    algorithm = AlgorithmConfig(method="grpo", entropy_bonus=bonus)
    config = RunConfig(algorithm=algorithm, train=TrainConfig(minibatches="1"))
    learner = Learner(make_policy(0), 1e-2, Processes())
    before = score_batch(learner, None, batch, config, PhaseTimes())
    advantages = compute_advantages(batch, before, algorithm, 1)
    update_policy(learner, None, batch, before, advantages, config, torch.Generator())
    after = score_batch(learner, None, batch, config, PhaseTimes())
    assert before.entropies is not None
    assert after.entropies is not None
    assert (float(after.entropies.sum() - before.entropies.sum()) > 0) == (bonus > 0)
