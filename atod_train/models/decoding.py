"""Next-token logits of sequences whose keys and values are cached: any decoder, any device.

Each sequence is a row of the cache and has its own length. New keys and values are written where
the row's own context ends, so there are no gaps, rows of different lengths share a batch, and the
numbers of a row do not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from atod_train.models.policy import Policy, additive_mask

_CAPACITY_STEP = 128
"""The capacity of a cache is a multiple of this many tokens."""

_MASK_ELEMENTS = 2**26
"""Elements of the attention mask of one forward pass; more rows are fed in several passes."""


@dataclass(frozen=True, slots=True)
class Feed:
    """New tokens of one sequence, at least one."""

    row: int
    """Row of the sequence in the cache."""
    start: int
    """Tokens of the sequence that the cache holds already."""
    ids: Sequence[int]

    @property
    def end(self) -> int:
        """Tokens that the cache holds afterwards."""
        return self.start + len(self.ids)


class _Layer(CacheLayerMixin):
    """Keys and values of one decoder layer, [rows, heads, capacity, head_width] each."""

    is_sliding = False

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        self.cache = cache
        self.keys: Any
        self.values: Any

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self.cache.rows, states.shape[1], 0, states.shape[-1])
            for states in (key_states, value_states)
        )
        self.is_initialized = True
        self.grow()

    def write(self, keys: Tensor, values: Tensor, index: tuple[Tensor, Tensor]) -> None:
        """Store keys and values [.., heads, head_width] at rows and positions [..]."""
        self.keys.transpose(1, 2).index_put_(index, keys)
        self.values.transpose(1, 2).index_put_(index, values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store [n, heads, q, head_width] states; return what they may attend to."""
        # Under autocast rotary tables are float32, and so would be the keys.
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.write(key_states.transpose(1, 2), value_states.transpose(1, 2), self.cache.index)
        rows, visible = self.cache.selection, self.cache.visible
        return self.keys[rows, :, :visible], self.values[rows, :, :visible]

    def grow(self) -> None:
        """Enlarge the storage to the capacity of the cache."""
        if self.is_initialized:
            # Zeros: a masked NaN would still spoil the attention sum.
            missing = (0, 0, 0, self.cache.capacity - self.keys.shape[2])
            self.keys = torch.nn.functional.pad(self.keys, missing)
            self.values = torch.nn.functional.pad(self.values, missing)

    def get_seq_length(self) -> int:
        return self.cache.visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0

    def get_max_length(self) -> int:
        return self.cache.capacity

    # The name of get_max_length in earlier releases of transformers 5.
    get_max_cache_shape = get_max_length


class KVCache(Cache):
    """Keys and values of several sequences in all layers.

    Args:
        layers: Number of decoder layers.
        rows: Number of sequences.
        device: Device of the model.
    """

    layers: list[Any]

    def __init__(self, layers: int, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.device = device
        self.capacity = 0
        self.index: tuple[Tensor, Tensor]
        self.selection: slice | Tensor
        self.visible = 0
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every row."""
        if tokens > self.capacity:
            tokens = max(tokens, self.capacity + self.capacity // 4)
            self.capacity = -(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP
            for layer in self.layers:
                layer.grow()

    def aim(self, rows: Tensor, positions: Tensor, visible: int) -> None:
        """Set where the next forward pass writes and what it reads.

        Args:
            rows: [n] int64, ascending; neighbours are read in place, others are copied.
            positions: [n, q] int64 on the device, position of each new token in its row.
            visible: Positions of a row that are attended to, at most.
        """
        first, end = int(rows[0]), int(rows[-1]) + 1
        rows_there = rows.to(self.device)
        self.index = (rows_there[:, None], positions)
        self.selection = slice(first, end) if len(rows) == end - first else rows_there
        self.visible = visible

    def copy(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        """Copy the first `length` tokens of some rows onto others."""
        source, target = (torch.tensor(rows).to(self.device) for rows in (sources, targets))
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                if sources and layer.is_initialized:
                    stored[target, :, :length] = stored[source, :, :length]


def new_cache(policy: Policy, rows: int) -> KVCache:
    """Make an empty cache for sequences of a model."""
    return KVCache(policy.model.config.num_hidden_layers, rows, policy.device)


def padded_logits(policy: Policy, cache: KVCache, feeds: Sequence[Feed]) -> Tensor:
    """Feed new tokens; return the logits [n, vocabulary] after the last token of each feed.

    Args:
        policy: The model.
        cache: It is extended; rows have room for at least one token more than are fed.
        feeds: Of n rows in ascending order; shorter ones are padded on the right.
    """
    width = max(len(feed.ids) for feed in feeds)
    visible = max(feed.end for feed in feeds)
    if len(feeds) > 1 and len(feeds) * width * visible > _MASK_ELEMENTS:
        half = len(feeds) // 2
        return torch.cat(
            [padded_logits(policy, cache, part) for part in (feeds[:half], feeds[half:])]
        )
    ids = torch.tensor([[*feed.ids, *[policy.pad_id] * (width - len(feed.ids))] for feed in feeds])
    starts = torch.tensor([feed.start for feed in feeds])
    ends = torch.tensor([len(feed.ids) - 1 for feed in feeds])
    rows = torch.tensor([feed.row for feed in feeds])
    # Padding is written beyond the context of its row; later tokens overwrite it before they see
    # it. The model may not have positions as far as padding reaches.
    last = min(cache.capacity, policy.max_positions) - 1
    number = torch.arange(len(feeds))
    if width == 1 and len(feeds) <= rows[-1] - rows[0]:
        # Rows in between, whose completions have ended, are computed too: copying the keys of the
        # others would cost more.
        number = rows - rows[0]
        rows = torch.arange(int(rows[0]), int(rows[-1]) + 1)
        ids = torch.full((len(rows), 1), policy.pad_id).index_put_((number,), ids)
        starts = torch.full((len(rows),), last).index_put_((number,), starts)
    positions = (starts[:, None] + torch.arange(width)).clamp(max=last).to(policy.device)
    cache.aim(rows, positions, visible)
    future = torch.arange(visible, device=policy.device) > positions[:, :, None]
    hidden = policy.hidden_states(
        ids.to(policy.device),
        # Additive from the start: a boolean mask would be converted in every layer.
        attention_mask=additive_mask(future, policy.layer_dtype)[:, None],
        position_ids=positions,
        cache=cache,
    )
    return policy.logits(hidden[number.to(policy.device), ends.to(policy.device)])
