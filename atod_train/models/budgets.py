"""Compute how many episodes and tokens fit the memory of a device.

Both affect memory and speed only: results stay the same, up to rounding.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from atod_train.models.policy import Policy

_CACHE_SHARE = 0.2
"""Share of a processor's memory for the keys and values of a rollout."""
_DEVICE_SHARE = 0.5
"""Share of a GPU's free memory for keys and values, or for an update's hidden states."""
_TRAINED = 16
"""Bytes of a trained weight: the weight, its gradient and two moments in float32."""
_NUMBERS_PER_WIDTH = 5
"""Numbers that a layer keeps for its backward pass, per token and output of its matrices:
measured with Llama, Qwen2 and Qwen3."""
_FEWEST_TOKENS, _MOST_TOKENS, _TOKENS_ON_PROCESSOR = 1024, 16384, 2048


def episodes_at_once(policy: Policy, max_context: int, processes: int = 1) -> int:
    """Return how many episodes of `max_context` tokens fit memory with their keys and values.

    Args:
        policy: The model.
        max_context: Longest sequence in tokens.
        processes: Number of processes that share a processor's memory; each has its own GPU.
    """
    _, _, _, keys = _widths(policy.model.config)
    per_token = 2 * keys * policy.layer_dtype.itemsize * policy.model.config.num_hidden_layers
    if policy.device.type == "cuda":
        # Memory that the allocator reserves without using it is free, too.
        free, _ = torch.cuda.mem_get_info(policy.device)
        free += torch.cuda.memory_reserved(policy.device)
        budget = _DEVICE_SHARE * (free - torch.cuda.memory_allocated(policy.device))
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        budget = _CACHE_SHARE * (memory // processes)
    return max(1, int(budget) // (per_token * max_context))


def tokens_at_once(policy: Policy) -> int:
    """Return the tokens of a micro-batch without a setting: 2048 on a processor.

    On a GPU it depends on the model and the size of the memory. Without trained weights there is
    no backward pass, so one layer at a time needs memory.
    """
    if policy.device.type != "cuda":
        return _TOKENS_ON_PROCESSOR
    config = policy.model.config
    layers, size = config.num_hidden_layers, policy.layer_dtype.itemsize
    width, mlp, queries, keys = _widths(config)
    per_token = _NUMBERS_PER_WIDTH * size * (width + mlp + queries + 2 * keys)
    if policy.gradient_checkpointing:
        per_token += 4 * width * layers  # one layer at a time, and the input of each
    elif any(weight.requires_grad for weight in policy.model.parameters()):
        per_token *= layers
    weights = sum(
        weight.numel() * (_TRAINED if weight.requires_grad else weight.itemsize)
        for weight in policy.model.parameters()
    )
    memory = torch.cuda.get_device_properties(policy.device).total_memory
    fits = int(_DEVICE_SHARE * (memory - weights)) // per_token
    return max(_FEWEST_TOKENS, min(_MOST_TOKENS, fits // 1024 * 1024))


def _widths(config: Any) -> tuple[int, int, int, int]:
    """Return the widths of hidden states, feed-forward network, queries, and keys of a layer."""
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    return width, mlp, heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
