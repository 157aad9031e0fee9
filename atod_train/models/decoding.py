"""Compute next-token logits of sequences with a KV cache: any decoder, any device.

Each sequence is a row of the cache and has its own length. New keys and values are written at
the end of the row's own context, so there are no gaps, rows of different lengths share a batch, and
the numbers of a row are independent of its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache

from atod_train.models.policy import Policy, additive_mask

_CAPACITY_STEP = 128
"""The capacity of a cache is a multiple of this many tokens."""

_MASK_ELEMENTS = 2**26
"""Limit of attention mask elements of one forward pass; more rows take several passes."""


@dataclass(frozen=True, slots=True)
class Feed:
    """New tokens of one sequence, at least one."""

    row: int
    """Row of the sequence in the cache."""
    start: int
    """Number of tokens of the sequence that are in the cache."""
    ids: Sequence[int]

    @property
    def end(self) -> int:
        """Number of tokens in the cache after feeding."""
        return self.start + len(self.ids)


class KVCache(Cache):
    """Keys and values of several sequences, each a row, in all layers.

    Args:
        rows: Number of sequences.
        device: Device of the model.

    Attributes:
        capacity: Number of tokens that fit every row.
        stored: Keys and values of a layer by its number, [rows, heads, capacity, head_width] each.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.device = device
        self.capacity = 0
        self.stored: dict[int, list[Tensor]] = {}
        self._index: tuple[Tensor, Tensor]
        self._selection: slice | Tensor
        self._visible = 0

    def reserve(self, tokens: int) -> None:
        """Extend the capacity to `tokens` tokens in every row."""
        if tokens <= self.capacity:
            return
        tokens = max(tokens, self.capacity + self.capacity // 4)
        missing = -(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP - self.capacity
        self.capacity += missing
        for layer, states in self.stored.items():
            # Zeros: a masked NaN would still make the attention sum NaN.
            self.stored[layer] = [pad(held, (0, 0, 0, missing)) for held in states]

    def aim(self, rows: Tensor, positions: Tensor, visible: int) -> None:
        """Set the positions that the next forward pass writes and reads.

        Args:
            rows: [n] int64, ascending; neighbours are read in place, others are copied.
            positions: [n, q] int64 on the device, position of each new token in its row.
            visible: Number of positions of a row that are attended to, at most.
        """
        first, end = int(rows[0]), int(rows[-1]) + 1
        rows_there = rows.to(self.device)
        self._index = (rows_there[:, None], positions)
        self._selection = slice(first, end) if len(rows) == end - first else rows_there
        self._visible = visible

    def write(
        self, layer: int, states: Sequence[Tensor], index: tuple[Tensor, Tensor]
    ) -> list[Tensor]:
        """Store [n, heads, q, head_width] keys and values; return all that the layer stores.

        Args:
            layer: Number of the layer.
            states: The new keys and values.
            index: Their rows and positions, [n, q] after broadcasting.
        """
        if layer not in self.stored:
            self.stored[layer] = [
                new.new_zeros(self.rows, new.shape[1], self.capacity, new.shape[-1])
                for new in states
            ]
        for held, new in zip(self.stored[layer], states, strict=True):
            held.transpose(1, 2).index_put_(index, new.transpose(1, 2))
        return self.stored[layer]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the states of a transformers model; return the states to attend to."""
        # Under autocast rotary tables are float32, and so would be the keys.
        states = (key_states.to(value_states.dtype), value_states)
        keys, values = self.write(layer_idx, states, self._index)
        return (
            keys[self._selection, :, : self._visible],
            values[self._selection, :, : self._visible],
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of positions that are attended to."""
        return self._visible

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of some rows onto others."""
        source, target = (
            torch.tensor(rows, dtype=torch.int64, device=self.device) for rows in (sources, targets)
        )
        for held in chain.from_iterable(self.stored.values()):
            held[target, :, :length] = held[source, :, :length]


def padded_logits(policy: Policy, cache: KVCache, feeds: Sequence[Feed]) -> Tensor:
    """Feed new tokens; return the logits [n, vocabulary] after the last token of each feed.

    Args:
        policy: The model.
        cache: It is extended; rows have capacity for at least one token more than are fed.
        feeds: Of n rows in ascending order; shorter ones are padded on the right.
    """
    width = max(len(feed.ids) for feed in feeds)
    visible = max(feed.end for feed in feeds)
    if len(feeds) > 1 and len(feeds) * width * visible > _MASK_ELEMENTS:
        half = len(feeds) // 2
        return torch.cat(
            [padded_logits(policy, cache, part) for part in (feeds[:half], feeds[half:])]
        )
    # Padding is written beyond the context of its row; later tokens overwrite it before they attend
    # to it. The model's positions may end before the padding does.
    last = min(cache.capacity, policy.max_positions) - 1
    first_row, number = feeds[0].row, torch.arange(len(feeds))
    ends = torch.tensor([len(feed.ids) - 1 for feed in feeds])
    if width == 1:
        # Rows in between, whose completions have ended, are computed, too: copying the keys of the
        # others would cost more.
        fed = {feed.row: feed for feed in feeds}
        number = torch.tensor([row - first_row for row in fed])
        between = range(first_row, feeds[-1].row + 1)
        feeds = [fed.get(row, Feed(row, last, [policy.pad_id])) for row in between]
    ids = torch.tensor([[*feed.ids, *[policy.pad_id] * (width - len(feed.ids))] for feed in feeds])
    starts = torch.tensor([[feed.start] for feed in feeds])
    positions = (starts + torch.arange(width)).clamp(max=last).to(policy.device)
    cache.aim(torch.tensor([feed.row for feed in feeds]), positions, visible)
    future = torch.arange(visible, device=policy.device) > positions[:, :, None]
    hidden = policy.hidden_states(
        ids.to(policy.device),
        # Additive from the start: a boolean mask would be converted in every layer.
        attention_mask=additive_mask(future, policy.layer_dtype)[:, None],
        position_ids=positions,
        cache=cache,
    )
    return policy.logits(hidden[number.to(policy.device), ends.to(policy.device)])
