"""Prompts that outgrow the model: the oldest turns are left out, marked and counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_dialogue import CHATML
from test_trainer import CONFIG
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from atod_gym.dialogue import AgentDialogue
from atod_gym.errors import AtodError
from atod_gym.prompts import PromptStyle, PromptTemplate, left_out_note
from atod_gym.spaces import UnicodeText, turn_observation_space
from atod_gym.types import Message, TurnObservation
from atod_train.batch import make_batch
from atod_train.config import AlgorithmConfig, EnvConfig, parse_prompt_style
from atod_train.evaluation.evaluate import evaluate
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator, SampledTokens
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import Batch, Trajectory, Turn
from atod_train.reports.metrics import read_evaluations, read_metrics, read_trajectories
from atod_train.rollout.env_pool import EnvPool, SingleEnvs
from atod_train.rollout.rollout import collect
from atod_train.studies.study import train_one
from atod_train.training import trainer
from atod_train.training.supervised import demonstrate, demonstration_texts

ENV = EnvConfig(data="generated", options={"house_size": "tiny"}, max_turns=12)
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
    shown = "window:6" if style == "window" else style
    pool = EnvPool(replace(ENV, prompt_style=shown), "train")
    dialogue = DialogueEncoder(tokenizer, style)
    generator = Generator(policy, dialogue, max_completion_tokens=5, max_context=max_context)
    return policy, collect(pool, generator, pool.task_ids[:6], group_size=2, turn_limit=12)


@pytest.mark.parametrize("style", ["chat", "window"])
def test_the_oldest_turns_are_left_out(
    style: PromptStyle, tokenizer: PreTrainedTokenizerFast
) -> None:
    limit = 190
    policy, records = _play(tokenizer, style, limit)
    turns = [turn for record in records for turn in record.turns]
    assert all(record.stop_reason == "turn_limit" for record in records)
    shortened = [t for t in turns if t.turns_left_out and not t.tokens.extends_previous]
    assert len(shortened) > 5
    for turn in shortened:
        text = tokenizer.decode(turn.tokens.prompt_ids)
        plural = "s" if turn.turns_left_out > 1 else ""
        assert f"{turn.turns_left_out} earlier turn{plural} left out" in text
        assert len(turn.tokens.prompt_ids) + 5 <= limit
    if style == "chat":
        # A dialogue that begins again continues to grow for a while.
        assert len(shortened) < len(turns) / 2
        assert any(turn.tokens.extends_previous for turn in turns)
        # A dialogue lacks the same turns until it is restarted again.
        for record in records:
            for before, turn in pairwise(record.turns):
                if turn.tokens.extends_previous:
                    assert turn.turns_left_out == before.turns_left_out
                else:
                    assert turn.turns_left_out > before.turns_left_out
    batch = make_batch(records, 0)
    assert batch.input_ids.shape[1] <= limit
    again = score_completions(policy, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-4)


def test_kept_completions_are_those_that_were_sampled(tokenizer: PreTrainedTokenizerFast) -> None:
    _, records = _play(tokenizer, "chat", 150)
    kept = 0
    for record in records:
        for turn in record.turns:
            if turn.tokens.extends_previous or not turn.turns_left_out:
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
    pytest.fail("a kept completion differs from the sampled one")


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


def test_an_evaluation_in_which_nothing_fits_is_an_error(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    policy = build_policy(SHAPE, tokenizer, seed=0)
    config = replace(CONFIG, env=ENV, model=replace(CONFIG.model, max_context=20))
    with pytest.raises(AtodError, match="No first prompt fits"):
        evaluate(policy, EnvPool(ENV, "valid_seen"), config)


@pytest.mark.slow
def test_a_run_counts_them_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, max_context=130),
        train=replace(CONFIG.train, steps=2, eval_every=0),
    )
    train_one(config, tmp_path / "study")
    rows = read_metrics(tmp_path / "study" / "atod-seed0")
    assert len(rows) == 2
    assert all(0 < row["rollout/truncated_prompts"] < 1 for row in rows)
    assert max(float(row["rollout/logprob_drift"]) for row in rows) < 1e-3


ALGORITHMS = [
    AlgorithmConfig(method="atod", schedule="linear:4"),
    AlgorithmConfig(method="grpo", advantage_over="turns"),
    AlgorithmConfig(method="sod", aggregation="trajectory-mean"),
    AlgorithmConfig(method="sdar"),
]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.method)
def test_a_run_continues_if_some_episodes_cannot_begin(
    algorithm: AlgorithmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    begun: list[bool] = []

    def watched(records: Sequence[Trajectory], pad_id: int) -> Batch:
        begun.extend(bool(record.turns) for record in records)
        return make_batch(records, pad_id)

    monkeypatch.setattr(trainer, "make_batch", watched)
    config = replace(
        CONFIG,
        model=replace(CONFIG.model, max_context=84),
        algorithm=algorithm,
        train=replace(CONFIG.train, steps=3, eval_every=1, tasks_per_step=4),
    )
    train_one(config, tmp_path / "study")
    assert any(begun)
    assert not all(begun)
    run = tmp_path / "study" / f"{algorithm.method}-seed0"
    for row in read_metrics(run):
        assert row["turns"] > 0
        assert all(value is not None for value in row.values())  # null: it was not finite
    # Episodes without turns are shown and counted like others.
    assert any(not row["turns"] for row in read_trajectories(run))
    assert any(not t.turns for e in read_evaluations(run) for t in e.result.tasks)


# -- any dialogue --------------------------------------------------------------------------------

COMPLETION = 4
SMALL = ModelShape(1, 16, 2, 24, max_positions=1024)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and a few pairs of them: most sampled ids are no text, or another segmentation."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "a"), ("k", "e"), ("ta", "ke"), ("m", "u"), ("mu", "g")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    model = models.BPE({token: number for number, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHATML
    return fast


POLICIES = {
    "words": build_policy(SMALL, build_word_tokenizer(["take mug from desk 1", NOTE]), seed=0),
    "bytes": build_policy(SMALL, _byte_tokenizer(), seed=0),
}
TEXT = st.text(max_size=30) | st.sampled_from(
    ["take mug", "desk 1", "Häuser, 猫 und 🐈\u200b!", "<|im_end|> <end>", "a\u0301\r\n\x00{", ""]
)


class _SayingEnv(gymnasium.Env[Any, str]):
    """Says given texts, whatever is done; the last one ends the episode."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.observation_space = turn_observation_space(len(texts))
        self.action_space = UnicodeText()
        self.texts = texts
        self.index = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        self.index = 0
        return self._observation(), self._info()

    def step(self, action: str) -> Any:
        self.index += 1
        over = self.index == len(self.texts)
        return self._observation(), 0.5, over, False, self._info()

    def _observation(self) -> TurnObservation:
        text = self.texts[min(self.index, len(self.texts) - 1)]
        return {
            "instruction": "mug", "text": text, "admissible_actions": (), "turn_index": self.index,
        }  # fmt: skip

    def _info(self) -> dict[str, Any]:
        return {
            "task_id": "t", "task_type": "k", "success": False, "score": 0.0,
            "is_action_valid": False,
        }  # fmt: skip


