"""Prompts that outgrow the model: the oldest turns are left out, marked and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import CONFIG
from transformers import PreTrainedTokenizerFast

from atod_gym.types import Message
from atod_train.batching import make_batch
from atod_train.config import EnvConfig, PromptStyle
from atod_train.demonstrations import demonstrate, demonstration_texts
from atod_train.dialogue import DialogueEncoder
from atod_train.episode_prompts import next_prompt
from atod_train.generation import Generator
from atod_train.metrics import read_metrics
from atod_train.policy import ModelShape, Policy, build_policy
from atod_train.rollout import EnvPool, collect
from atod_train.study import run_study
from atod_train.tokenizer import build_word_tokenizer
from atod_train.types import TokenizedTurn, Trajectory, Turn

ENV = EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=12, history_window=6)
SHAPE = ModelShape(layers=1, width=32, heads=2, mlp_width=64, max_positions=1024)
NOTE = "[ 1 2 3 4 5 earlier turn turns left out ]"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    pool = EnvPool(replace(ENV, max_turns=20), "train")
    texts = demonstration_texts(demonstrate(pool, 20, 0.0, 0))
    return build_word_tokenizer([*texts, NOTE, "observed did what happened in turns before it"])


def _play(
    tokenizer: PreTrainedTokenizerFast, style: PromptStyle, max_context: int
) -> tuple[Policy, list[Trajectory]]:
    policy = build_policy(SHAPE, tokenizer, seed=0)
    pool = EnvPool(replace(ENV, prompt_style=style), "train")
    dialogue = DialogueEncoder(tokenizer, style)
    generator = Generator(policy, dialogue, max_completion_tokens=5, max_context=max_context)
    groups = collect(pool, generator, pool.task_ids[:6], group_size=2, turn_limit=12)
    return policy, [record for group in groups for record in group.trajectories]


@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_oldest_turns_are_left_out(
    style: PromptStyle, tokenizer: PreTrainedTokenizerFast
) -> None:
    limit = 190
    policy, records = _play(tokenizer, style, limit)
    turns = [turn for record in records for turn in record.turns]
    assert all(record.stop_reason == "turn_limit" for record in records)
    shortened = [turn for turn in turns if turn.turns_left_out]
    assert len(shortened) > 5
    for turn in shortened:
        assert not turn.tokens.extends_previous
        text = tokenizer.decode(turn.tokens.prompt_ids)
        plural = "s" if turn.turns_left_out > 1 else ""
        assert f"{turn.turns_left_out} earlier turn{plural} left out" in text
        assert len(turn.tokens.prompt_ids) + 5 <= limit
    if style == "chat":
        # A dialogue that begins anew goes on growing for a while.
        assert len(shortened) < len(turns) / 2
        assert any(turn.tokens.extends_previous for turn in turns)
    batch = make_batch(records, 0)
    assert batch.input_ids.shape[1] <= limit
    again = policy.completion_logprobs(batch)
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_kept_completions_are_those_that_were_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    _, records = _play(tokenizer, "chat", 150)
    kept = 0
    for record in records:
        for turn in record.turns:
            if not turn.turns_left_out:
                continue
            ids = turn.tokens.prompt_ids
            place = 0
            for earlier in record.turns[turn.turns_left_out : turn.index]:
                place = _find(ids, earlier.tokens.completion_ids, place)
                kept += 1
            assert tokenizer.decode(ids).startswith("<user> your task : ")
    assert kept > 5


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    for place in range(start, len(ids) - len(part) + 1):
        if tuple(ids[place : place + len(part)]) == tuple(part):
            return place + len(part)
    pytest.fail("a completion that is kept is not there as it was sampled")


@pytest.mark.parametrize("style", ["chat", "window"])
def test_what_does_not_fit_alone_ends_the_episode(
    style: PromptStyle, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, records = _play(tokenizer, style, 1000)
    lengths = sorted(len(record.turns[0].tokens.prompt_ids) for record in records)
    _, records = _play(tokenizer, style, lengths[-1] + 4)
    ended = [record for record in records if record.stop_reason == "context_limit"]
    assert all(record.truncated and not record.success for record in ended)
    assert any(not record.turns for record in ended)
    assert any(record.turns for record in records)
    batch = make_batch(records, 0)
    assert len(batch.returns) == len(records)
    assert len(batch.start) == sum(len(record.turns) for record in records)


def test_a_run_counts_them_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, max_context=130),
        train=replace(CONFIG.train, steps=2, eval_every=0),
    )
    run_study(config, tmp_path / "study")
    rows = read_metrics(tmp_path / "study" / "atod-seed0")
    assert len(rows) == 2
    assert all(0 < row["rollout/truncated_prompts"] < 1 for row in rows)
    assert max(float(row["rollout/logprob_drift"]) for row in rows) < 1e-3


# -- any dialogue --------------------------------------------------------------------------------

WORDS = build_word_tokenizer(["take mug from desk 1", NOTE])
POLICY = build_policy(ModelShape(1, 16, 2, 24, max_positions=256), WORDS, seed=0)
TEXT = st.text(min_size=0, max_size=40) | st.sampled_from(["take mug", "desk 1", "Häuser 猫 🐈"])


class _NoHistory:
    """A window-style environment that shows no past turns."""

    def get_wrapper_attr(self, name: str) -> int:
        return 0


@settings(max_examples=60, deadline=None)
@given(
    style=st.sampled_from(["chat", "window"]),
    texts=st.lists(TEXT, min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    limit=st.integers(24, 90),
    pack=st.booleans(),
)
def test_what_was_fed_is_what_is_trained_on(
    style: PromptStyle, texts: list[str], seed: int, limit: int, pack: bool
) -> None:
    dialogue = DialogueEncoder(WORDS, style)
    source = torch.Generator().manual_seed(seed)
    generator = Generator(
        POLICY, dialogue, max_completion_tokens=4, max_context=limit, generator=source
    )
    generator.start(1)
    turns: list[Turn] = []
    fed: list[list[int]] = []  # all that the model saw before and during each turn
    for index, text in enumerate(texts):
        messages = (Message("user", text),)
        env: Any = _NoHistory()
        prompt = next_prompt(env, messages, turns, generator, 0)
        if not prompt.extends_previous:
            generator.restart(0)
        [completion] = generator.prompt([prompt.ids], [0])
        if completion is None:
            break
        before = fed[-1] if prompt.extends_previous else []
        fed.append([*before, *prompt.ids, *completion.ids])
        assert len(fed[-1]) <= limit
        assert generator.context_length(0) == len(fed[-1])
        tokens = TokenizedTurn(
            prompt.ids, completion.ids, completion.logprobs, completion.finish_reason,
            prompt.extends_previous,
        )  # fmt: skip
        turns.append(Turn(index, messages, "", "", 0.0, True, tokens, 0.0, prompt.turns_left_out))
        assert prompt.turns_left_out <= index
    if not turns:
        return
    record = Trajectory(0, "t", "k", tuple(turns), True, False, "terminated", True, 1.0)
    batch = make_batch([record], POLICY.pad_id, pack=pack)
    assert int(batch.completion_mask.sum()) == sum(len(t.tokens.completion_ids) for t in turns)
    for row, (turn, seen) in enumerate(zip(turns, fed, strict=True)):
        ids = turn.tokens.completion_ids
        start, sequence = int(batch.start[row]), int(batch.sequence_index[row])
        assert batch.completion_ids[row, : len(ids)].tolist() == list(ids)
        assert batch.completion_mask[row].tolist() == [
            column < len(ids) for column in range(batch.completion_mask.shape[1])
        ]
        assert batch.input_ids[sequence, : start + len(ids)].tolist() == seen
        # The end-of-turn token is trained where it was sampled.
        assert (turn.tokens.finish_reason == "stop") == (ids[-1] in dialogue.stop_ids)
    again = POLICY.completion_logprobs(batch)
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)
