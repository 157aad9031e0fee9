from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from atod_gym.errors import AtodError
from atod_gym.types import Message
from atod_train.algorithm.atod import turn_weights
from atod_train.batch import make_batch
from atod_train.records import TokenizedTurn, Trajectory, Turn
from atod_train.reports.rows import (
    TurnStatistics,
    from_row,
    read_rows,
    to_dataset,
    to_row,
    write_rows,
)

TEXT = st.text(max_size=12)
# The lone surrogates that a byte-level decoder can give are no UTF-8, and JSON keeps them.
IDS = st.lists(st.integers(0, 200_000), min_size=1, max_size=5).map(tuple)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    turns = []
    for index in range(draw(st.integers(0, 4))):
        completion = draw(IDS)
        logprobs = draw(
            st.lists(
                st.floats(-50, 0, width=32), min_size=len(completion), max_size=len(completion)
            )
        )
        tokens = TokenizedTurn(
            draw(IDS),
            completion,
            tuple(logprobs),
            draw(st.sampled_from(["stop", "length"])),
            index > 0 and draw(st.booleans()),
        )
        prompt = tuple(
            Message(role, draw(TEXT))
            for role in draw(st.lists(st.sampled_from(["system", "user"]), max_size=2))
        )
        turns.append(
            Turn(
                index, prompt, draw(TEXT), draw(TEXT), draw(NUMBERS), draw(st.booleans()), tokens,
                penalty=draw(NUMBERS),
                invalid_reason=draw(st.sampled_from(["", "not admissible"])),
                turns_left_out=draw(st.integers(0, 9)),
                is_trained=draw(st.booleans()),
            )
        )  # fmt: skip
    over = draw(st.booleans())
    return Trajectory(
        draw(st.integers(0, 99)), draw(TEXT), draw(TEXT), tuple(turns), over, not over,
        draw(st.sampled_from(["terminated", "turn_limit", "context_limit"])),
        draw(st.booleans()), draw(NUMBERS),
    )  # fmt: skip


def statistics(trajectory: Trajectory) -> tuple[TurnStatistics, ...]:
    d = torch.linspace(0.1, 0.9, max(1, len(trajectory.turns)))[: len(trajectory.turns)]
    return tuple(
        TurnStatistics(float(a), 0.5, float(w)) for a, w in zip(d, turn_weights(d, d), strict=True)
    )


@pytest.mark.slow
@given(trajectories(), st.booleans())
def test_what_is_written_is_read_back(trajectory: Trajectory, has_teacher: bool) -> None:
    # Two rewards of 1e308 have no sum that JSON could hold; `write_rows` refuses it, see below.
    assume(math.isfinite(trajectory.episode_return))
    found = statistics(trajectory) if has_teacher and trajectory.turns else None
    row = json.loads(json.dumps(to_row(trajectory, found), allow_nan=False))
    again, said = from_row(row)
    assert again == trajectory
    assert (said or None) == found


def test_rows_without_reasons_are_read() -> None:
    tokens = TokenizedTurn((1,), (2,), (0.0,), "stop", False)
    turn = Turn(0, (), "x", "x", 0.0, False, tokens, invalid_reason="not admissible")
    record = Trajectory(0, "", "", (turn,), True, False, "terminated", False, 0.0)
    row = to_row(record)
    assert from_row(row)[0] == record
    del row["turns"][0]["invalid_reason"], row["turns"][0]["is_trained"]
    assert from_row(row)[0].turns == (replace(turn, invalid_reason=""),)


