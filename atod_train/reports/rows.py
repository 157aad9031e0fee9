"""Convert trajectories to plain rows with exact tokens, for JSON lines and Hugging Face data sets.

A row is one episode. Its keys are those of `Trajectory`, and

    format                "atod-trajectory/1"
    episode_return        sum of the turns' rewards
    sequences             the training sequences, one or more per episode, each with
      input_ids           token ids, prompts and completions in order, as sampled
      completion_mask     1 exactly on sampled tokens, 0 on prompts and observations
      sampling_logprobs   of each token, at the sampling temperature; 0.0 where the mask is 0
    turns                 in order, each with
      index, prompt, completion, action, reward, penalty, is_action_valid, turns_left_out,
      invalid_reason, is_trained, finish_reason
                          as in `Turn`; prompt is a list of {role, content}
      sequence            number of its sequence
      prompt_start        index of the first new token of this turn in it
      start, end          its completion is input_ids[start:end]
      disagreement, uncertainty, weight
                          d and h in nats per token and w of T-DUR (Eq. 13-16), or null

In chat style an episode is one sequence, in window style every turn is one; a dialogue that was
restarted to fit has several. A causal model predicts input_ids[t] from the ids before t.
Every row has all keys, always of the same type, as data sets require.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from atod_gym.errors import AtodError, MissingExtraError
from atod_gym.types import Message
from atod_train.files import read_json_lines, replacing
from atod_train.records import TokenizedTurn, Trajectory, Turn

FORMAT = "atod-trajectory/1"
_SAME = [name for name in Trajectory.__slots__ if name != "turns"]
_SAME_IN_TURN = [name for name in Turn.__slots__ if name not in ("prompt", "tokens")]


class TurnStatistics(NamedTuple):
    """Statistics of a turn under the teacher."""

    disagreement: float
    uncertainty: float
    weight: float


def to_row(
    trajectory: Trajectory, statistics: Sequence[TurnStatistics] | None = None
) -> dict[str, Any]:
    """Return the row of a trajectory, of JSON values only.

    Statistics are given for each turn, or not at all without a teacher.

    Raises:
        AtodError: the number of statistics differs; a first turn claims to extend another.
    """
    if statistics is not None and len(statistics) != len(trajectory.turns):
        raise AtodError(f"{len(statistics)} statistics for {len(trajectory.turns)} turns.")
    sequences: list[dict[str, list[Any]]] = []
    turns = []
    for number, turn in enumerate(trajectory.turns):
        tokens = turn.tokens
        if not tokens.extends_previous:
            sequences.append({"input_ids": [], "completion_mask": [], "sampling_logprobs": []})
        elif not sequences:
            raise AtodError("The first turn of a trajectory cannot extend another one.")
        ids, mask, logprobs = sequences[-1].values()
        prompt_start = len(ids)
        start = prompt_start + len(tokens.prompt_ids)
        ids += [*tokens.prompt_ids, *tokens.completion_ids]
        mask += [0] * len(tokens.prompt_ids) + [1] * len(tokens.completion_ids)
        logprobs += [0.0] * len(tokens.prompt_ids) + list(tokens.sampling_logprobs)
        found = None if statistics is None else statistics[number]
        turns.append(
            {
                **{name: getattr(turn, name) for name in _SAME_IN_TURN},
                "prompt": [{"role": m.role, "content": m.content} for m in turn.prompt],
                "finish_reason": tokens.finish_reason,
                "sequence": len(sequences) - 1,
                "prompt_start": prompt_start,
                "start": start,
                "end": len(ids),
                **{name: getattr(found, name, None) for name in TurnStatistics._fields},
            }
        )
    return {
        "format": FORMAT,
        **{name: getattr(trajectory, name) for name in _SAME},
        "episode_return": trajectory.episode_return,
        "sequences": sequences,
        "turns": turns,
    }


def from_row(row: Mapping[str, Any]) -> tuple[Trajectory, tuple[TurnStatistics, ...] | None]:
    """Return the trajectory and statistics of a row; further keys are ignored.

    Raises:
        AtodError: it is not such a row, or its parts are inconsistent.
    """
    try:
        if row["format"] != FORMAT:
            raise ValueError(f"format {row['format']!r}; this reads {FORMAT!r}")
        turns = tuple(_turn(turn, row["sequences"]) for turn in row["turns"])
        record = Trajectory(**{name: row[name] for name in _SAME}, turns=turns)
        found = [tuple(turn[name] for name in TurnStatistics._fields) for turn in row["turns"]]
        # The row must equal the one of its trajectory, or it was edited.
        if to_row(record)["sequences"] != [dict(part) for part in row["sequences"]]:
            raise ValueError("the turns do not cover the sequences")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise AtodError(f"not the row of a trajectory: {reason}") from error
    if any(None in values for values in found):
        return record, None
    return record, tuple(TurnStatistics(*values) for values in found)


def _turn(row: Mapping[str, Any], sequences: Sequence[Mapping[str, Any]]) -> Turn:
    sequence = sequences[row["sequence"]]
    first, start, end = row["prompt_start"], row["start"], row["end"]
    tokens = TokenizedTurn(
        prompt_ids=tuple(sequence["input_ids"][first:start]),
        completion_ids=tuple(sequence["input_ids"][start:end]),
        sampling_logprobs=tuple(sequence["sampling_logprobs"][start:end]),
        finish_reason=row["finish_reason"],
        extends_previous=first > 0,
    )
    prompt = tuple(Message(message["role"], message["content"]) for message in row["prompt"])
    # Rows of earlier versions lack fields for which `Turn` has a default.
    same = {name: row[name] for name in _SAME_IN_TURN if name in row}
    return Turn(**same, prompt=prompt, tokens=tokens)


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> int:
    """Write one row a line, atomically; return the number of rows.

    Raises:
        AtodError: the file cannot be written; a number is not finite, which JSON cannot represent.
    """
    count = 0
    try:
        with replacing(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                count += 1
    except (OSError, ValueError) as error:
        raise AtodError(f"Cannot write {path}: {error}") from error
    return count


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, one after the other.

    Raises:
        FileError: the file cannot be read; names the first line that is not a JSON object.
    """
    return read_json_lines(Path(path), required=True)


