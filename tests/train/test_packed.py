"""Packed and padded rows get the logits that the whole model gives for each row alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from test_last_layer import TOKENIZER, make_model

from atod_train.models.decoding import Feed, KVCache, padded_logits
from atod_train.models.fast.llama import can_be_packed, packed_logits


@pytest.mark.parametrize(
    ("layers", "heads", "key_heads"), [(1, 2, 2), (2, 4, 4), (3, 4, 2)], ids=["one", "two", "gqa"]
)
@pytest.mark.parametrize("next_logits", [packed_logits, padded_logits])
@torch.no_grad()
def test_rows_of_any_length(
    layers: int, heads: int, key_heads: int, next_logits: Callable[..., torch.Tensor]
) -> None:
    policy = make_model(layers, heads, key_heads)
    policy.model.config.max_position_embeddings = 512
    assert can_be_packed(policy)
    cache = KVCache(4, policy.device)
    random = torch.Generator().manual_seed(1)
    rows: dict[int, list[int]] = {0: [], 1: [], 2: [], 3: []}
    short = ({3: 5, 0: 9}, {0: 1, 3: 1}, {1: 4, 0: 7, 3: 2, 2: 11}, {2: 1})
    for widths in (*short, {0: 130, 3: 1}, {1: 2, 0: 1}):  # the cache grows at 128 tokens
        feeds = []
        for row, width in sorted(widths.items()):
            ids = torch.randint(0, len(TOKENIZER), (width,), generator=random).tolist()
            feeds.append(Feed(row, len(rows[row]), ids))
            rows[row] += ids
        cache.reserve(max(feed.end for feed in feeds))
        found = next_logits(policy, cache, feeds)
        for feed, logits in zip(feeds, found, strict=True):
            alone = policy.model(input_ids=torch.tensor([rows[feed.row]])).logits[0, -1]
            assert torch.allclose(logits, alone, atol=1e-5)


def test_no_padding_is_computed() -> None:
    policy = make_model(2, 2, 2)
    seen: list[tuple[int, ...]] = []
    for layer in policy.model.model.layers:
        layer.mlp.register_forward_hook(lambda _, given, result: seen.append(tuple(result.shape)))
    cache = KVCache(2, policy.device)
    cache.reserve(10)
    with torch.no_grad():
        packed_logits(policy, cache, [Feed(0, 0, [1, 2, 3, 4, 5, 6]), Feed(1, 0, [7])])
    assert seen == [(1, 7, 32), (1, 2, 32)]


def test_other_precisions_are_padded() -> None:
    policy = make_model(2, 2, 2)
    assert not can_be_packed(replace(policy, autocast_dtype=torch.bfloat16))
