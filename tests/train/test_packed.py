"""Packed rows give what the whole model gives for each row alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_wanted import TOKENIZER, make_model

from atod_train.models.fast.kv_cache import SlotCache
from atod_train.models.fast.packed import Feed, can_be_packed, last_states


@pytest.mark.parametrize(
    ("layers", "heads", "key_heads"), [(1, 2, 2), (2, 4, 4), (3, 4, 2)], ids=["one", "two", "gqa"]
)
@torch.no_grad()
def test_rows_of_any_length_in_any_slots(layers: int, heads: int, key_heads: int) -> None:
    policy = make_model(layers, heads, key_heads)
    assert can_be_packed(policy)
    cache = SlotCache(layers, 4, policy.device, is_masked=False)
    random = torch.Generator().manual_seed(1)
    rows: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    short = ({3: 5, 0: 9}, {0: 1, 3: 1}, {1: 4, 0: 7, 3: 2, 2: 11}, {2: 1})
    for widths in (*short, {0: 130, 3: 1}, {1: 2, 0: 1}):  # the cache grows at 128 tokens
        feeds = []
        for slot, width in widths.items():
            ids = torch.randint(0, len(TOKENIZER), (width,), generator=random).tolist()
            feeds.append(Feed(slot, len(rows[slot]), ids))
            rows[slot] += ids
        cache.reserve(max(feed.end for feed in feeds))
        found = last_states(policy.model, cache, feeds)
        for feed, state in zip(feeds, found, strict=True):
            alone = policy.hidden_states(torch.tensor([rows[feed.slot]]))[0, -1]
            assert torch.allclose(state, alone, atol=1e-5)


def test_no_padding_is_computed() -> None:
    policy = make_model(2, 2, 2)
    seen: list[tuple[int, ...]] = []
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_hook(lambda _, given, result: seen.append(tuple(result.shape)))
    cache = SlotCache(2, 2, policy.device, is_masked=False)
    cache.reserve(10)
    with torch.no_grad():
        last_states(policy.model, cache, [Feed(0, 0, [1, 2, 3, 4, 5, 6]), Feed(1, 0, [7])])
    assert seen == [(7, 32), (2, 32)]


def test_other_precisions_are_padded() -> None:
    policy = make_model(2, 2, 2)
    assert not can_be_packed(replace(policy, autocast_dtype=torch.bfloat16))
