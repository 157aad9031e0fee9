from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from atod_gym.errors import AtodError
from atod_gym.prompts import PromptStyle
from atod_train.batch import make_batch
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator, SampledTokens
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn

pytestmark = pytest.mark.usefixtures("feeding")

TINY = ModelShape(layers=2, width=32, heads=2, mlp_width=48, max_positions=512)
POLICY: Policy = build_policy(TINY, build_word_tokenizer(["take mug from desk"]), seed=0)
# Random weights give nearly equal probabilities; larger ones make a distribution with a shape.
with torch.no_grad():
    for parameter in POLICY.model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(8.0)
VOCABULARY = len(POLICY.tokenizer)


def make_generator(
    temperature: float = 1.0,
    limit: int = 6,
    seed: int = 0,
    style: PromptStyle = "chat",
    max_context: int | None = None,
    stop_ids: frozenset[int] | None = None,
) -> Generator:
    dialogue = DialogueEncoder(POLICY.tokenizer, style)
    # With this many stop tokens a random model ends some completions early and others late.
    dialogue.stop_ids = frozenset(range(4, 24)) if stop_ids is None else stop_ids
    return Generator(
        POLICY,
        dialogue,
        temperature=temperature,
        max_completion_tokens=limit,
        max_context=max_context,
        generator=torch.Generator().manual_seed(seed),
    )


def random_prompts(rows: int, seed: int, low: int = 3, high: int = 12) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (rows,), generator=random).tolist()
    return [torch.randint(5, VOCABULARY, (n,), generator=random).tolist() for n in lengths]


def continued(
    generator: Generator, new: Sequence[Sequence[int]], rows: Sequence[int]
) -> list[SampledTokens]:
    """Completions of prompts that in chat style follow what the episodes hold."""
    episodes = [generator._episodes[row] for row in rows]
    is_chat = generator.dialogue.style == "chat"
    held = [episode.ids if is_chat else [] for episode in episodes]
    prompts = [[*before, *ids] for before, ids in zip(held, new, strict=True)]
    return generator.prompt(prompts, rows)


def play(generator: Generator, plan: Sequence[Sequence[int]], episodes: int) -> list[Trajectory]:
    """Episodes whose rows `plan[k]` are active in turn k, with random observations."""
    generator.start(episodes)
    turns: list[list[Turn]] = [[] for _ in range(episodes)]
    for number, rows in enumerate(plan):
        prompts = random_prompts(episodes, seed=number)
        completions = continued(generator, [prompts[row] for row in rows], rows)
        for row, completion in zip(rows, completions, strict=True):
            extends = generator.dialogue.style == "chat" and bool(turns[row])
            tokens = TokenizedTurn(
                tuple(prompts[row]),
                completion.ids,
                completion.logprobs,
                completion.finish_reason,
                extends,
            )
            turns[row].append(Turn(len(turns[row]), (), "", "", 0.0, True, tokens))
    return [
        Trajectory(0, "t", "k", tuple(record), True, False, "terminated", True, 1.0)
        for record in turns
    ]


EVERYONE = [range(6)] * 4
SHRINKING = [range(6), [5, 1, 3, 0], [3, 5, 0], [5]]
ALTERNATING = [range(6), [4, 5], [0, 5, 2], [1, 2, 3, 4], range(6)]


@pytest.mark.parametrize("plan", [EVERYONE, SHRINKING, ALTERNATING])
@pytest.mark.parametrize("style", ["chat", "window"])
def test_sampling_logprobs_equal_the_trainers(
    plan: Sequence[Sequence[int]], style: PromptStyle
) -> None:
    batch = make_batch(play(make_generator(style=style), plan, 6), 0)
    recomputed = score_completions(POLICY, batch).logprobs
    torch.testing.assert_close(batch.sampling_logprobs, recomputed, rtol=0, atol=1e-4)
    assert batch.completion_mask.sum(dim=1).unique().numel() > 1  # ragged indeed


def test_cached_greedy_decoding_equals_recomputing() -> None:
    records = play(make_generator(temperature=0), SHRINKING, 6)
    for record in records:
        context: list[int] = []
        for turn in record.turns:
            context += turn.tokens.prompt_ids
            for token in turn.tokens.completion_ids:
                logits = POLICY.model(input_ids=torch.tensor([context]), use_cache=False).logits
                assert int(logits[0, -1].argmax()) == token
                context.append(token)


def test_greedy_needs_no_randomness() -> None:
    first = play(make_generator(temperature=0, seed=1), EVERYONE, 6)
    second = play(make_generator(temperature=0, seed=2), EVERYONE, 6)
    assert [t.tokens.completion_ids for r in first for t in r.turns] == [
        t.tokens.completion_ids for r in second for t in r.turns
    ]


