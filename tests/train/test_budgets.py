"""Check the memory budgets of a device against closed forms."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atod_train.models.budgets import episodes_at_once, tokens_at_once
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.policy import Policy
from atod_train.models.word_tokenizer import build_word_tokenizer

SHAPE = ModelShape(layers=3, width=32, heads=2, mlp_width=48)
POLICY = build_policy(SHAPE, build_word_tokenizer(["take mug"]), seed=0)
MIXED = replace(POLICY, autocast_dtype=torch.bfloat16)
WEIGHTS = sum(weight.numel() for weight in POLICY.model.parameters())
PER_TOKEN = 5 * 2 * (32 + 48 + 32 + 2 * 32)
"""Bytes that a layer keeps of a token in bfloat16."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make policies be on a GPU, whose memory is set here."""
    memory = SimpleNamespace(total_memory=0, free=0, reserved=0, allocated=0)
    monkeypatch.setattr(Policy, "device", torch.device("cuda"))
    for name, value in (
        ("get_device_properties", lambda _: memory),
        ("mem_get_info", lambda _: (memory.free, memory.total_memory)),
        ("memory_reserved", lambda _: memory.reserved),
        ("memory_allocated", lambda _: memory.allocated),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return memory


def test_half_of_the_free_memory_of_a_gpu_is_for_keys_and_values(gpu: Any) -> None:
    # 3 layers of 32 keys and 32 values, 2 bytes each: 384 bytes for a token.
    gpu.free, gpu.reserved, gpu.allocated = 384 * 100 * 10, 384 * 100 * 5, 384 * 100
    assert episodes_at_once(MIXED, 100) == 7
    assert episodes_at_once(POLICY, 100) == 3
    assert episodes_at_once(MIXED, 10**6) == 1


def test_a_microbatch_takes_half_of_what_training_leaves(gpu: Any) -> None:
    def memory(tokens: int, layers: int = 3, more: int = 0) -> int:
        return 16 * WEIGHTS + 2 * tokens * (PER_TOKEN * layers + more)

    gpu.total_memory = memory(5000)
    assert tokens_at_once(MIXED) == 4096
    assert tokens_at_once(POLICY) == 2048  # float32
    gpu.total_memory = memory(5000, 1, more=4 * 32 * 3)
    assert tokens_at_once(replace(MIXED, gradient_checkpointing=True)) == 4096
    gpu.total_memory = memory(10**6)
    assert tokens_at_once(MIXED) == 16384
    gpu.total_memory = 0
    assert tokens_at_once(MIXED) == 1024


def test_frozen_weights_leave_more_memory(gpu: Any) -> None:
    policy = replace(MIXED, model=copy.deepcopy(POLICY.model).requires_grad_(False))
    gpu.total_memory = 4 * WEIGHTS + 2 * 5000 * PER_TOKEN
    assert tokens_at_once(policy) == 4096
    assert tokens_at_once(MIXED) == 1024
    norm = policy.model.model.norm.weight.requires_grad_()  # as adapters are
    gpu.total_memory = 4 * WEIGHTS + 12 * len(norm) + 2 * 5000 * PER_TOKEN * 3
    assert tokens_at_once(policy) == 4096


def test_a_microbatch_on_a_processor() -> None:
    assert tokens_at_once(POLICY) == 2048
