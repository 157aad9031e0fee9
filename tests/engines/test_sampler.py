"""Sampling with vLLM in this process: token-exact, and from the student's own distribution."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from served_vllm import ServedVllm
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
)

from atod_gym.errors import AtodError
from atod_gym.parsing import CompletionFormat
from atod_gym.types import Message
from atod_train.files import read_json
from atod_train.models import vllm_sampler
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator, SampledTokens
from atod_train.models.lora import add_adapters
from atod_train.models.policy import Policy
from atod_train.models.vllm_sampler import VllmSampler
from atod_train.models.word_tokenizer import build_word_tokenizer

SHAPE = ModelShape(layers=2, width=64, heads=2, mlp_width=96, max_positions=256)
WORDS = "<think> </think> <action> </action> take mug 1 look"
TAGS = CompletionFormat("tags")
PADDED = 9
MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
TOLERANCE = 1e-4
"""Nats; the largest difference of a token was 2e-5."""


@pytest.fixture
def policy() -> Policy:
    """A model of eight words whose padded rows would be likelier than its tokens.

    All tests have models of one shape, so they share an engine.
    """
    made = build_policy(SHAPE, build_word_tokenizer([WORDS]), 0)
    vocabulary = made.vocabulary
    made.model.resize_token_embeddings(vocabulary + PADDED)
    with torch.no_grad():
        for weight in made.model.parameters():
            if weight.dim() == 2:
                weight.mul_(4.0)
        made.model.get_input_embeddings().weight[vocabulary:].mul_(10.0)
    assert made.vocabulary == vocabulary
    return made


def sample(
    policy: Policy, kind: type = VllmSampler, *, count: int = 24, **settings: Any
) -> tuple[list[Sequence[int]], list[SampledTokens]]:
    """Two turns of some episodes whose prompts begin alike: all prompts, all completions."""
    dialogue = DialogueEncoder(policy.tokenizer)
    if kind is VllmSampler:
        settings.setdefault("share", 0.01)
    sampler = kind(policy, dialogue, max_completion_tokens=16, max_context=128, **settings)
    sampler.start(range(count))
    # Longer than a block of cached keys and values.
    first = dialogue.first([Message("user", "take mug 1 look " * 12)])
    prompts: list[Sequence[int]] = [first] * count
    found = sampler.prompt(prompts, range(count))
    message = (Message("user", "look"),)
    for completion in list(found):
        after = dialogue.continuation(message, completion.finish_reason)
        prompts.append([*first, *completion.ids, *after])
    return prompts, found + sampler.prompt(prompts[count:], range(count))


def largest_difference(
    policy: Policy,
    prompts: list[Sequence[int]],
    found: list[SampledTokens],
    temperature: float = 1.0,
) -> float:
    """Between log-probs of sampling and those of plain forward passes, in nats."""
    most = 0.0
    for prompt, completion in zip(prompts, found, strict=True):
        ids = torch.tensor([[*prompt, *completion.ids]])
        with torch.no_grad():
            logits = policy.logits(policy.hidden_states(ids))[0, len(prompt) - 1 : -1]
        own = (logits / temperature).log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
        most = max(most, float((own - torch.tensor(completion.logprobs)).abs().max()))
    chances = [value for completion in found for value in completion.logprobs]
    assert sum(chances) < -0.1 * len(chances)  # of a model that could have written something else
    return most


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_log_probs_are_those_of_the_distribution_sampled_from(
    policy: Policy, temperature: float
) -> None:
    prompts, found = sample(policy, temperature=temperature)
    assert max(token for one in found for token in one.ids) < policy.vocabulary
    assert largest_difference(policy, prompts, found, temperature) < TOLERANCE
    assert {one.finish_reason for one in found} == {"stop", "length"}
    for one in found:
        ends = one.ids[-1] in DialogueEncoder(policy.tokenizer).stop_ids
        assert ends == (one.finish_reason == "stop")
        assert ends or len(one.ids) == 16


def test_greedy_completions_are_those_of_the_plain_sampler(policy: Policy) -> None:
    prompts, found = sample(policy, temperature=0.0)
    _, plain = sample(policy, Generator, temperature=0.0)
    assert [one.ids for one in found] == [one.ids for one in plain]
    assert largest_difference(policy, prompts, found) < TOLERANCE


def test_tokens_are_drawn_with_their_probabilities(policy: Policy) -> None:
    _, found = sample(policy, count=1500)
    dialogue = DialogueEncoder(policy.tokenizer)
    first = dialogue.first([Message("user", "take mug 1 look " * 12)])
    with torch.no_grad():
        logits = policy.logits(policy.hidden_states(torch.tensor([first])))[0, -1]
    counts = torch.bincount(
        torch.tensor([one.ids[0] for one in found[:1500]]), minlength=policy.vocabulary
    )
    expected = 1500 * logits.softmax(-1)
    often = expected > 5
    chi_squared = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    # Its mean is the number of tokens, its standard deviation the root of twice that.
    assert chi_squared < often.sum() + 5 * (2 * often.sum()) ** 0.5


def test_episodes_have_streams_of_their_own(policy: Policy) -> None:
    _, many = sample(policy)
    _, few = sample(policy, count=5)
    assert many[:5] + many[24:29] == few
    assert len({one.ids for one in many}) > 24


def test_completions_end_with_the_action_but_not_inside_a_thought(policy: Policy) -> None:
    _, ended = sample(policy, count=200, completion_format=TAGS)
    _, free = sample(policy, count=200)
    decode = DialogueEncoder(policy.tokenizer).decode
    in_thought = 0
    for one, whole in zip(ended[:200], free[:200], strict=True):
        assert one.ids == whole.ids[: len(one.ids)]
        text = decode(one.ids)
        if one.finish_reason == "action":
            assert text.endswith("</action>")
            assert TAGS.end_of_action(text) == len(text)
            assert TAGS.end_of_action(decode(one.ids[:-1])) is None
        else:
            assert one == whole
            in_thought += "</action>" in text
    assert {one.finish_reason for one in ended} == {"stop", "length", "action"}
    assert in_thought


def change(policy: Policy) -> None:
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.requires_grad:
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
                weight.add_(noise * 0.05)


def test_changed_weights_are_copied_and_old_prefixes_forgotten(policy: Policy) -> None:
    before = sample(policy)[1]
    change(policy)
    prompts, found = sample(policy)
    assert found != before
    assert largest_difference(policy, prompts, found) < TOLERANCE


def test_adapters_are_merged(policy: Policy) -> None:
    add_adapters(policy.model, 4, torch.float32)
    change(policy)
    prompts, found = sample(policy)
    assert largest_difference(policy, prompts, found) < TOLERANCE


@pytest.mark.parametrize("left_out", ["lm_head", "layers.1.mlp.down_proj", "cache"])
def test_a_wrong_copy_is_noticed_before_the_rollout_continues(
    policy: Policy, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(policy)
    whole, played = vllm_sampler._weights, []

    def partly(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, weight) for name, weight in whole(policy) if left_out not in name)

    def noted(*arguments: Any) -> Any:
        played.append(arguments)
        return prompt(*arguments)

    prompt = VllmSampler.prompt
    monkeypatch.setattr(VllmSampler, "prompt", noted)
    if left_out == "cache":
        core = vllm_sampler._running[0].core
        monkeypatch.setattr(core, "reset_prefix_cache", lambda: True)
    else:
        monkeypatch.setattr(vllm_sampler, "_weights", partly)
    change(policy)
    with pytest.raises(AtodError, match=r"weights in vLLM are not the student's\. Nothing was"):
        sample(policy)
    assert len(played) == 1
    # Nor is it forgotten: what was not right is copied again.
    monkeypatch.undo()
    change(policy)
    sample(policy)


def test_episodes_wait_where_memory_is_short(policy: Policy) -> None:
    _, found = sample(policy, completion_format=TAGS)
    core = vllm_sampler._running[0].core
    # Room for two of 24 episodes.
    prompts, waiting = sample(policy, completion_format=TAGS, share=300_000 / MEMORY)
    assert vllm_sampler._running[0].core is not core
    assert waiting == found
    assert largest_difference(policy, prompts, waiting) < TOLERANCE


def of_family(config: type[Any], **settings: Any) -> Policy:
    """A model with random weights whose heads are as wide as vLLM needs."""
    tokenizer = build_word_tokenizer([WORDS])
    sizes = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    layers = {"num_hidden_layers": 2, "intermediate_size": 96, "max_position_embeddings": 256}
    shape = config(vocab_size=len(tokenizer) + PADDED, **{**sizes, **layers, **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4.0 if weight.dim() == 2 else 1.0)
    return Policy(model, tokenizer, config.model_type)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, GemmaConfig])
def test_other_families_have_names_of_their_own(config: type[Any]) -> None:
    policy = of_family(config, pad_token_id=0)
    prompts, found = sample(policy)
    assert largest_difference(policy, prompts, found) < TOLERANCE


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        (lambda: of_family(LlamaConfig, head_dim=16), "head_dim=16"),
        # The student itself could not be run any more.
        (lambda: of_family(Olmo2Config), "with transformers"),
    ],
)
def test_a_model_that_vllm_cannot_serve_is_one_line(policy: Any, told: str) -> None:
    refused = policy()
    with pytest.raises(AtodError, match=rf"^vLLM cannot serve .* on cpu: .*{told}.* plain\.$"):
        sample(refused)
    refused.hidden_states(torch.tensor([[5, 6]]))


def test_a_run_is_killed_and_resumed_with_sampler_and_teacher_of_vllm(
    vllm_server: ServedVllm, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    run = out / "atod-seed0"
    settings = f"""houses-tiny --out {out} --model.student smollm2 --model.teacher {vllm_server.url}
        --model.sampler vllm:0.05 --model.lora-rank 8 --model.max-context 1024 --env.max-turns 3
        --env.eval-splits valid_seen --env.eval-tasks 2 --env.eval-modes greedy --train.steps 3
        --train.tasks-per-step 2 --train.group-size 2 --train.max-completion-tokens 12
        --train.minibatches 1 --train.save-every 1 --train.lr 1e-4"""
    command = [sys.executable, "-m", "atod_train.cli"]
    with (
        log.open("wb") as output,
        subprocess.Popen([*command, *settings.split()], stdout=output, stderr=output) as process,
    ):
        while not len(load_steps(run)) >= 2:
            assert process.poll() is None, log.read_text()
            time.sleep(0.2)
        process.kill()
    resume = [*command, "resume", str(out)]
    done = subprocess.run(resume, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = load_steps(run)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert len(read_json(run / "manifest.json")["resumed"]) == 1
    assert all(row["rollout/logprob_drift"] < 1e-3 for row in rows)
    assert all(row["disagreement"] > 1e-3 for row in rows[1:])
    assert rows[0]["disagreement"] < 1e-3  # the teacher is the start
    assert read_json(run / "config.json")["model"]["sampler"] == "vllm:0.05"


def load_steps(run: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
