"""The exact divergence from the teacher, as an alternative to the sampled token's log-ratio."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_baselines import METHODS, delta, grpo_values, make_step, with_method
from test_policy import make_policy, random_batch
from torch import Tensor

from atod_gym.errors import AtodError
from atod_train.algorithm.atod import (
    aggregate_tokens,
    clipped_policy_loss,
    loss_normalizer,
    masked,
    turn_weights,
)
from atod_train.algorithm.methods import (
    compute_advantages,
    exact_top_k,
)
from atod_train.config import ModelConfig, RunConfig
from atod_train.models import scores as scores_module
from atod_train.models.scores import Reference, reverse_kl, score_completions, score_microbatches
from atod_train.records import Batch, TokenScores
from atod_train.studies.study import train_one

LN2 = 0.6931471805599453
OURS = torch.tensor([[0.5, 0.25, 0.25]]).log()
THEIRS = torch.tensor([[0.25, 0.25, 0.5]]).log()


def test_divergence_in_closed_form() -> None:
    # 1/2 ln(2) + 1/4 ln(1) + 1/4 ln(1/2)
    assert float(reverse_kl(OURS, THEIRS)) == pytest.approx(0.25 * LN2)
    # Logits need not be normalised.
    assert float(reverse_kl(OURS + 3, THEIRS - 7)) == pytest.approx(0.25 * LN2)


def test_all_but_the_most_likely_tokens_count_as_one() -> None:
    # (1/2, 1/2) against (1/4, 3/4): 1/2 ln(2) + 1/2 ln(2/3)
    expected = 0.5 * LN2 + 0.5 * torch.tensor(2 / 3).log()
    assert float(reverse_kl(OURS, THEIRS, top_k=1)) == pytest.approx(float(expected))
    assert float(reverse_kl(OURS, THEIRS, top_k=3)) == pytest.approx(0.25 * LN2)


def test_padded_outputs_are_compared_over_common_tokens() -> None:
    padded = torch.cat([THEIRS, torch.full((1, 2), 50.0)], dim=1)
    assert float(reverse_kl(OURS, padded)) == pytest.approx(0.25 * LN2)
    assert float(reverse_kl(padded, OURS)) == pytest.approx(float(reverse_kl(THEIRS, OURS)))


def test_a_small_rest_is_not_rounded_away() -> None:
    # The teacher's rest is 3e-6; in float32 what 1 - p leaves of it has two digits.
    ours = torch.tensor([[0.0, -9.0, -2.0]]).requires_grad_()
    theirs = torch.tensor([[0.0, -13.0, -14.0]])
    exact = reverse_kl(ours.double(), theirs.double(), top_k=1)
    found = reverse_kl(ours, theirs, top_k=1)
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)
    ruled_out = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    (gradient,) = torch.autograd.grad(
        reverse_kl(ours, ruled_out, top_k=1) + reverse_kl(ours + ruled_out, theirs, top_k=1), ours
    )
    assert gradient.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12))
def test_more_tokens_show_more_differences(seed: int, vocabulary: int) -> None:
    random = torch.Generator().manual_seed(seed)
    ours, theirs = 3 * torch.randn(2, 1, vocabulary, generator=random)
    found = [float(reverse_kl(ours, theirs, top_k)) for top_k in range(1, vocabulary + 1)]
    whole = float(reverse_kl(ours, theirs))
    assert found[-1] == pytest.approx(whole, abs=1e-5)
    # With one token less than all, the rest is that one token.
    assert found[-2] == pytest.approx(whole, abs=1e-4)
    assert all(less <= more + 1e-4 for less, more in pairwise(found))
    assert min(found) > -1e-5


def test_gradient_is_the_mean_of_the_sampled_tokens() -> None:
    """sum_v p(v) grad loss(v) with the advantage w delta_v is grad w KL, before any update."""
    weight, vocabulary = 0.7, 5
    random = torch.Generator().manual_seed(0)
    start = torch.randn(vocabulary, generator=random, dtype=torch.float64)
    theirs = torch.randn(vocabulary, generator=random, dtype=torch.float64).log_softmax(-1)
    one = torch.ones(1, 1, dtype=torch.bool)
    sampled = torch.zeros(vocabulary, dtype=torch.float64)
    for token in range(vocabulary):
        logits = start.clone().requires_grad_()
        logprob = logits.log_softmax(-1)[token].view(1, 1)
        old = logprob.detach()
        loss, _ = clipped_policy_loss(logprob, old, weight * (theirs[token] - old), one)
        loss.backward()
        assert logits.grad is not None
        sampled += old.exp().item() * logits.grad
    logits = start.clone().requires_grad_()
    divergences = reverse_kl(logits[None], theirs[None]).view(1, 1)
    aggregate_tokens(weight * divergences, one, loss_normalizer(one)).backward()
    torch.testing.assert_close(logits.grad, sampled)


# -- advantages ----------------------------------------------------------------------------------


def _step(seed: int = 0) -> tuple[Batch, TokenScores, Tensor]:
    batch, scores = make_step(seed)
    random = torch.Generator().manual_seed(seed + 1)
    divergences = torch.rand(batch.completion_mask.shape, generator=random, dtype=torch.float64)
    return batch, replace(scores, divergences=divergences), divergences


def test_divergences_take_the_place_of_the_log_ratio() -> None:
    batch, scores, divergences = _step()
    found = compute_advantages(batch, scores, with_method("atod"), 40)
    plain = compute_advantages(*make_step(), with_method("atod"), 40)
    mask = batch.completion_mask
    count = mask.sum(-1)
    d = masked(divergences, mask).sum(-1) / count
    torch.testing.assert_close(found.disagreement, d)
    torch.testing.assert_close(found.uncertainty, plain.uncertainty)
    expected = turn_weights(d, plain.uncertainty, trajectory_index=batch.trajectory_index)
    torch.testing.assert_close(found.turn_weights, expected)
    # kappa(40) = 0.55, rho(40) = 1.5
    assert found.divergence_weights is not None
    torch.testing.assert_close(found.divergence_weights, (0.55 * expected)[:, None])
    torch.testing.assert_close(found.values, 1.5 * grpo_values(batch))
    torch.testing.assert_close(
        found.opd_term, masked(-0.55 * expected[:, None] * divergences, mask)
    )


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("grpo", "sdar")])
@pytest.mark.parametrize("variant", ["soft_or", "uniform", "disagreement", "token", "top:0.5"])
def test_every_method_and_weight_takes_them(method: str, variant: str) -> None:
    batch, scores, divergences = _step()
    settings = with_method(method, turn_weights=variant)
    found = compute_advantages(batch, scores, settings, 3)
    mask = batch.completion_mask
    assert found.divergence_weights is not None
    torch.testing.assert_close(
        found.opd_term, masked(-found.divergence_weights * divergences, mask)
    )
    torch.testing.assert_close(found.values, found.rl_term)


def test_a_divergence_of_minus_delta_weighs_turns_alike() -> None:
    batch, scores = make_step()
    found = compute_advantages(
        batch, replace(scores, divergences=-delta(batch, scores)), with_method("mix"), 1
    )
    plain = compute_advantages(batch, scores, with_method("mix"), 1)
    torch.testing.assert_close(found.opd_term, plain.opd_term)
    torch.testing.assert_close(found.disagreement, plain.disagreement)


def test_where_it_applies() -> None:
    assert exact_top_k(with_method("atod", opd_signal="exact")) is not None
    assert exact_top_k(with_method("atod")) is None
    assert exact_top_k(with_method("grpo", opd_signal="exact")) is None
    with pytest.raises(ValueError, match="sdar compares sampled tokens only"):
        exact_top_k(with_method("sdar", opd_signal="exact"))
    for wrong in ("top-k", "top-k:0", "top-k:x", "exact:3", "kl"):
        with pytest.raises(ValueError, match="opd_signal is"):
            exact_top_k(with_method("opd", opd_signal=wrong))
    assert exact_top_k(with_method("opd", opd_signal="top-k:64")) == 64
    assert exact_top_k(with_method("opd", opd_signal="exact")) == 0


def test_a_server_cannot_give_it(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(teacher="http://127.0.0.1:9"),
        algorithm=with_method("atod", opd_signal="exact"),
    )
    with pytest.raises(AtodError, match="a teacher in this process"):
        train_one(config, tmp_path)


# -- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("budget", [1, 10_000])
def test_scores_equal_those_of_all_logits(
    top_k: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, batch = make_policy(0), make_policy(1), random_batch()
    teacher.model.resize_token_embeddings(128, mean_resizing=False)
    ours = student.model(input_ids=batch.input_ids).logits
    # Rows of the embedding that no token has are no part of the distribution.
    theirs = teacher.model(input_ids=batch.input_ids).logits[..., : teacher.vocabulary]
    columns = torch.arange(batch.completion_ids.shape[1])
    places = (batch.start[:, None] + columns - 1).clamp(max=batch.input_ids.shape[1] - 1)
    at = (batch.sequence_index[:, None], places)
    mask = batch.completion_mask
    expected = masked(reverse_kl(ours[at], theirs[at], top_k), mask)
    chosen = theirs.log_softmax(-1)[at].gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    reference = Reference(teacher, top_k)
    found = score_completions(student, batch, budget, with_entropy=True, reference=reference)
    assert found.divergences is not None
    assert found.reference_logprobs is not None
    torch.testing.assert_close(found.divergences, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.reference_logprobs, masked(chosen, mask), rtol=1e-4, atol=1e-5)
    assert not found.divergences.requires_grad
    expected.sum().backward()
    wanted = {n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None}
    for limit in (2**26, 7 * student.embedding_rows):
        monkeypatch.setattr(scores_module, "LOGITS_PER_CHUNK", limit)
        student.model.zero_grad()
        for _, scores in score_microbatches(student, batch, budget, reference=reference):
            assert scores.divergences is not None
            scores.divergences.sum().backward()
        for name, weight in student.model.named_parameters():
            torch.testing.assert_close(weight.grad, wanted[name], rtol=1e-3, atol=1e-4)
