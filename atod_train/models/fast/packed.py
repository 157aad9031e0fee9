"""Next-token logits without padding, for Llama-like models on processors.

Padding is computed like any other token, and on a processor a batch saves little. Here the new
tokens of all rows are one list: matrices multiply all of them at once, and each row attends to its
own keys and no further. The last layer is computed at the last token of each row only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from atod_train.models.decoding import Feed, KVCache
from atod_train.models.fast.llama import decoder_layer, is_llama_on_cpu
from atod_train.models.policy import Policy

_TOKENS = 2**14
"""New tokens of one forward pass; more rows are fed in several passes."""


def can_be_packed(policy: Policy) -> bool:
    """Return whether `packed_logits` takes a policy."""
    return policy.autocast_dtype is None and is_llama_on_cpu(policy.model)


def packed_logits(policy: Policy, cache: KVCache, feeds: Sequence[Feed]) -> Tensor:
    """Compute what `decoding.padded_logits` computes, with the same arguments."""
    widths = torch.tensor([len(feed.ids) for feed in feeds])
    if len(feeds) > 1 and widths.sum() > _TOKENS:
        half = len(feeds) // 2
        return torch.cat(
            [packed_logits(policy, cache, part) for part in (feeds[:half], feeds[half:])]
        )
    base: Any = policy.model.base_model
    ids = torch.tensor([token for feed in feeds for token in feed.ids])
    positions = torch.cat([torch.arange(feed.start, feed.end) for feed in feeds])
    rows = torch.tensor([feed.row for feed in feeds]).repeat_interleave(widths)
    states = base.embed_tokens(ids[None])
    rotary = base.rotary_emb(states, positions[None])
    # A token sees those up to itself; a lone one, like the last one, everything.
    masks = [
        torch.full((len(feed.ids), feed.end), -torch.inf).triu_(feed.start + 1)
        if len(feed.ids) > 1
        else None
        for feed in feeds
    ]
    ends = widths.cumsum(0)[None] - 1
    for layer, stored in zip(base.layers, cache.layers, strict=True):
        is_last = layer is base.layers[-1]
        seen = [None] * len(feeds) if is_last else masks
        attend = partial(_attend, layer.self_attn, stored, feeds, (rows, positions), seen)
        states = decoder_layer(layer, states, rotary, attend, ends if is_last else None)
    return policy.logits(base.norm(states)[0])


def _attend(
    attention: Any,
    stored: Any,
    feeds: Sequence[Feed],
    index: tuple[Tensor, Tensor],
    masks: Sequence[Tensor | None],
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Store [1, heads, t, head_dim] keys and values, and attend row by row."""
    if not stored.is_initialized:
        stored.lazy_initialization(keys, values)
    stored.write(keys[0].transpose(0, 1), values[0].transpose(0, 1), index)
    widths = [1 if mask is None else len(mask) for mask in masks]
    attended = [
        scaled_dot_product_attention(
            part,
            stored.keys[feed.row, :, : feed.end][None],
            stored.values[feed.row, :, : feed.end][None],
            attn_mask=mask,
            scale=attention.scaling,
            enable_gqa=attention.num_key_value_groups > 1,
        )
        for feed, part, mask in zip(feeds, queries.split(widths, dim=2), masks, strict=True)
    ]
    return torch.cat(attended, dim=2)
