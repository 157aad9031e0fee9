"""Sequences that begin alike, computed once: episodes of a group share prompts and observations.

Sequences are laid out as a tree. What they have in common stands there once, each token knows its
position in its own sequence, and attends to those before it there and to no other. Scores and
gradients are those of the separate sequences, up to rounding. Of the group's dialogues in Search-QA
less than half of the tokens remain, of those in ALFWorld three quarters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor
from transformers import PreTrainedModel

from atod_train.batch import Minibatch, length_buckets, select_sequences
from atod_train.models.policy import additive_mask
from atod_train.records import Batch

Tree = tuple[list[int], int]
"""The sequences that are joined, in lexicographic order, and how many tokens the tree has."""

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
        mask = additive_mask(~self.visible.to(device), dtype)
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
    sequences = sequences_of(batch)
    for trees in divided(sequences, tokens_at_once, crossover):
        members = [index for tree, _ in trees for index in tree]
        part = select_sequences(batch, torch.tensor(members))
        layout = None
        if len(members) > len(trees):
            groups = [[sequences[index] for index in tree] for tree, _ in trees]
            layout = laid_out(groups, max(size for _, size in trees))
        yield Part(part.batch, part.rows, layout)


def sequences_of(batch: Batch) -> list[list[int]]:
    """The token ids of each sequence, without padding."""
    lengths = batch.attention_mask.sum(dim=1).tolist()
    return [ids[:length] for ids, length in zip(batch.input_ids.tolist(), lengths, strict=True)]


def divided(sequences: list[list[int]], tokens_at_once: int, crossover: int) -> list[list[Tree]]:
    """The trees of each part, lone sequences and others apart; see `parts`."""
    trees = joined(sequences, tokens_at_once, crossover)
    found = []
    for is_shared in (False, True):
        own = [tree for tree in trees if (len(tree[0]) > 1) == is_shared]
        sizes = torch.tensor([size for _, size in own], dtype=torch.int64)
        for bucket in length_buckets(sizes, tokens_at_once):
            found.append([own[index] for index in bucket.tolist()])
    return found


def joined(sequences: list[list[int]], tokens_at_once: int, crossover: int) -> list[Tree]:
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
        Trees that together hold every sequence once.
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
    """How many tokens two sequences begin with alike."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))


def laid_out(groups: list[list[list[int]]], size: int) -> PrefixTrees:
    """A tree of up to `size` tokens of each group of sequences, in lexicographic order."""
    ids = torch.zeros(len(groups), size, dtype=torch.int64)
    positions = torch.zeros_like(ids)
    visible = torch.eye(size, dtype=torch.bool).repeat(len(groups), 1, 1)
    longest = max(len(sequence) for group in groups for sequence in group)
    trees: list[int] = []
    standing: list[Tensor] = []
    for tree, group in enumerate(groups):
        end = 0
        last: list[int] = []
        for sequence in group:
            common = common_prefix(last, sequence)
            first, end = end, end + len(sequence) - common
            place = torch.zeros(longest, dtype=torch.int64)
            if common:
                place[:common] = standing[-1][:common]
            place[common : len(sequence)] = torch.arange(first, end)
            ids[tree, first:end] = torch.tensor(sequence[common:], dtype=torch.int64)
            positions[tree, first:end] = torch.arange(common, len(sequence))
            seen = torch.ones(end - first, len(sequence), dtype=torch.bool).tril_(common)
            visible[tree, first:end][:, place[: len(sequence)]] = seen
            trees.append(tree)
            standing.append(place)
            last = sequence
    return PrefixTrees(ids, positions, visible, torch.tensor(trees), torch.stack(standing))


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


def crossover_of(model: PreTrainedModel) -> int:
    """Return the tokens at which attention costs as much as the matrices of a layer.

    Args:
        model: 0 is returned for one that does not take trees, see `can_take_trees`.
    """
    config = model.config
    # Configurations of some architectures have other names for these: then nothing is joined.
    width, heads, mlp = (
        getattr(config, name, None)
        for name in ("hidden_size", "num_attention_heads", "intermediate_size")
    )
    if not (width and heads and mlp and can_take_trees(model)):
        return 0
    head_width = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    matrices = 2 * width * head_width * (heads + groups) + 3 * width * mlp
    return int(matrices / (2 * heads * head_width) / _ATTENTION_FACTOR)
