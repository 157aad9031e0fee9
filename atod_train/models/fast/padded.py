"""Feeding rows of different lengths as one padded batch: for any decoder, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from atod_train.models.fast.kv_cache import SlotCache
from atod_train.models.fast.last_layer import additive_mask
from atod_train.models.policy import Policy

_MASK_ELEMENTS = 2**26
"""Attention-mask elements of one pass; more rows are fed in several passes."""


def padded_prefill(
    policy: Policy, cache: SlotCache, held: Sequence[int], feeds: Sequence[list[int]]
) -> Tensor:
    """Feeds new tokens to the rows in the first slots.

    Args:
        policy: the model.
        cache: is extended; there must be room for all rows to be as wide as the widest.
        held: tokens that each row holds already.
        feeds: new tokens of each row.

    Returns:
        [k, vocabulary] logits after the last token of each row.
    """
    logits = []
    longest = max(start + len(feed) for start, feed in zip(held, feeds, strict=True))
    widest = max(len(feed) for feed in feeds)
    rows = max(1, _MASK_ELEMENTS // (widest * longest))
    for first in range(0, len(feeds), rows):
        part = slice(first, first + rows)
        widths = torch.tensor([len(feed) for feed in feeds[part]])
        width = int(widths.max())
        ids = torch.tensor([feed + feed[-1:] * (width - len(feed)) for feed in feeds[part]])
        starts = torch.tensor(held[part])
        # Padding stands beyond the row's context: later tokens overwrite it before any looks.
        positions = starts[:, None] + torch.arange(width)
        visible = int((starts + widths).max())
        device = policy.device
        logits.append(
            padded_logits(
                policy,
                cache,
                first,
                ids.to(device),
                positions.to(device),
                visible,
                (widths - 1).to(device),
            )
        )
    return torch.cat(logits)


def padded_logits(
    policy: Policy,
    cache: SlotCache,
    first_slot: int,
    ids: Tensor,
    positions: Tensor,
    visible: int,
    last: Tensor | None = None,
) -> Tensor:
    """One pass over tokens of neighbouring slots.

    Args:
        policy: the model.
        cache: is extended.
        first_slot: slot of the first row.
        ids: [n, q] int64.
        positions: [n, q] int64, of each token in its slot.
        visible: positions that are looked at, at most.
        last: [n] int64, the column whose logits are wanted; None: the first.

    Returns:
        [n, vocabulary].
    """
    cache.aim(first_slot, positions, visible)
    future = torch.arange(visible, device=ids.device) > positions[:, :, None]
    # Additive from the start: a boolean mask would be converted in every layer.
    mask = additive_mask(future, policy.layer_dtype)
    chosen = torch.zeros_like(ids[:, 0]) if last is None else last
    hidden = policy.states_at(
        ids,
        chosen[:, None],
        attention_mask=mask[:, None],
        # Padding may stand beyond the last position that a model has learned; tokens never do.
        position_ids=positions.clamp(max=policy.max_positions - 1),
        cache=cache,
    )
    return policy.logits(hidden[:, 0])
