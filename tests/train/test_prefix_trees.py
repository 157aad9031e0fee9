"""Sequences that begin alike, computed once: the same scores and gradients, fewer tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from atod_train.batch import make_batch
from atod_train.models import scores as scores_module
from atod_train.models.fast.prefix_trees import crossover_of, join_sequences, split_microbatches
from atod_train.models.from_scratch import build_policy
from atod_train.models.policy import Policy
from atod_train.models.scores import Reference, score_completions, score_microbatches
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Batch, TokenizedTurn, Trajectory, Turn

TOKENIZER = build_word_tokenizer(["take mug from desk"])
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAR = 10_000  # attention costs next to nothing: whatever is shared is joined


def make_model(kind: type, config: type) -> Policy:
    settings = config(**SIZES)
    settings._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return Policy(kind(settings).eval(), TOKENIZER, "test")


LLAMA = make_model(LlamaForCausalLM, LlamaConfig)
QWEN = make_model(Qwen3ForCausalLM, Qwen3Config)


def make_turn(index: int, prompt: list[int], completion: list[int]) -> Turn:
    logprobs = (0.0,) * len(completion)
    tokens = TokenizedTurn(tuple(prompt), tuple(completion), logprobs, "stop", index > 0)
    return Turn(index, (), "", "", 0.0, True, tokens)


def make_trajectory(dialogue: list[list[int]]) -> Trajectory:
    """Of prompt, completion, prompt, completion, .."""
    turns = [
        make_turn(index, dialogue[2 * index], dialogue[2 * index + 1])
        for index in range(len(dialogue) // 2)
    ]
    return Trajectory(0, "task", "kind", tuple(turns), True, False, "terminated", True, 1.0)


def random_batch(seed: int, episodes: int, words: int) -> Batch:
    """Episodes of two turns; of few words, so that many begin alike."""
    draw = torch.Generator().manual_seed(seed)

    def some(most: int) -> list[int]:
        length = int(torch.randint(1, most + 1, (1,), generator=draw))
        return torch.randint(0, words, (length,), generator=draw).tolist()

    prompt = some(8)
    dialogues = [[prompt, some(3), some(4), some(3)] for _ in range(episodes)]
    return make_batch([make_trajectory(dialogue) for dialogue in dialogues], 0)


@contextmanager
def crossover(tokens: int) -> Iterator[None]:
    """0: nothing is joined; FAR: whatever is shared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores_module, "crossover_of", lambda _: tokens)
        yield


def test_the_common_prefix_of_a_group_is_stored_once() -> None:
    dialogues = [[[5, 6, 7], [1, 2]], [[5, 6, 7], [1, 3]], [[5, 6, 7], [1, 2]]]
    batch = make_batch([make_trajectory(dialogue) for dialogue in dialogues], 0)
    ((part, trees),) = split_microbatches(batch, 100, FAR)
    assert trees is not None
    assert trees.ids.tolist() == [[5, 6, 7, 1, 2, 3]]
    assert trees.positions.tolist() == [[0, 1, 2, 3, 4, 4]]
    assert trees.visible[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0, 1],
    ]
    assert part.rows.tolist() == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("policy", [LLAMA, QWEN], ids=["llama", "qwen"])
@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([2, 3, 9]), st.integers(8, 80))
@settings(max_examples=25, deadline=None)
def test_scores_and_gradients_are_those_of_separate_sequences(
    policy: Policy, seed: int, episodes: int, words: int, budget: int
) -> None:
    batch = random_batch(seed, episodes, words)
    weights = torch.randn(batch.completion_ids.shape, generator=torch.Generator().manual_seed(seed))
    found = []
    for tokens in (0, FAR):
        with crossover(tokens):
            scores = score_completions(policy, batch, budget, with_entropy=True)
            policy.model.zero_grad()
            for part, found_here in score_microbatches(policy, batch, budget):
                (found_here.logprobs * weights[part.rows]).sum().backward()
        gradients = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
        found.append((scores.logprobs, scores.entropies, *gradients))
    for first, second in zip(*found, strict=True):
        assert torch.allclose(first, second, atol=1e-4)


def test_a_reference_sees_the_same_trees() -> None:
    batch, reference = random_batch(3, 6, 2), Reference(QWEN)
    with crossover(FAR):
        assert any(trees for _, trees in split_microbatches(batch, 64, FAR))
        shared = score_completions(LLAMA, batch, 64, reference=reference).divergences
    with crossover(0):
        assert not any(trees for _, trees in split_microbatches(batch, 64, 0))
        apart = score_completions(LLAMA, batch, 64, reference=reference).divergences
    assert shared is not None
    assert apart is not None
    assert torch.allclose(shared, apart, atol=1e-5)


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=12),
    st.integers(1, 40),
    st.sampled_from([0, 4, 20, FAR]),
)
def test_joining_covers_everything_and_keeps_to_the_budget(
    sequences: list[list[int]], budget: int, crossing: int
) -> None:
    trees = join_sequences(sequences, budget, crossing)
    assert sorted(i for members, _ in trees for i in members) == list(range(len(sequences)))
    for members, size in trees:
        tokens = {
            tuple(sequences[i][:end]) for i in members for end in range(1, len(sequences[i]) + 1)
        }
        assert size == len(tokens)
        assert len(members) == 1 or size <= budget
    if not crossing:
        assert len(trees) == len(sequences)


def test_long_sequences_that_part_early_stay_apart() -> None:
    sequences = [[0] * 10 + [word] * 90 for word in (1, 2)]
    # Apart 2 (100 + 100^2 / 2000) = 210, joined 190 + 190^2 / 1000 = 226.1: attention costs more.
    assert join_sequences(sequences, 1000, 1000) == [([0], 100), ([1], 100)]
    # Apart 2 (100 + 100^2 / 8000) = 202.5, joined 190 + 190^2 / 4000 = 199.0.
    assert join_sequences(sequences, 1000, 4000) == [([0, 1], 190)]
    assert join_sequences(sequences, 189, 4000) == [([0], 100), ([1], 100)]


def test_where_attention_costs_as_much_as_matrices() -> None:
    # Matrices 2 * 32 * 8 * (4 + 2) + 3 * 32 * 48 = 7680; attention 2 * 4 * 8 = 64 a pair, times 4.
    assert crossover_of(LLAMA.model) == 30


def test_models_with_windows_or_other_positions_share_nothing() -> None:
    mistral = make_model(MistralForCausalLM, MistralConfig)
    assert mistral.model.config.sliding_window
    assert not crossover_of(mistral.model)
    gpt2 = GPT2Config(vocab_size=9, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    gpt2._attn_implementation = "sdpa"
    assert not crossover_of(GPT2LMHeadModel(gpt2))
    assert crossover_of(QWEN.model)
    assert crossover_of(build_policy("micro", TOKENIZER, seed=0).model)