@pytest.mark.slow
@given(trajectories())
def test_sequences_are_what_the_trainer_packs(trajectory: Trajectory) -> None:
    row = to_row(trajectory)
    if not trajectory.turns:
        assert row["sequences"] == []
        return
    batch = make_batch([trajectory], pad_id=0)
    lengths = batch.attention_mask.sum(1).tolist()
    for i, sequence in enumerate(row["sequences"]):
        assert batch.input_ids[i, : lengths[i]].tolist() == sequence["input_ids"]
        assert len(sequence["completion_mask"]) == lengths[i]
    for i, turn in enumerate(row["turns"]):
        assert (turn["sequence"], turn["start"]) == (batch.sequence_index[i], batch.start[i])
        sequence = row["sequences"][turn["sequence"]]
        part = slice(turn["start"], turn["end"])
        assert tuple(sequence["input_ids"][part]) == trajectory.turns[i].tokens.completion_ids
        assert set(sequence["completion_mask"][part]) == {1}
    sampled = sum(sum(sequence["completion_mask"]) for sequence in row["sequences"])
    assert sampled == int(batch.completion_mask.sum())


def example(turns: int = 3, extends: bool = True) -> Trajectory:
    played = tuple(
        Turn(
            i, (Message("user", f"look {i}"),), "go", "go", 0.1, True,
            TokenizedTurn((1, 2), (3, 4), (-0.1, -1 / 3), "stop", extends and i > 0),
        )
        for i in range(turns)
    )  # fmt: skip
    return Trajectory(1, "a/b", "a", played, True, False, "terminated", True, 1.0)


@pytest.mark.parametrize("extends", [True, False])
def test_files(extends: bool, tmp_path: Path) -> None:
    records = [example(3, extends), example(0), example(1)]
    path = tmp_path / "rollouts.jsonl"
    assert write_rows(path, (to_row(record) for record in records)) == 3
    assert [from_row(row)[0] for row in read_rows(path)] == records
    assert [entry.name for entry in tmp_path.iterdir()] == ["rollouts.jsonl"]
    count = len(to_row(records[0])["sequences"])
    assert count == (1 if extends else 3)


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    write_rows(path, [to_row(example())])
    before = path.read_bytes()
    broken = replace(example(), score=float("nan"))
    with pytest.raises(AtodError, match="Cannot write"):
        write_rows(path, [to_row(example()), to_row(broken)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(AtodError, match="Cannot write"):
        write_rows(tmp_path / "none" / "rollouts.jsonl", [])
    path.write_bytes(before + before[:50])
    with pytest.raises(AtodError, match=r"line 2 of .* is broken"):
        list(read_rows(path))
    path.write_text("3\n", encoding="utf-8")
    with pytest.raises(AtodError, match=r"line 1 of .*no JSON object"):
        list(read_rows(path))
    with pytest.raises(AtodError, match="No such file"):
        list(read_rows(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("turns"), "no key 'turns'"),
        (lambda row: row.update(format="atod-trajectory/9"), "atod-trajectory/9"),
        (lambda row: row["turns"][1].update(sequence=4), "index out of range"),
        (lambda row: row["turns"][1].update(end=5), "do not cover"),
        (lambda row: row["sequences"][0]["completion_mask"].reverse(), "do not cover"),
    ],
)
def test_rows_that_make_no_sense(change: Any, message: str) -> None:
    row = to_row(example())
    change(row)
    with pytest.raises(AtodError, match=message):
        from_row(row)


def test_turns_and_statistics_must_fit() -> None:
    with pytest.raises(AtodError, match="1 statistics for 3 turns"):
        to_row(example(), [TurnStatistics(0.0, 0.0, 1.0)])
    lost = replace(example(), turns=example().turns[1:])
    with pytest.raises(AtodError, match="cannot extend"):
        to_row(lost)


def test_data_sets_hold_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the package datasets is not installed")
    records = [example(0), example(3), example(2, False)]
    said = [None, statistics(records[1]), None]
    made = to_dataset(to_row(*pair) for pair in zip(records, said, strict=True))
    made.to_parquet(tmp_path / "rows.parquet")
    write_rows(tmp_path / "rows.jsonl", made)
    for kind, name in (("parquet", "rows.parquet"), ("json", "rows.jsonl")):
        read = datasets.load_dataset(
            kind, data_files=str(tmp_path / name), split="train", cache_dir=str(tmp_path / "cache"),
            features=made.features,
        )  # fmt: skip
        found = [from_row(row) for row in read]
        assert [trajectory for trajectory, _ in found] == records
        assert [statistics or None for _, statistics in found] == said
