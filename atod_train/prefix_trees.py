"""Sequences that begin alike, computed once: episodes of a group share prompts and observations.

Sequences are laid out as a tree. What they have in common stands there once, each token knows its
position in its own sequence, and attends to those before it there and to no other. Scores and
gradients are those of the separate sequences, up to rounding. Of the group's dialogues in Search-QA
less than half of the tokens remain, of those in ALFWorld three quarters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import Any

import torch
from torch import Tensor

from atod_train.batching import Minibatch, length_buckets, select_sequences
from atod_train.types import Batch
from atod_train.wanted import places

_ATTENTION_FACTOR = 4
"""How much longer an operation takes in attention than in a matrix product."""


@dataclass(frozen=True)
class PrefixTrees:
    """A batch of s sequences, laid out as t trees of up to m tokens."""

    ids: Tensor
    """[t, m] int64, padded on the right."""
    positions: Tensor
    """[t, m] int64: of each token in its sequence; 0 on padding."""
    visible: Tensor
    """[t, m, m] bool: whether a token attends to another; padding attends to itself."""
    tree: Tensor
    """[s] int64: the tree that each sequence is in."""
    place: Tensor
    """[s, l] int64: where each token of each sequence stands in its tree; 0 on padding."""

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Inputs of a transformers model beside `ids`: the mask and the positions."""
        mask = torch.zeros(self.visible.shape, dtype=dtype, device=device)
        mask.masked_fill_(~self.visible.to(device), float("-inf"))
        return {"attention_mask": mask[:, None], "position_ids": self.positions.to(device)}


@dataclass(frozen=True)
class Part(Minibatch):
    """A part of a batch that goes through a model at once."""

    trees: PrefixTrees | None = None
    """Of its sequences; None where nothing is shared."""

    def layout(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What is fed, and where the m sampled tokens, row after row, are predicted.

        Returns:
            ids [t, l], wanted [t, w] (see `places`), and [m] each: row and column in `wanted`.
        """
        batch = self.batch
        turn, column = batch.completion_mask.cpu().nonzero(as_tuple=True)
        # The token at position p is predicted from position p - 1.
        position = batch.start.cpu()[turn] + column - 1
        row = batch.sequence_index.cpu()[turn]
        ids = batch.input_ids
        if self.trees is not None:
            row, position, ids = (
                self.trees.tree[row],
                self.trees.place[row, position],
                self.trees.ids,
            )
        wanted, column = places(row, position, len(ids))
        return ids, wanted, row, column


def parts(batch: Batch, tokens_at_once: int, crossover: int) -> Iterator[Part]:
    """The parts of a batch that go through a model one after the other.

    Args:
        batch: packed or not.
        tokens_at_once: padded tokens of a part; a longer sequence stands alone.
        crossover: see `joined`.

    Yields:
        Parts that together hold every sequence once, longest first among those of either kind.
    """
    lengths = batch.attention_mask.sum(dim=1)
    sequences = [
        ids[:length] for ids, length in zip(batch.input_ids.tolist(), lengths.tolist(), strict=True)
    ]
    trees = joined(sequences, tokens_at_once, crossover)
    alone = torch.tensor(
        [members[0] for members, _ in trees if len(members) == 1], dtype=torch.int64
    )
    for bucket in length_buckets(lengths[alone], tokens_at_once):
        part = select_sequences(batch, alone[bucket])
        yield Part(part.batch, part.rows)
    trees = [tree for tree in trees if len(tree[0]) > 1]
    sizes = torch.tensor([size for _, size in trees], dtype=torch.int64)
    for bucket in length_buckets(sizes, tokens_at_once):
        groups = [trees[index][0] for index in bucket.tolist()]
        part = select_sequences(batch, torch.tensor([i for group in groups for i in group]))
        yield Part(part.batch, part.rows, _laid_out(part.batch, [len(group) for group in groups]))


def joined(
    sequences: list[list[int]], tokens_at_once: int, crossover: int
) -> list[tuple[list[int], int]]:
    """Decides which sequences form a tree.

    A layer costs its n tokens n for its matrices and, for attention, n^2 / crossover in a tree,
    where all pairs are computed, or half of that in a lone sequence. Sequences are joined in
    lexicographic order as long as that gets cheaper.

    Args:
        sequences: token ids.
        tokens_at_once: no tree is larger.
        crossover: tokens at which attention between all pairs costs as much as the matrices; 0:
            join nothing.

    Returns:
        The members of each tree, in lexicographic order, and the tokens of the tree.
    """
    if not crossover:
        return [([index], len(sequence)) for index, sequence in enumerate(sequences)]

    def cost(size: int, members: int) -> float:
        return size + size * size / (crossover if members > 1 else 2 * crossover)

    trees: list[tuple[list[int], int]] = []
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        length = len(sequences[index])
        if trees:
            members, size = trees[-1]
            grown = size + length - _in_common(sequences[members[-1]], sequences[index])
            together, apart = cost(grown, 2), cost(size, len(members)) + cost(length, 1)
            if grown <= tokens_at_once and together < apart:
                trees[-1] = ([*members, index], grown)
                continue
        trees.append(([index], length))
    return trees


def _in_common(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))


def _laid_out(batch: Batch, counts: list[int]) -> PrefixTrees:
    """Trees of so many sequences each, neighbours in lexicographic order."""
    sequences = [
        ids[:length]
        for ids, length in zip(
            batch.input_ids.tolist(), batch.attention_mask.sum(dim=1).tolist(), strict=True
        )
    ]
    tree = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    place = torch.zeros(batch.input_ids.shape, dtype=torch.int64)
    shared: list[int] = []
    sizes: list[int] = []
    for index, sequence in enumerate(sequences):
        is_first = index == 0 or bool(tree[index] != tree[index - 1])
        common = 0 if is_first else _in_common(sequences[index - 1], sequence)
        first = 0 if is_first else sizes.pop()
        place[index, :common] = place[index - 1, :common]
        sizes.append(first + len(sequence) - common)
        place[index, common : len(sequence)] = torch.arange(first, sizes[-1])
        shared.append(common)
    size = max(sizes)
    ids = torch.zeros(len(counts), size, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    visible = torch.eye(size, dtype=torch.bool).repeat(len(counts), 1, 1)
    for index, (sequence, common) in enumerate(zip(sequences, shared, strict=True)):
        new = place[index, common : len(sequence)]
        own = int(tree[index])
        ids[own, new] = torch.tensor(sequence[common:], dtype=torch.int64)
        positions[own, new] = torch.arange(common, len(sequence))
        before = torch.ones(len(new), len(sequence), dtype=torch.bool).tril_(common)
        visible[own, new[:, None], place[index, : len(sequence)]] = before
    return PrefixTrees(ids, positions, visible, tree, place)


def crossover_of(config: Any) -> int:
    """Tokens at which attention costs as much as the matrices of a layer; see `joined`.

    Args:
        config: of a transformers model.
    """
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    matrices = 2 * width * head_width * (heads + groups) + 3 * width * config.intermediate_size
    return int(matrices / (2 * heads * head_width) / _ATTENTION_FACTOR)
