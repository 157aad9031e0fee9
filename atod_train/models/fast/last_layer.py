"""Decoder states at some positions only: what the last layer need not compute is left out.

Of the last layer of a decoder, only keys and values are needed at all positions; queries, output
and feed-forward network only where somebody asks for the state. Where completions are a tenth of a
dialogue, a decoder of two layers saves a third of its work by that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, rotate_half


def can_be_chosen(model: PreTrainedModel) -> bool:
    """Whether `only_at` knows the layers of a model: those of Llama with PyTorch's attention."""
    layers: Any = getattr(model.base_model, "layers", ())
    return (
        len(layers) > 0
        and type(layers[-1]) is LlamaDecoderLayer
        and not layers[-1].self_attn.attention_dropout
        and model.config._attn_implementation == "sdpa"
    )


def can_take_trees(model: PreTrainedModel) -> bool:
    """Whether a model attends as a mask says and takes positions that are not in a row.

    Sliding windows are masks of their own, and other kinds of positions follow from a mask.
    """
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    return (
        hasattr(model.base_model, "rotary_emb")
        and not kinds
        and not getattr(model.config, "sliding_window", None)
        and model.config._attn_implementation == "sdpa"
    )


@contextmanager
def only_at(model: PreTrainedModel, wanted: Tensor) -> Iterator[None]:
    """Lets the base model return the states of some positions instead of all.

    Args:
        model: one that `can_be_chosen`.
        wanted: [s, w] int64: for each sequence the positions, counted in the tokens that are fed;
            any order, also several times.
    """
    base: Any = model.base_model
    layer = base.layers[-1]
    # An attribute of the instance hides the method of its class; hooks around it still run.
    layer.forward = partial(_forward, layer, wanted)
    try:
        yield
    finally:
        del layer.forward


def additive_mask(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Minus infinity where a bool mask hides something, else 0; of its shape, on its device."""
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, float("-inf"))


def places(sequence: Tensor, position: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Puts wanted positions into one row for each sequence.

    Args:
        sequence: [m] int64: which sequence each position is in.
        position: [m] int64.
        sequences: number of sequences s.

    Returns:
        wanted: [s, w] int64, rows that have fewer padded with 0.
        column: [m] int64: position i stands at wanted[sequence[i], column[i]].
    """
    order = torch.argsort(sequence, stable=True)
    counts = torch.bincount(sequence, minlength=sequences)
    firsts = counts.cumsum(0) - counts
    column = torch.empty_like(sequence)
    column[order] = torch.arange(len(sequence), device=sequence.device) - firsts[sequence[order]]
    wanted = sequence.new_zeros(sequences, int(counts.max()))
    wanted[sequence, column] = position
    return wanted, column


def _forward(
    layer: Any,
    wanted: Tensor,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    past_key_values: Cache | None = None,
    **_: Any,
) -> Tensor:
    """What `LlamaDecoderLayer.forward` computes, at the wanted positions; [s, w, width]."""
    assert position_embeddings is not None
    attention = layer.self_attn
    cos, sin = (table.expand(len(wanted), -1, -1) for table in position_embeddings)
    normed = layer.input_layernorm(hidden_states)
    keys = rotated(_heads(attention.k_proj(normed), attention.head_dim), cos[:, None], sin[:, None])
    values = _heads(attention.v_proj(normed), attention.head_dim)
    # Earlier releases of transformers 5 have the other name.
    cache = cache if cache is not None else past_key_values
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    queries = rotated(
        _heads(attention.q_proj(at(normed, wanted)), attention.head_dim),
        at(cos, wanted)[:, None],
        at(sin, wanted)[:, None],
    )
    if attention_mask is None:
        future = torch.arange(keys.shape[2], device=wanted.device) > wanted[:, :, None]
        mask = additive_mask(future, queries.dtype)[:, None]
    else:
        mask = at(attention_mask[:, 0], wanted)[:, None]
    attended = torch.nn.functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        scale=attention.scaling,
        enable_gqa=attention.num_key_value_groups > 1,
    )
    attended = attended.transpose(1, 2).flatten(2)
    states = at(hidden_states, wanted) + attention.o_proj(attended)
    result: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return result


def at(values: Tensor, wanted: Tensor) -> Tensor:
    """[s, w, k] of values [s, l, k]."""
    row = torch.arange(len(wanted), device=wanted.device)[:, None]
    return values[row, wanted]


def _heads(states: Tensor, head_dim: int) -> Tensor:
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """States with rotary positions; the tables have the last dimension in common with them."""
    turned: Tensor = rotate_half(states)
    return states * cos + turned * sin
