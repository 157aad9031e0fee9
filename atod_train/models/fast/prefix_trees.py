"""Compute shared prefixes once: episodes of a group share prompts and observations.

Sequences are laid out as a tree. A shared prefix is stored once. Tokens keep the position they have
in their own sequence and attend only to their ancestors in the tree. Scores and gradients are those
of the separate sequences, up to rounding. Of the dialogues of a group in Search-QA less than half
of the tokens remain, of those in ALFWorld three quarters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from atod_train.batch import length_buckets, select_sequences
from atod_train.models.policy import additive_mask
from atod_train.records import Batch

Tree = tuple[list[int], int]
"""The joined sequences, in lexicographic order, and the number of tokens of the tree."""

_ATTENTION_FACTOR = 4
"""Time of an operation in attention, relative to one in a matrix product."""


@dataclass(frozen=True)
class PrefixTrees:
    """A batch of s sequences, laid out as t trees of up to m tokens."""

    ids: Tensor
    """[t, m] int64, padded on the right."""
    positions: Tensor
    """[t, m] int64: position of each token in its sequence; 0 on padding."""
    visible: Tensor
    """[t, m, m] bool: whether a token attends to another; padding attends to itself."""
    tree: Tensor
    """[s] int64: the tree of each sequence."""
    column: Tensor
    """[s, l] int64: column of each token of each sequence in `ids`; 0 on padding."""

    def inputs(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Return the inputs of a transformers model besides `ids`: the mask and the positions."""
        mask = additive_mask(~self.visible.to(device), dtype)
        return {"attention_mask": mask[:, None], "position_ids": self.positions.to(device)}


def split_microbatches(
    batch: Batch, tokens_at_once: int, crossover: int
) -> Iterator[tuple[Batch, PrefixTrees | None]]:
    """Split a batch into parts that are computed one after the other.

    Args:
        batch: Packed or not.
        tokens_at_once: Padded tokens of a part; a longer sequence is a part of its own.
        crossover: See `join_sequences`.

    Yields:
        Parts that together contain every sequence once, and the trees of their sequences: first
        those without shared prefixes (None), then trees, both from the longest to the shortest.
    """
    sequences = sequences_of(batch)
    for trees in group_trees(sequences, tokens_at_once, crossover):
        members = [index for tree, _ in trees for index in tree]
        part = select_sequences(batch, torch.tensor(members))
        layout = None
        if len(members) > len(trees):
            groups = [[sequences[index] for index in tree] for tree, _ in trees]
            layout = lay_out(groups, max(size for _, size in trees))
        yield part, layout


def sequences_of(batch: Batch) -> list[list[int]]:
    """Return the token ids of each sequence, without padding."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [ids[:length] for ids, length in zip(batch.input_ids.tolist(), lengths, strict=True)]


def group_trees(
    sequences: list[list[int]], tokens_at_once: int, crossover: int
) -> list[list[Tree]]:
    """Return the trees of each micro-batch, see `split_microbatches`."""
    trees = join_sequences(sequences, tokens_at_once, crossover)
    found = []
    for is_shared in (False, True):
        own = [tree for tree in trees if (len(tree[0]) > 1) == is_shared]
        sizes = torch.tensor([size for _, size in own], dtype=torch.int64)
        buckets = length_buckets(sizes, tokens_at_once)
        found += [[own[index] for index in bucket.tolist()] for bucket in buckets]
    return found


def join_sequences(sequences: list[list[int]], tokens_at_once: int, crossover: int) -> list[Tree]:
    """Decide which sequences form a tree.

    The cost of n tokens in a layer is n for its matrices. Attention adds n^2 / crossover in a tree,
    where all pairs are computed, and half of that in a lone sequence. Sequences are joined in
    lexicographic order as long as the cost falls.

    Args:
        sequences: Token ids.
        tokens_at_once: No tree is larger.
        crossover: Tokens at which attention between all pairs costs as much as the matrices; 0:
            join nothing.

    Returns:
        Trees that together contain every sequence once.
    """
    if not crossover:
        return [([index], len(sequence)) for index, sequence in enumerate(sequences)]

    def cost(size: int, members: int) -> float:
        return size + size * size / (crossover if members > 1 else 2 * crossover)

    trees: list[Tree] = []
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        length = len(sequences[index])
        if trees:
            members, size = trees[-1]
            grown = size + length - common_prefix(sequences[members[-1]], sequences[index])
            together, apart = cost(grown, 2), cost(size, len(members)) + cost(length, 1)
            if grown <= tokens_at_once and together < apart:
                trees[-1] = ([*members, index], grown)
                continue
        trees.append(([index], length))
    return trees


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of common tokens at the beginning of two sequences."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))


def lay_out(groups: list[list[list[int]]], size: int) -> PrefixTrees:
    """Lay out groups of sequences in lexicographic order, each as a tree of up to `size` tokens."""
    ids = torch.zeros(len(groups), size, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    visible = torch.eye(size, dtype=torch.bool).repeat(len(groups), 1, 1)
    trees: list[int] = []
    columns: list[Tensor] = []
    for tree, group in enumerate(groups):
        end = 0
        previous: list[int] = []
        column = torch.arange(0)
        for sequence in group:
            common = common_prefix(previous, sequence)
            first, end = end, end + len(sequence) - common
            column = torch.cat([column[:common], torch.arange(first, end)])
            ids[tree, first:end] = torch.tensor(sequence[common:], dtype=torch.int64)
            positions[tree, first:end] = torch.arange(common, len(sequence))
            seen = torch.ones(end - first, len(sequence), dtype=torch.bool).tril_(common)
            visible[tree, first:end][:, column] = seen
            trees.append(tree)
            columns.append(column)
            previous = sequence
    return PrefixTrees(
        ids, positions, visible, torch.tensor(trees), pad_sequence(columns, batch_first=True)
    )


def crossover_of(model: PreTrainedModel) -> int:
    """Return the number of tokens at which attention costs as much as the matrices of a layer.

    Returns:
        0 for a model without rotary positions or with attention that does not follow a mask, and
        for configurations with other names of their sizes: nothing is joined for these.
    """
    config = model.config
    kinds = set(getattr(config, "layer_types", None) or ())
    has_window = kinds - {"full_attention"} or getattr(config, "sliding_window", None)
    width, heads, mlp = (
        getattr(config, name, None)
        for name in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    if has_window or not (hasattr(model.base_model, "rotary_emb") and width and heads and mlp):
        return 0
    head_width = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    matrices = 2 * width * head_width * (heads + groups) + 3 * width * mlp
    return int(matrices / (2 * heads * head_width) / _ATTENTION_FACTOR)