class _Pool(EnvPool):
    """Episodes of given texts, with short templates."""

    def __init__(self, style: PromptStyle, dialogues: Sequence[Sequence[str]]) -> None:
        self.config = EnvConfig(prompt_style=style)
        self._envs = SingleEnvs([_SayingEnv(texts) for texts in dialogues])
        self._dialogues = []

    def _dialogue(self, env: Any) -> AgentDialogue:
        style, _ = parse_prompt_style(self.config.prompt_style)
        later = "{history}\n\n{text}" if style == "window" else "{text}"
        return AgentDialogue(
            env.metadata,
            profile="plain",
            style=style,
            history_window=3,
            template=PromptTemplate("{instruction}: {text}", later),
        )


class _Watched(Generator):
    """Samples any ids, the end of a turn often enough, and keeps what the model saw."""

    def start(self, episodes: int | Sequence[int]) -> None:
        super().start(episodes)
        count = episodes if isinstance(episodes, int) else len(episodes)
        self.seen: list[list[list[int]]] = [[] for _ in range(count)]
        """Of each turn of each episode, all ids up to and including its completion."""

    def prompt(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> list[SampledTokens]:
        completions = super().prompt(prompts, rows)
        for row, ids, completion in zip(rows, prompts, completions, strict=True):
            self.seen[row].append([*ids, *completion.ids])
            assert self._episodes[row].ids == self.seen[row][-1]
            assert len(self.seen[row][-1]) <= self.max_context
        return completions

    def _sample(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        ids = (uniforms * 7919 * logits.shape[-1]).long() % logits.shape[-1]
        ids[uniforms < 0.2] = self.dialogue.end_of_turn_id
        return ids, logits.log_softmax(dim=-1).gather(-1, ids[:, None]).squeeze(1)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    style=st.sampled_from(["chat", "window"]),
    name=st.sampled_from(sorted(POLICIES)),
    dialogues=st.lists(st.lists(TEXT, min_size=1, max_size=8), min_size=1, max_size=3),
    seed=st.integers(0, 1000),
    limit=st.integers(24, 260),
    pack=st.booleans(),
)
def test_what_was_fed_is_what_is_trained_on(
    style: PromptStyle, name: str, dialogues: list[list[str]], seed: int, limit: int, pack: bool
) -> None:
    policy = POLICIES[name]
    generator = _Watched(
        policy,
        DialogueEncoder(policy.tokenizer, style),
        max_completion_tokens=COMPLETION,
        max_context=limit,
        generator=torch.Generator().manual_seed(seed),
    )
    pool: Any = _Pool(style, dialogues)
    tasks = ["t"] * len(dialogues)
    records = collect(pool, generator, tasks, group_size=1, turn_limit=8)
    assert [len(record.turns) for record in records] == [len(seen) for seen in generator.seen]
    for record in records:
        _check_turns(record, generator)
    turns = [turn for record in records for turn in record.turns]
    event(f"{style}, turns left out: {any(turn.turns_left_out for turn in turns)}")
    if not turns:
        return
    batch = make_batch(records, policy.pad_id, pack=pack)
    _check_batch(batch, turns, [ids for seen in generator.seen for ids in seen])
    again = score_completions(policy, batch).logprobs
    torch.testing.assert_close(again, batch.sampling_logprobs, rtol=0, atol=1e-3)


def _check_turns(record: Trajectory, generator: Generator) -> None:
    lacking = 0
    for turn in record.turns:
        tokens = turn.tokens
        if generator.dialogue.style == "window":
            assert not tokens.extends_previous
            assert 0 <= turn.turns_left_out <= min(3, turn.index)
        else:
            restarted = turn.index > 0 and not tokens.extends_previous
            assert lacking < turn.turns_left_out <= turn.index or not restarted
            assert turn.turns_left_out == lacking or restarted
            lacking = turn.turns_left_out
            if restarted:
                _check_new_sequence(record, turn, generator.dialogue)
        stopped = tokens.completion_ids[-1] in generator.dialogue.stop_ids
        assert (tokens.finish_reason == "stop") == stopped
        assert stopped or len(tokens.completion_ids) == COMPLETION
    assert record.stop_reason in ("terminated", "context_limit")


def _check_new_sequence(record: Trajectory, turn: Turn, dialogue: DialogueEncoder) -> None:
    """One user message with the task, the note and a later message; then turns as they were."""
    kept = [*record.turns[turn.turns_left_out : turn.index], turn]
    parts = (
        record.turns[0].prompt[0].content,
        left_out_note(turn.turns_left_out),
        kept[0].prompt[0].content,
    )
    expected = dialogue.first([Message("user", "\n\n".join(parts))])
    for earlier, following in pairwise(kept):
        expected += earlier.tokens.completion_ids
        expected += dialogue.continuation(following.prompt, earlier.tokens.finish_reason)
    assert list(turn.tokens.prompt_ids) == expected


def _check_batch(batch: Batch, turns: Sequence[Turn], seen: Sequence[list[int]]) -> None:
    """Masks cover exactly the sampled tokens, each once, where the model saw them."""
    trained = torch.zeros(batch.input_ids.shape, dtype=torch.int64)
    for row, (turn, ids) in enumerate(zip(turns, seen, strict=True)):
        sampled = turn.tokens.completion_ids
        start, sequence = int(batch.start[row]), int(batch.sequence_index[row])
        assert batch.input_ids[sequence, : start + len(sampled)].tolist() == ids
        assert ids[start:] == list(sampled)
        width = batch.completion_mask.shape[1]
        assert batch.completion_mask[row].tolist() == [c < len(sampled) for c in range(width)]
        assert batch.completion_ids[row, : len(sampled)].tolist() == list(sampled)
        trained[sequence, start : start + len(sampled)] += 1
    assert int(trained.sum()) == sum(len(turn.tokens.completion_ids) for turn in turns)
    assert int(trained.max()) == 1
    assert not trained[~batch.attention_mask].any()