def test_sampling_is_reproducible() -> None:
    runs = [play(make_generator(seed=seed), ALTERNATING, 6) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_starting_again_continues_the_random_stream() -> None:
    generator = make_generator()
    first, second = play(generator, EVERYONE, 6), play(generator, EVERYONE, 6)
    assert first != second


@pytest.mark.parametrize("plan", [EVERYONE, ALTERNATING])
def test_a_row_does_not_depend_on_the_others(plan: Sequence[Sequence[int]]) -> None:
    together = play(make_generator(), plan, 6)
    for row in (0, 5):
        alone = play(make_generator(), [[r for r in rows if r == row] for rows in plan], 6)
        assert len(alone[row].turns) == len(together[row].turns)
        for one, other in zip(alone[row].turns, together[row].turns, strict=True):
            assert one.tokens.completion_ids == other.tokens.completion_ids
            torch.testing.assert_close(
                torch.tensor(one.tokens.sampling_logprobs),
                torch.tensor(other.tokens.sampling_logprobs),
                rtol=0,
                atol=1e-4,
            )


def test_completions_end_at_a_stop_token_or_the_limit() -> None:
    generator = make_generator()
    seen = set()
    for record in play(generator, EVERYONE, 6):
        for turn in record.turns:
            ids = turn.tokens.completion_ids
            stopped = ids[-1] in generator.dialogue.stop_ids
            assert turn.tokens.finish_reason == ("stop" if stopped else "length")
            assert stopped or len(ids) == 6
            assert not any(token in generator.dialogue.stop_ids for token in ids[:-1])
            assert len(turn.tokens.sampling_logprobs) == len(ids)
            seen.add(turn.tokens.finish_reason)
    assert seen == {"stop", "length"}


def test_prompts_that_do_not_fit_are_refused_and_change_nothing() -> None:
    generator = make_generator(limit=4, max_context=20, stop_ids=frozenset())
    generator.start(2)
    prompts = [[30] * 16, [30] * 5]
    for wrong in ([31] * 17, []):
        with pytest.raises(AtodError, match="1 to 16"):
            generator.prompt([prompts[0], wrong], [0, 1])
    again = make_generator(limit=4, max_context=20, stop_ids=frozenset())
    again.start(2)
    assert generator.prompt(prompts, [0, 1]) == again.prompt(prompts, [0, 1])
    assert [len(episode.ids) for episode in generator._episodes] == [20, 9]


@torch.no_grad()
def test_temperature_scales_the_distribution() -> None:
    generator = make_generator(temperature=0.5, limit=1)
    generator.start(3)
    prompts = random_prompts(3, seed=0)
    for prompt, completion in zip(prompts, generator.prompt(prompts, range(3)), strict=True):
        logits = POLICY.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
        expected = (logits / 0.5).log_softmax(dim=-1)[completion.ids[0]]
        assert completion.logprobs[0] == pytest.approx(expected.item(), abs=1e-4)


@torch.no_grad()
def test_samples_follow_the_distribution() -> None:
    generator = make_generator(limit=1)
    generator.start(2000)
    prompt = [7, 30, 9]
    completions = generator.prompt([prompt] * 2000, range(2000))
    ids = torch.tensor([completion.ids[0] for completion in completions])
    found = torch.bincount(ids, minlength=VOCABULARY) / 2000
    logits = POLICY.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0, -1]
    expected = logits.softmax(dim=-1)
    # Four standard errors, and a little for the smallest ones.
    error = (expected * (1 - expected) / 2000).sqrt()
    assert ((found - expected).abs() <= 4 * error + 1e-3).all()


def test_grouped_query_attention_of_another_architecture() -> None:
    config = Qwen3Config(
        vocab_size=VOCABULARY + 19,  # padded, as real models have it
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    model = Qwen3ForCausalLM(config).eval()
    policy = Policy(model=model, tokenizer=POLICY.tokenizer, name="qwen")
    generator = Generator(
        policy,
        DialogueEncoder(POLICY.tokenizer),
        max_completion_tokens=5,
        generator=torch.Generator().manual_seed(0),
    )
    batch = make_batch(play(generator, SHRINKING, 6), 0)
    recomputed = score_completions(policy, batch).logprobs
    torch.testing.assert_close(batch.sampling_logprobs, recomputed, rtol=0, atol=1e-4)


def test_lower_precision_stays_close() -> None:
    policy = dataclasses.replace(POLICY, autocast_dtype=torch.bfloat16)
    generator = Generator(policy, DialogueEncoder(POLICY.tokenizer), max_completion_tokens=5)
    batch = make_batch(play(generator, SHRINKING, 6), 0)
    recomputed = score_completions(policy, batch).logprobs
    difference = (batch.sampling_logprobs - recomputed).abs()[batch.completion_mask]
    # The weights of these tests are scaled up, and so is the rounding.
    assert difference.mean() < 0.2


class _Conversions(TorchDispatchMode):
    """Counts how often a weight is converted to another precision."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.place, self.count = weight.data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() == self.place:
            self.count += 1
        return func(*args, **(kwargs or {}))


def test_weights_are_converted_to_lower_precision_once_a_turn() -> None:
    model = copy.deepcopy(POLICY.model).requires_grad_(True)
    policy = dataclasses.replace(POLICY, model=model, autocast_dtype=torch.bfloat16)
    generator = Generator(policy, DialogueEncoder(POLICY.tokenizer), max_completion_tokens=8)
    generator.start(2)
    with _Conversions(policy.model.get_parameter("model.layers.0.mlp.up_proj.weight")) as seen:
        for turn in (1, 2):
            completions = generator.prompt([[5, 6], [7, 8]], [0, 1])
            assert max(len(one.ids) for one in completions) > 1
            assert seen.count == turn


def test_bad_settings_are_refused() -> None:
    with pytest.raises(AtodError, match="temperature"):
        make_generator(temperature=-1.0)
    with pytest.raises(AtodError, match="max_context=600"):
        make_generator(max_context=600)