def to_dataset(rows: Iterable[Mapping[str, Any]]) -> Any:
    """Return a Hugging Face `datasets.Dataset` of rows, with fixed types.

    `from_row` and `write_rows` accept its rows; `write_rows` keeps every digit, while
    `Dataset.to_json` writes ten.

    Raises:
        MissingExtraError: the package datasets is not installed.
    """
    try:
        from datasets import Dataset, Features, List, Value
    except ImportError as error:
        raise MissingExtraError(
            "Data sets need a package that is not installed: pip install 'atod-gym[trl]'"
        ) from error

    def typed(names: Iterable[str], kind: str) -> dict[str, Any]:
        return {name: Value(kind) for name in names}

    turn = {
        **typed(("index", "turns_left_out", "sequence", "prompt_start", "start", "end"), "int64"),
        **typed(("completion", "action", "invalid_reason", "finish_reason"), "string"),
        **typed(("reward", "penalty", *TurnStatistics._fields), "float64"),
        **typed(("is_action_valid", "is_trained"), "bool"),
        "prompt": List(typed(("role", "content"), "string")),
    }
    sequence = {
        "input_ids": List(Value("int64")),
        "completion_mask": List(Value("int64")),
        "sampling_logprobs": List(Value("float64")),
    }
    features = {
        **typed(("format", "task_id", "task_type", "stop_reason"), "string"),
        **typed(("group_id",), "int64"),
        **typed(("terminated", "truncated", "success"), "bool"),
        **typed(("score", "episode_return"), "float64"),
        "sequences": List(sequence),
        "turns": List(turn),
    }
    return Dataset.from_list([dict(row) for row in rows], features=Features(features))
