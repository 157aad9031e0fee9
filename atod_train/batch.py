"""Convert trajectories to tensors, and select parts of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from atod_gym.errors import AtodError, InvalidSettingError
from atod_train.records import Batch, TokenizedTurn, Trajectory

_OVER_ROWS = (
    "completion_ids", "completion_mask", "sampling_logprobs", "start",
    "trajectory_index", "turn_index", "turn_penalties", "rows",
)  # fmt: skip


def make_batch(trajectories: Sequence[Trajectory], pad_id: int, *, pack: bool = True) -> Batch:
    """Lay out trajectories as model sequences and turn rows.

    Args:
        trajectories: N trajectories; one without turns has no row but keeps its index in
            `group_index` and `returns`.
        pad_id: Token id for padding.
        pack: True: turns that extend the previous one continue its sequence, so an append-only
                episode is one sequence. False: every turn is a separate sequence with its full
            prompt. Both give the same log-probs; packing computes shared prefixes once.

    Returns:
        A `Batch`, rows in the order of trajectories and turns, on the CPU.

    Raises:
        AtodError: No turn, a first turn that claims to extend a previous one, or a
            sequence that starts without a prompt.
    """
    turns = [(number, turn) for number, record in enumerate(trajectories) for turn in record.turns]
    if not turns:
        raise AtodError("No trajectory has a turn: there is nothing to train on.")
    sequences, sequence_index, start = _lay_out(trajectories, pack)
    tokens = [turn.tokens for _, turn in turns]
    completion_ids, completion_mask = _pad([list(t.completion_ids) for t in tokens], pad_id)
    sampling_logprobs = torch.zeros(completion_ids.shape, dtype=torch.float32)
    sampling_logprobs[completion_mask] = torch.tensor(
        [value for t in tokens for value in t.sampling_logprobs], dtype=torch.float32
    )
    input_ids, attention_mask = _pad(sequences, pad_id)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        completion_ids=completion_ids,
        completion_mask=completion_mask,
        sampling_logprobs=sampling_logprobs,
        sequence_index=torch.tensor(sequence_index),
        start=torch.tensor(start),
        trajectory_index=torch.tensor([number for number, _ in turns]),
        turn_index=torch.tensor([turn.index for _, turn in turns]),
        turn_penalties=torch.tensor([turn.penalty for _, turn in turns], dtype=torch.float32),
        group_index=torch.tensor([record.group_id for record in trajectories]),
        returns=torch.tensor(
            [record.episode_return for record in trajectories], dtype=torch.float32
        ),
        rows=torch.arange(len(turns)),
    )


def _lay_out(
    trajectories: Sequence[Trajectory], pack: bool
) -> tuple[list[list[int]], list[int], list[int]]:
    """Return sequences of token ids, and for each turn row its sequence and first position."""
    sequences: list[list[int]] = []
    sequence_index: list[int] = []
    start: list[int] = []
    for record in trajectories:
        context: list[int] = []
        for turn in record.turns:
            tokens = turn.tokens
            _check_turn(tokens, bool(context), record.task_id)
            if not tokens.extends_previous:
                context = []
            if not (pack and context):
                # Unpacked, every turn copies the previous tokens; packed, the list grows in place.
                context = list(context)
                sequences.append(context)
            context.extend(tokens.prompt_ids)
            sequence_index.append(len(sequences) - 1)
            start.append(len(context))
            context.extend(tokens.completion_ids)
    return sequences, sequence_index, start


def _check_turn(tokens: TokenizedTurn, has_context: bool, task_id: str) -> None:
    if tokens.extends_previous and not has_context:
        raise AtodError(f"Task {task_id}: the first turn of a trajectory extends nothing.")
    if not tokens.extends_previous and not tokens.prompt_ids:
        raise AtodError(f"Task {task_id}: a turn that starts a sequence needs a prompt.")
    if len(tokens.sampling_logprobs) != len(tokens.completion_ids):
        raise AtodError(
            f"Task {task_id}: {len(tokens.completion_ids)} completion tokens but "
            f"{len(tokens.sampling_logprobs)} sampling log-probs."
        )


def _pad(rows: Sequence[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad to a rectangle: ids [n, longest] int64 and mask [n, longest] bool."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    ids = torch.full(mask.shape, value, dtype=torch.int64)
    ids[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return ids, mask


def select_sequences(batch: Batch, sequences: Tensor) -> Batch:
    """Return the part of a batch in some of its sequences.

    Args:
        batch: A batch of S sequences and R rows.
        sequences: [s] int64, distinct indices into the S sequences, in output order.
    """
    sequences = sequences.to(batch.input_ids.device)
    place = torch.full_like(batch.attention_mask[:, 0], -1, dtype=torch.int64)
    place[sequences] = torch.arange(len(sequences), device=place.device)
    sequence_index = place[batch.sequence_index]
    kept = sequence_index >= 0
    attention_mask = batch.attention_mask[sequences]
    longest = int(attention_mask.sum(dim=1).max())
    return replace(
        batch,
        input_ids=batch.input_ids[sequences, :longest],
        attention_mask=attention_mask[:, :longest],
        sequence_index=sequence_index[kept],
        **{name: getattr(batch, name)[kept] for name in _OVER_ROWS},
    )


def minibatch_count(minibatches: str, rows: int) -> int:
    """Return the number of updates of a step.

    Args:
        minibatches: the setting: a number of updates; or `rows:256`, the number that gives each
            about 256 turn rows.
        rows: turn rows of the step.

    Raises:
        InvalidSettingError: it is neither.
    """
    name, separator, number = str(minibatches).rpartition(":")
    if (
        (name, separator) not in (("", ""), ("rows", ":"))
        or not number.isdecimal()
        or int(number) < 1
    ):
        raise InvalidSettingError(
            "train.minibatches must be a number of updates of at least 1, or rows with the turn "
            f"rows of an update (rows:256), not {minibatches!r}."
        )
    return max(1, round(rows / int(number))) if separator else int(number)


def split_minibatches(batch: Batch, count: int, generator: torch.Generator) -> list[Batch]:
    """Split a batch at random into parts for several optimiser updates.

    Whole sequences are drawn, so a packed trajectory is never split. In window style a sequence
    is one turn row, as in the published runs.

    Args:
        batch: The batch of one step.
        count: Number of parts; fewer are returned if there are fewer sequences.
        generator: CPU source of randomness.

    Returns:
        Parts that differ by at most one in number of sequences; together they have every row once.
    """
    if count < 1:
        raise InvalidSettingError(f"A step needs at least 1 minibatch, not {count}.")
    order = torch.randperm(len(batch.input_ids), generator=generator)
    parts = order.tensor_split(min(count, len(order)))
    return [select_sequences(batch, part.sort().values) for part in parts]


def share_of_sequences(batch: Batch, index: int, count: int) -> Tensor:
    """Return the indices of the sequences that a rank processes.

    Groups stay together, since their sequences share prefixes: the longest group first, each to the
    rank with the fewest tokens so far. With fewer than two groups for each rank, single sequences
    are assigned instead.

    Args:
        batch: The same on all ranks.
        index: Number of the rank.
        count: Number of ranks.

    Returns:
        [s] int64, longest first; over all ranks each of the S sequences once.
    """
    lengths = batch.attention_mask.sum(dim=1)
    order = torch.argsort(lengths, descending=True, stable=True)
    unit_of = torch.zeros_like(lengths)
    unit_of[batch.sequence_index] = batch.group_index[batch.trajectory_index]
    if len(unit_of.unique()) < 2 * count:
        unit_of = torch.arange(len(lengths))
    units, inverse = unit_of.unique(return_inverse=True)
    tokens = torch.zeros(len(units), dtype=lengths.dtype).index_add(0, inverse, lengths)
    owner = torch.zeros_like(units)
    loads = [0] * count
    for unit in torch.argsort(tokens, descending=True, stable=True).tolist():
        owner[unit] = loads.index(min(loads))
        loads[int(owner[unit])] += int(tokens[unit])
    return order[owner[inverse][order] == index]


def length_buckets(lengths: Tensor, tokens_per_microbatch: int) -> list[Tensor]:
    """Group sequences of similar length so that each group, padded, fits a token budget.

    Args:
        lengths: [S] int64, tokens per sequence.
        tokens_per_microbatch: Budget of padded tokens; a longer sequence is a group alone.

    Returns:
        Index tensors that cover 0..S-1, longest sequences first, so that the first group shows the
        largest memory use.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    sizes = lengths[order].tolist()
    buckets: list[Tensor] = []
    first = 0
    while first < len(sizes):
        count = max(1, tokens_per_microbatch // sizes[first])
        buckets.append(order[first : first + count])
        first += count
    return buckets
