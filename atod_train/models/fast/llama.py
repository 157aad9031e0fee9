"""Decoder layers of Llama, computed only where it is needed.

Of the last layer, keys and values are needed at all positions; queries, output projection and
feed-forward network only where the hidden state is used. Where completions are a tenth of a
dialogue, that saves a decoder of two layers a third of its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, rotate_half

from atod_train.models.policy import additive_mask

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [s, heads, w, head_dim], keys and values [s, key_heads, l, head_dim] to the result, of
the queries' shape."""


def is_llama_on_cpu(model: PreTrainedModel) -> bool:
    """Return whether `decoder_layer` computes the layers of a model, and on a processor."""
    layers: Any = getattr(model.base_model, "layers", ())
    return (
        model.device.type == "cpu"
        and len(layers) > 0
        and type(layers[-1]) is LlamaDecoderLayer
        and not layers[-1].self_attn.attention_dropout
        and model.config._attn_implementation == "sdpa"
    )


def decoder_layer(
    layer: Any,
    states: Tensor,
    rotary: tuple[Tensor, Tensor],
    attend: Attention,
    chosen: Tensor | None = None,
) -> Tensor:
    """Compute what `LlamaDecoderLayer.forward` computes, at chosen positions.

    Args:
        layer: The layer.
        states: [s, l, width].
        rotary: Cosines and sines, [s, l, head_dim] each.
        attend: Computes the attention.
        chosen: [s, w] int64, positions in `states`; None: all.

    Returns:
        [s, w, width].
    """
    attention = layer.self_attn

    def heads(projected: Tensor) -> Tensor:
        return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

    def rotated(states: Tensor) -> Tensor:
        turned: Tensor = rotate_half(states)
        return states * cos[:, None] + turned * sin[:, None]

    cos, sin = rotary
    normed = layer.input_layernorm(states)
    keys = rotated(heads(attention.k_proj(normed)))
    values = heads(attention.v_proj(normed))
    if chosen is not None:
        states, normed, cos, sin = (take(each, chosen) for each in (states, normed, cos, sin))
    queries = rotated(heads(attention.q_proj(normed)))
    attended = attend(queries, keys, values).transpose(1, 2).flatten(2)
    states = states + attention.o_proj(attended)
    result: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return result


def group_positions(row: Tensor, position: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Collect the positions of each row.

    Args:
        row: [m] int64.
        position: [m] int64.
        rows: Number of rows s.

    Returns:
        chosen: [s, w] int64, the positions of each row, padded with 0.
        column: [m] int64: `position[i]` stands at `chosen[row[i], column[i]]`.
    """
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=rows)
    firsts = counts.cumsum(0) - counts
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - firsts[row[order]]
    chosen = row.new_zeros(rows, int(counts.max()))
    chosen[row, column] = position
    return chosen, column


@contextmanager
def last_layer_at(model: PreTrainedModel, chosen: Tensor) -> Iterator[None]:
    """Make the base model return the hidden states of chosen positions instead of all.

    Args:
        model: One that `is_llama_on_cpu`.
        chosen: [s, w] int64, for each sequence positions of its tokens; any order, also several
            times.
    """
    base: Any = model.base_model
    layer = base.layers[-1]
    # An attribute of the instance hides the method of its class; hooks around it still run.
    layer.forward = partial(_forward, layer, chosen)
    try:
        yield
    finally:
        del layer.forward


def _forward(
    layer: Any,
    chosen: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> Tensor:
    """Take the place of `LlamaDecoderLayer.forward`."""
    assert position_embeddings is not None
    cos, sin = (table.expand(len(chosen), -1, -1) for table in position_embeddings)
    if attention_mask is None:
        future = torch.arange(hidden_states.shape[1]) > chosen[:, :, None]
        mask = additive_mask(future, hidden_states.dtype)
    else:
        mask = take(attention_mask[:, 0], chosen)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask[:, None].to(queries.dtype),
            scale=layer.self_attn.scaling,
            enable_gqa=layer.self_attn.num_key_value_groups > 1,
        )

    return decoder_layer(layer, hidden_states, (cos, sin), attend, chosen)


def take(values: Tensor, chosen: Tensor) -> Tensor:
    """Return [s, w, k]: of values [s, l, k] those at positions [s, w]."""
    row = torch.arange(len(chosen), device=chosen.device)[:, None]
    return values[row, chosen]
