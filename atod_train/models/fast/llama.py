"""Compute the layers of Llama on processors only at needed positions.

Scoring: the last layer needs keys and values at all positions; queries, output projection
and feed-forward network only at positions whose hidden state is used. If completions are a tenth of
a dialogue, that saves a decoder of two layers a third of its work.

Sampling: padding is computed like any other token, and on a processor a batch saves little. The new
tokens of all rows form one list: matrices multiply all of them together, and each row attends only
to its own keys. The last layer is computed at the last token of each row only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, rotate_half

from atod_train.models.decoding import Feed, KVCache
from atod_train.models.policy import Policy, additive_mask

_TOKENS = 2**14
"""New tokens of one forward pass of `packed_logits`; more rows take several passes."""


def is_llama_on_cpu(model: PreTrainedModel) -> bool:
    """Return whether `last_layer_at` supports a model."""
    layers: Any = getattr(model.base_model, "layers", None)
    return model.device.type == "cpu" and bool(layers) and type(layers[-1]) is LlamaDecoderLayer


def can_be_packed(policy: Policy) -> bool:
    """Return whether `packed_logits` supports a policy."""
    return policy.autocast_dtype is None and is_llama_on_cpu(policy.model)


def group_positions(row: Tensor, position: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Collect the positions of each row.

    Args:
        row: [m] int64.
        position: [m] int64.
        rows: Number of rows s.

    Returns:
        chosen: [s, w] int64, the positions of each row, padded with 0.
        column: [m] int64: `position[i]` is at `chosen[row[i], column[i]]`.
    """
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=rows)
    firsts = counts.cumsum(0) - counts
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row)) - firsts[row[order]]
    chosen = row.new_zeros(rows, int(counts.max()))
    chosen[row, column] = position
    return chosen, column


@contextmanager
def last_layer_at(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """Make the base model return only the hidden states of chosen positions.

    Args:
        model: One that `is_llama_on_cpu`.
        chosen: [s, w] int64, positions of each sequence's tokens; in any order, with
            repetitions.
    """
    base: Any = model.base_model
    layer = base.layers[-1]
    index = (torch.arange(len(chosen))[:, None], chosen)

    def forward(
        states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        if attention_mask is None:
            future = torch.arange(states.shape[1]) > chosen[:, :, None]
            mask = additive_mask(future, states.dtype)
        else:
            mask = attention_mask[:, 0][index]
        cos, sin = (table.expand(len(chosen), -1, -1) for table in position_embeddings)
        states, queries, keys, values = _project(layer, states, cos, sin, index)
        mask = mask[:, None].to(queries.dtype)
        return _finish(layer, states, _attend(layer, queries, keys, values, mask))

    # An attribute of the instance hides the method of its class; hooks around it still run.
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward


def packed_logits(policy: Policy, cache: KVCache, feeds: Sequence[Feed]) -> Tensor:
    """Compute the same as `decoding.padded_logits`, with the same arguments."""
    widths = [len(feed.ids) for feed in feeds]
    if len(feeds) > 1 and sum(widths) > _TOKENS:
        half = len(feeds) // 2
        return torch.cat(
            [packed_logits(policy, cache, part) for part in (feeds[:half], feeds[half:])]
        )
    base: Any = policy.model.base_model
    ids = torch.tensor([[token for feed in feeds for token in feed.ids]])
    rows = torch.tensor([[feed.row for feed in feeds for _ in feed.ids]])
    positions = torch.cat([torch.arange(feed.start, feed.end) for feed in feeds])[None]
    ends = torch.tensor([widths]).cumsum(1) - 1
    # A token attends to all up to itself; a lone one, like the last one, to everything.
    masks = [
        torch.full((len(feed.ids), feed.end), -torch.inf).triu_(feed.start + 1)
        if len(feed.ids) > 1
        else None
        for feed in feeds
    ]
    states = base.embed_tokens(ids)
    cos, sin = base.rotary_emb(states, positions)
    for number, layer in enumerate(base.layers):
        is_last = number == len(base.layers) - 1
        chosen = (torch.zeros_like(ends), ends) if is_last else None
        states, queries, keys, values = _project(layer, states, cos, sin, chosen)
        keys, values = cache.write(number, (keys, values), (rows, positions))
        attended = [
            _attend(
                layer,
                part,
                keys[feed.row, :, : feed.end][None],
                values[feed.row, :, : feed.end][None],
                None if is_last else mask,
            )
            for feed, part, mask in zip(
                feeds, queries.split(1 if is_last else widths, dim=2), masks, strict=True
            )
        ]
        states = _finish(layer, states, torch.cat(attended, dim=2))
    return policy.logits(base.norm(states)[0])


def _project(
    layer: Any, states: Tensor, cos: Tensor, sin: Tensor, chosen: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the part of `LlamaDecoderLayer.forward` before the attention.

    Args:
        layer: The layer.
        states: [s, l, width].
        cos: [s, l, head_dim], of the rotary positions.
        sin: [s, l, head_dim].
        chosen: Index of the [s, w] positions that are computed; None: all.

    Returns:
        The states of chosen positions [s, w, width] and their queries [s, heads, w, head_dim]; keys
        and values [s, key_heads, l, head_dim] of all positions.
    """
    attention = layer.self_attn

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def rotated(states: Tensor) -> Tensor:
        turned: Tensor = rotate_half(states)
        return states * cos[:, None] + turned * sin[:, None]

    normed = layer.input_layernorm(states)
    keys = rotated(heads(attention.k_proj(normed)))
    values = heads(attention.v_proj(normed))
    if chosen is not None:
        states, normed, cos, sin = (each[chosen] for each in (states, normed, cos, sin))
    return states, rotated(heads(attention.q_proj(normed))), keys, values


def _attend(
    layer: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
) -> Tensor:
    attention = layer.self_attn
    return scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )


def _finish(layer: Any, states: Tensor, attended: Tensor) -> Tensor:
    """Compute the part of `LlamaDecoderLayer.forward` after the attention."""
    states = states + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    result: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return result
