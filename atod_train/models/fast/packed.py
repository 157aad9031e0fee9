"""A Llama-like decoder on packed tokens: rows of different lengths without padding.

On a processor, where a batch saves no launches, padding is what costs: observations differ in
length, dialogues differ in length, and attention over padding is computed like any other. Here the
new tokens of all rows are one list; matrices multiply all of them at once, and each row attends to
its own keys and no further. Of the last layer, only what the last token of each row needs is
computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from atod_train.models.fast.kv_cache import SlotCache
from atod_train.models.fast.last_layer import can_be_chosen, rotated
from atod_train.models.policy import Policy

_MASK_STEP = 512
"""A mask is made for a multiple of this many tokens."""


@dataclass(frozen=True)
class Feed:
    """New tokens of one row, at least one."""

    slot: int
    """Of the row in the cache."""
    start: int
    """Tokens that it holds already."""
    ids: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens that it holds afterwards."""
        return self.start + len(self.ids)


def can_be_packed(policy: Policy) -> bool:
    """Whether `last_states` takes a policy: Llama-like, on a processor, in one precision."""
    return (
        policy.device.type == "cpu"
        and policy.autocast_dtype is None
        and can_be_chosen(policy.model)
    )


def last_states(model: PreTrainedModel, cache: SlotCache, feeds: Sequence[Feed]) -> Tensor:
    """Feeds new tokens to some rows.

    Args:
        model: of a policy that `can_be_packed`.
        cache: its keys and values are extended; there must be room.
        feeds: of distinct slots.

    Returns:
        [n, width]: the last hidden state after each feed's last token, in their order.
    """
    base: Any = model.base_model
    ids = torch.tensor([token for feed in feeds for token in feed.ids])
    positions = torch.cat([torch.arange(feed.start, feed.end) for feed in feeds])
    widths = torch.tensor([len(feed.ids) for feed in feeds])
    slots = torch.tensor([feed.slot for feed in feeds]).repeat_interleave(widths)
    ends = widths.cumsum(0)
    states = base.embed_tokens(ids)
    cos, sin = (table[0] for table in base.rotary_emb(states[None], positions[None]))
    masks = _masks(feeds)
    sizes = widths.tolist()
    for layer in base.layers:
        normed = layer.input_layernorm(states)
        attention = layer.self_attn
        _write(cache, attention, normed, cos, sin, slots, positions)
        if layer is base.layers[-1]:
            # From here on the last token of each feed is enough; it sees everything.
            chosen = ends - 1
            states, normed, cos, sin = states[chosen], normed[chosen], cos[chosen], sin[chosen]
            sizes, masks = [1] * len(feeds), [None for _ in feeds]
        queries = _heads(attention.q_proj(normed), attention.head_dim)
        queries = rotated(queries, cos[:, None], sin[:, None])
        attended = [
            _attend(cache, attention, feed, part, mask)
            for feed, part, mask in zip(feeds, queries.split(sizes), masks, strict=True)
        ]
        states = states + attention.o_proj(torch.cat(attended))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    result: Tensor = base.norm(states)
    return result


def _masks(feeds: Sequence[Feed]) -> list[Tensor | None]:
    """[w, end] additive: each token sees those up to itself; None where all see everything."""
    longest = max((feed.end for feed in feeds if len(feed.ids) > 1), default=0)
    whole = _causal(-(-longest // _MASK_STEP) * _MASK_STEP)
    return [
        whole[feed.start : feed.end, : feed.end] if len(feed.ids) > 1 else None for feed in feeds
    ]


@lru_cache(maxsize=2)
def _causal(size: int) -> Tensor:
    """[size, size] additive; of each feed's mask a part."""
    return torch.full((size, size), float("-inf")).triu_(1)


def _write(
    cache: SlotCache,
    attention: Any,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    positions: Tensor,
) -> None:
    keys = rotated(_heads(attention.k_proj(normed), attention.head_dim), cos[:, None], sin[:, None])
    values = _heads(attention.v_proj(normed), attention.head_dim)
    cache.write(attention.layer_idx, keys, values, slots, positions)


def _attend(
    cache: SlotCache, attention: Any, feed: Feed, queries: Tensor, mask: Tensor | None
) -> Tensor:
    """What [w, heads, head_dim] queries of a row find; [w, heads * head_dim]."""
    keys, values = cache.read(attention.layer_idx, feed.slot, feed.end)
    found = scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=mask,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    return found[0].transpose(0, 1).flatten(1)


def _heads(states: Tensor, head_dim: int) -> Tensor:
    return states.unflatten(-1, (-1, head_dim))
