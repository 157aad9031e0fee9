from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atod_gym.errors import AtodError
from atod_train.batch import length_buckets, make_batch, select_sequences, split_minibatches
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.policy import Policy
from atod_train.models.scores import score_microbatches
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn

PAD = 0
POLICY: Policy = build_policy(
    ModelShape(layers=2, width=16, heads=2, mlp_width=24), build_word_tokenizer(["a b c"]), seed=1
)
VOCABULARY = len(POLICY.tokenizer)


def make_turn(
    index: int,
    prompt: list[int],
    completion: list[int],
    extends: bool,
    reward: float = 0.0,
    penalty: float = 0.0,
) -> Turn:
    tokens = TokenizedTurn(
        prompt_ids=tuple(prompt),
        completion_ids=tuple(completion),
        sampling_logprobs=tuple(-0.5 - 0.25 * place for place in range(len(completion))),
        finish_reason="stop",
        extends_previous=extends,
    )
    return Turn(index, (), "", "", reward, True, tokens, penalty)


def make_trajectory(turns: list[Turn], group: int = 0) -> Trajectory:
    return Trajectory(group, "task", "kind", tuple(turns), True, False, "terminated", True, 1.0)


token = st.integers(1, VOCABULARY - 1)


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    records = []
    for number in range(draw(st.integers(1, 4))):
        turns = []
        for index in range(draw(st.integers(1, 4))):
            extends = index > 0 and draw(st.booleans())
            prompt = draw(st.lists(token, min_size=0 if extends else 1, max_size=5))
            completion = draw(st.lists(token, min_size=1, max_size=4))
            turns.append(make_turn(index, prompt, completion, extends, reward=float(index)))
        records.append(make_trajectory(turns, group=number // 2))
    return records


def test_layout_in_closed_form() -> None:
    records = [
        make_trajectory(
            [
                make_turn(0, [11, 12], [21, 22], False, reward=1.0),
                make_turn(1, [13], [23], True, reward=-0.5, penalty=0.5),
                make_turn(2, [14], [24, 25], False),
            ],
            group=7,
        )
    ]
    packed = make_batch(records, PAD)
    assert packed.input_ids.tolist() == [[11, 12, 21, 22, 13, 23], [14, 24, 25, 0, 0, 0]]
    assert packed.attention_mask.sum(dim=1).tolist() == [6, 3]
    assert packed.completion_ids.tolist() == [[21, 22], [23, 0], [24, 25]]
    assert packed.completion_mask.tolist() == [[True, True], [True, False], [True, True]]
    assert packed.sampling_logprobs.tolist() == [[-0.5, -0.75], [-0.5, 0.0], [-0.5, -0.75]]
    assert packed.sequence_index.tolist() == [0, 0, 1]
    assert packed.start.tolist() == [2, 5, 1]
    assert packed.turn_index.tolist() == [0, 1, 2]
    assert packed.turn_penalties.tolist() == [0.0, 0.5, 0.0]
    assert packed.group_index.tolist() == [7]
    assert packed.returns.tolist() == [0.5]
    unpacked = make_batch(records, PAD, pack=False)
    assert unpacked.input_ids.tolist() == [
        [11, 12, 21, 22, 0, 0],
        [11, 12, 21, 22, 13, 23],
        [14, 24, 25, 0, 0, 0],
    ]
    assert unpacked.sequence_index.tolist() == [0, 1, 2]
    assert unpacked.start.tolist() == [2, 5, 1]


def test_trajectory_without_turns_keeps_its_place() -> None:
    records = [make_trajectory([]), make_trajectory([make_turn(0, [11], [21], False)], group=1)]
    batch = make_batch(records, PAD)
    assert batch.trajectory_index.tolist() == [1]
    assert batch.group_index.tolist() == [0, 1]


def test_bad_trajectories_are_refused() -> None:
    with pytest.raises(AtodError, match="No trajectory has a turn"):
        make_batch([make_trajectory([])], PAD)
    with pytest.raises(AtodError, match="extends nothing"):
        make_batch([make_trajectory([make_turn(0, [11], [21], True)])], PAD)
    with pytest.raises(AtodError, match="needs a prompt"):
        make_batch([make_trajectory([make_turn(0, [], [21], False)])], PAD)
    turn = make_turn(0, [11], [21], False)
    broken = dataclasses.replace(
        turn, tokens=dataclasses.replace(turn.tokens, sampling_logprobs=())
    )
    with pytest.raises(AtodError, match="0 sampling log-probs"):
        make_batch([make_trajectory([broken])], PAD)


@settings(max_examples=60, deadline=None)
@given(trajectories(), st.booleans())
def test_masks_cover_exactly_the_sampled_tokens(records: list[Trajectory], pack: bool) -> None:
    batch = make_batch(records, PAD, pack=pack)
    turns = [turn for record in records for turn in record.turns]
    for row, turn in enumerate(turns):
        count = int(batch.completion_mask[row].sum())
        assert batch.completion_mask[row, :count].all()
        assert tuple(batch.completion_ids[row, :count].tolist()) == turn.tokens.completion_ids
        sequence, start = int(batch.sequence_index[row]), int(batch.start[row])
        where = slice(start, start + count)
        assert batch.attention_mask[sequence, where].all()
        assert torch.equal(batch.input_ids[sequence, where], batch.completion_ids[row, :count])


def gradient(records: list[Trajectory], *, pack: bool, budget: int) -> tuple[torch.Tensor, ...]:
    batch = make_batch(records, PAD, pack=pack)
    scale = torch.linspace(0.5, 1.5, batch.completion_ids.numel()).view_as(batch.completion_ids)
    POLICY.model.zero_grad()
    logprobs = torch.zeros(batch.completion_ids.shape)
    for part, scores in score_microbatches(POLICY, batch, budget, with_entropy=True):
        loss = (scores.logprobs * scale[part.rows]).sum() + 0.1 * scores.entropies.sum()
        loss.backward()
        logprobs[part.rows] = scores.logprobs.detach()
    flat = torch.cat([p.grad.flatten() for p in POLICY.model.parameters() if p.grad is not None])
    return logprobs, flat


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(trajectories(), st.integers(1, 60))
def test_packing_changes_neither_logprobs_nor_gradient(
    records: list[Trajectory], budget: int
) -> None:
    packed, packed_gradient = gradient(records, pack=True, budget=budget)
    unpacked, unpacked_gradient = gradient(records, pack=False, budget=1000)
    torch.testing.assert_close(packed, unpacked, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed_gradient, unpacked_gradient, rtol=1e-3, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(trajectories(), st.integers(1, 5), st.booleans(), st.integers(0, 100))
def test_minibatches_hold_every_row_once(
    records: list[Trajectory], count: int, pack: bool, seed: int
) -> None:
    batch = make_batch(records, PAD, pack=pack)
    parts = split_minibatches(batch, count, torch.Generator().manual_seed(seed))
    again = split_minibatches(batch, count, torch.Generator().manual_seed(seed))
    assert [p.rows.tolist() for p in parts] == [p.rows.tolist() for p in again]
    rows = [row for part in parts for row in part.rows.tolist()]
    assert sorted(rows) == list(range(len(batch.start)))
    sizes = [len(part.input_ids) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert len(parts) == min(count, len(batch.input_ids))
    for small in parts:
        assert torch.equal(small.completion_ids, batch.completion_ids[small.rows])
        assert torch.equal(small.trajectory_index, batch.trajectory_index[small.rows])
        assert torch.equal(small.returns, batch.returns)
        for row in range(len(small.rows)):
            length = int(small.completion_mask[row].sum())
            start = int(small.start[row])
            held = small.input_ids[small.sequence_index[row], start : start + length]
            assert torch.equal(held, small.completion_ids[row, :length])


def test_whole_selection_is_the_batch() -> None:
    batch = make_batch([make_trajectory([make_turn(0, [11], [21], False)])], PAD)
    part = select_sequences(batch, torch.tensor([0]))
    for field in dataclasses.fields(batch):
        assert torch.equal(getattr(part, field.name), getattr(batch, field.name))


def test_no_minibatch_is_refused() -> None:
    batch = make_batch([make_trajectory([make_turn(0, [11], [21], False)])], PAD)
    with pytest.raises(AtodError, match="at least 1"):
        split_minibatches(batch, 0, torch.Generator())


def test_length_buckets_keep_to_the_budget() -> None:
    buckets = length_buckets(torch.tensor([3, 10, 4, 50, 5]), 20)
    assert [bucket.tolist() for bucket in buckets] == [[3], [1, 4], [2, 0]]
