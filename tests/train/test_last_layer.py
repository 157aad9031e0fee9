"""States of some positions are those that the whole decoder would give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from atod_train.models.fast.llama import group_positions, is_llama_on_cpu, last_layer_at
from atod_train.models.from_scratch import build_policy
from atod_train.models.policy import Policy
from atod_train.models.scores import states_at
from atod_train.models.word_tokenizer import build_word_tokenizer

TOKENIZER = build_word_tokenizer(["take mug from desk"])


def make_model(layers: int, heads: int, key_heads: int, **options: object) -> Policy:
    config = LlamaConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=64,
        pad_token_id=0,
        **options,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Policy(LlamaForCausalLM(config).eval(), TOKENIZER, "test")


@pytest.mark.parametrize(
    ("layers", "heads", "key_heads"), [(1, 2, 2), (2, 4, 4), (3, 4, 2)], ids=["one", "two", "gqa"]
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_states_and_gradients_are_the_same(
    layers: int, heads: int, key_heads: int, bias: bool
) -> None:
    policy = make_model(layers, heads, key_heads, attention_bias=bias, mlp_bias=bias)
    assert is_llama_on_cpu(policy.model)
    ids = torch.randint(0, len(TOKENIZER), (3, 20))
    row, position = torch.tensor([[0, 0, 0, 1, 1, 2, 1], [19, 0, 7, 3, 3, 12, 4]])
    expected = policy.hidden_states(ids)[row, position]
    found = states_at(policy, ids, row, position)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.randn_like(expected)
    gradients = []
    for states in (expected, found):
        policy.model.zero_grad()
        (states * weights).sum().backward()
        gradients.append([p.grad.clone() for p in policy.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 5
    for first, second in zip(*gradients, strict=True):
        assert torch.allclose(first, second, atol=1e-4)


def test_the_model_is_left_as_it_was() -> None:
    policy = make_model(2, 2, 2)
    ids = torch.randint(0, len(TOKENIZER), (2, 9))
    before = policy.hidden_states(ids)
    with last_layer_at(policy.model, torch.zeros(2, 1, dtype=torch.int64)):
        assert policy.hidden_states(ids).shape == (2, 1, 32)
        with pytest.raises(IndexError):
            policy.hidden_states(torch.full((2, 9), 10**6))
    assert torch.equal(policy.hidden_states(ids), before)


def test_work_is_really_left_out() -> None:
    policy = make_model(2, 2, 2)
    seen = []
    last = policy.model.model.layers[-1].mlp
    last.register_forward_hook(lambda module, given, result: seen.append(result.shape))
    row, position = torch.tensor([[0, 0, 1, 1], [1, 2, 3, 4]])
    states_at(policy, torch.zeros(2, 30, dtype=torch.int64), row, position)
    assert seen == [(2, 2, 32)]


def test_layers_of_other_models_compute_everything() -> None:
    config = Qwen3Config(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
    )
    policy = Policy(Qwen3ForCausalLM(config).eval(), TOKENIZER, "other")
    assert not is_llama_on_cpu(policy.model)
    ids = torch.randint(0, len(TOKENIZER), (2, 10))
    row, position = torch.tensor([[0, 1], [9, 4]])
    expected = policy.hidden_states(ids)[row, position]
    assert torch.equal(states_at(policy, ids, row, position), expected)


def test_models_from_scratch_take_the_short_way() -> None:
    assert is_llama_on_cpu(build_policy("micro", TOKENIZER, seed=0).model)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=40))
def test_positions_are_grouped_by_row(pairs: list[tuple[int, int]]) -> None:
    row, position = (torch.tensor(values) for values in zip(*pairs, strict=True))
    chosen, column = group_positions(row, position, 5)
    assert torch.equal(chosen[row, column], position)
    assert len(set(zip(row.tolist(), column.tolist(), strict=True))) == len(pairs)
    assert chosen.shape == (5, int(torch.bincount(row).max()))
