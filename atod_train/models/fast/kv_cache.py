"""A key/value cache in which every row has its own length.

One slot per episode; new keys and values are written where the slot's own context ends, so there
are no gaps, rows of different lengths share a batch, and a row's numbers do not depend on its
neighbours. Slots that are computed together are contiguous, so attention reads the cache in place
instead of copying it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_CAPACITY_STEP = 128
"""Capacity grows to a multiple of this many tokens."""


class _Window:
    """Which part of the cache the next forward pass writes and reads; shared by all layers."""

    def __init__(self, slots: int, is_masked: bool) -> None:
        self.slots = slots
        self.is_masked = is_masked
        self.capacity = 0
        self.used = 0
        self.slot_range = slice(0, 0)
        self.slot_index = torch.empty(0, 1, dtype=torch.int64)
        self.positions = torch.empty(0, 0, dtype=torch.int64)
        self.visible = 0


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer: [slots, heads, capacity, head_width]."""

    is_sliding = False

    def __init__(self, window: _Window) -> None:
        super().__init__()
        self.window = window
        self.stored_keys = self.stored_values = torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        nothing = (self.window.slots, key_states.shape[1], 0)
        self.stored_keys = self._enlarged(key_states.new_empty(*nothing, key_states.shape[-1]))
        self.stored_values = self._enlarged(
            value_states.new_empty(*nothing, value_states.shape[-1])
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [n, heads, q, head_width] states; returns what they may attend to."""
        # Under autocast rotary tables are float32, and so would be the keys.
        key_states = key_states.to(value_states.dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        window = self.window
        index = (window.slot_index, window.positions)
        self.stored_keys.transpose(1, 2).index_put_(index, key_states.transpose(1, 2))
        self.stored_values.transpose(1, 2).index_put_(index, value_states.transpose(1, 2))
        return (
            self.stored_keys[window.slot_range, :, : window.visible],
            self.stored_values[window.slot_range, :, : window.visible],
        )

    def grow(self) -> None:
        """Bring the storage to the window's capacity."""
        if self.is_initialized:
            self.stored_keys = self._enlarged(self.stored_keys)
            self.stored_values = self._enlarged(self.stored_values)

    def _enlarged(self, stored: Tensor) -> Tensor:
        slots, heads, held, width = stored.shape
        enlarged = stored.new_empty(slots, heads, self.window.capacity, width)
        used = min(held, self.window.used)
        enlarged[:, :, :used] = stored[:, :, :used]
        if self.window.is_masked:
            # A masked NaN would still spoil the attention sum.
            enlarged[:, :, used:] = 0
        return enlarged

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Put the contents of slots `sources` into slots `targets`, up to `length` tokens."""
        if self.is_initialized:
            self.stored_keys[targets, :, :length] = self.stored_keys[sources, :, :length]
            self.stored_values[targets, :, :length] = self.stored_values[sources, :, :length]

    def get_seq_length(self) -> int:
        return self.window.visible

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.visible, 0

    def get_max_length(self) -> int:
        return self.window.capacity

    # The name of get_max_length in earlier releases of transformers 5.
    get_max_cache_shape = get_max_length


class SlotCache(Cache):
    """The cache of all layers; call `aim` before each forward pass.

    Args:
        layers: Number of decoder layers.
        slots: Number of episodes it can hold.
        device: Where the model is.
        is_masked: Whether attention reads beyond what a slot holds, and masks it. If not, memory
            that nothing was written to is not touched, and capacity grows in fewer, larger steps.
    """

    def __init__(
        self, layers: int, slots: int, device: torch.device, *, is_masked: bool = True
    ) -> None:
        self.window = _Window(slots, is_masked)
        self.device = device
        self._slot_layers = [_SlotLayer(self.window) for _ in range(layers)]
        super().__init__(layers=list(self._slot_layers))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every slot."""
        window = self.window
        if tokens > window.capacity:
            growth = window.capacity // 4 if window.is_masked else window.capacity
            wanted = max(tokens, window.capacity + growth)
            window.capacity = -(-wanted // _CAPACITY_STEP) * _CAPACITY_STEP
            for layer in self._slot_layers:
                layer.grow()
        window.used = max(window.used, tokens)

    def aim(self, first_slot: int, positions: Tensor, visible: int) -> None:
        """Say where the next forward pass stands.

        Args:
            first_slot: Its rows are the slots from here on.
            positions: [n, q] int64: place of each new token in its slot.
            visible: Number of positions that are attended to at most.
        """
        count = len(positions)
        self.window.slot_range = slice(first_slot, first_slot + count)
        self.window.slot_index = torch.arange(
            first_slot, first_slot + count, device=self.device
        ).unsqueeze(1)
        self.window.positions = positions
        self.window.visible = visible

    def write(
        self, layer: int, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
    ) -> None:
        """Put the keys and values [t, heads, head_width] of tokens at their slots and positions."""
        held = self._slot_layers[layer]
        if not held.is_initialized:
            held.lazy_initialization(keys, values)
        held.stored_keys.transpose(1, 2).index_put_((slots, positions), keys)
        held.stored_values.transpose(1, 2).index_put_((slots, positions), values)

    def read(self, layer: int, slot: int, length: int) -> tuple[Tensor, Tensor]:
        """The first keys and values of a slot, [1, heads, length, head_width] each; no copies."""
        held = self._slot_layers[layer]
        part = slice(slot, slot + 1)
        return held.stored_keys[part, :, :length], held.stored_values[part, :, :length]

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy slots onto others, all at once, so that a permutation needs no spare slot."""
        if sources:
            source = torch.tensor(sources, device=self.device)
            target = torch.tensor(targets, device=self.device)
            for layer in self._slot_layers:
                layer.move(source, target, length)
