"""Completions that end with their action, token for token."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from test_dialogue import CHATML
from test_generation import continued
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from atod_gym.parsing import CompletionFormat
from atod_gym.prompts import PromptStyle
from atod_gym.types import Message
from atod_train.batch import make_batch
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.from_scratch import ModelShape, build_policy
from atod_train.models.generation import Generator
from atod_train.models.policy import Policy
from atod_train.models.scores import score_completions
from atod_train.models.word_tokenizer import build_word_tokenizer
from atod_train.records import TokenizedTurn, Trajectory, Turn

pytestmark = pytest.mark.usefixtures("feeding")

TINY = ModelShape(layers=2, width=32, heads=2, mlp_width=48, max_positions=512)
TAGS = CompletionFormat("tags")
SEARCH = CompletionFormat("tags", ("search", "answer"))


def shaped(policy: Policy) -> Policy:
    """Random weights give nearly equal probabilities; larger ones make a shape."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return policy


WORDS = shaped(
    build_policy(
        TINY, build_word_tokenizer(["<think> </think> <action> </action> take mug 1 look"]), 0
    )
)


def byte_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """One token per byte but for a few pieces that begin and end anywhere in a tag."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["</", "ac", "ti", "on", "><", "k</"]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *pieces])}
    merges = [("<", "/"), ("a", "c"), ("t", "i"), ("o", "n"), (">", "<"), ("k", "</")]
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


BYTES = build_policy(TINY, byte_tokenizer(), 0)


def forced(text: str, form: CompletionFormat | None, template: str = CHATML) -> tuple[str, str]:
    """Return the kept part of a completion of a deterministic model, and why it ended."""
    policy = Policy(model=BYTES.model, tokenizer=byte_tokenizer(template), name="bytes")
    dialogue = DialogueEncoder(policy.tokenizer)
    generator = Generator(policy, dialogue, max_completion_tokens=200, completion_format=form)
    generator.start(1)
    ids = tuple(dialogue.completion(text))
    following = iter(ids)

    def write(logits: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.tensor([next(following)])
        return chosen, logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]

    with mock.patch.object(generator, "_sample", write):
        [completion] = generator.prompt([dialogue.first([Message("user", "x")])], [0])
    # The tokens are those that were sampled.
    assert completion.ids == ids[: len(completion.ids)]
    assert len(completion.logprobs) == len(completion.ids)
    return dialogue.decode(completion.ids), completion.finish_reason


@pytest.mark.parametrize(
    ("form", "text", "kept"),
    [
        (TAGS, "<think>a</think><action>look</action> and more",
         "<think>a</think><action>look</action>"),
        # The token that completes the tag may hold more.
        (TAGS, "<action>look</action><think>b</think>", "<action>look</action><"),
        (TAGS, "<think>not <action>a</action></think><action>b</action>.",
         "<think>not <action>a</action></think><action>b</action>"),
        (SEARCH, "<search>é</search><information>x", "<search>é</search><"),
        (SEARCH, "<answer>b</answer>", "<answer>b</answer>"),
        (CompletionFormat("react"), "Thought: a\nAction: look\nObservation: x",
         "Thought: a\nAction: look\nObservation:"),
    ],
)  # fmt: skip
def test_sampling_ends_where_the_action_is_complete(
    form: CompletionFormat, text: str, kept: str
) -> None:
    assert forced(text, form) == (kept, "action")
    assert forced(text, None) == (text, "stop")
    assert form.parse(kept).is_valid


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (TAGS, "<think>not <action>a</action>"),
        (TAGS, "look > <action> here </act>"),
        (CompletionFormat("plain"), "<action>look</action> and more"),
        (CompletionFormat("compat"), "<action>look</action> and more"),
        (CompletionFormat("react"), "Thought: a\nAction: look"),
    ],
)
def test_sampling_continues_otherwise(form: CompletionFormat, text: str) -> None:
    assert forced(text, form) == (text, "stop")


def test_a_thought_that_the_prompt_opens() -> None:
    text = "not <action>a</action></think><action>b</action>."
    opening = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert forced(text, TAGS) == ("not <action>a</action>", "action")
    assert forced(text, TAGS, opening) == (text[:-1], "action")
    assert DialogueEncoder(byte_tokenizer(opening)).opens_thought
    empty = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n</think>\n{% endif %}")
    assert not DialogueEncoder(byte_tokenizer(empty)).opens_thought


def sampled(
    form: CompletionFormat | None, style: PromptStyle = "chat", turns: int = 1
) -> tuple[Generator, list[Trajectory]]:
    dialogue = DialogueEncoder(WORDS.tokenizer, style)
    generator = Generator(
        WORDS, dialogue, max_completion_tokens=16, completion_format=form,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    generator.start(24)
    message = (Message("user", "take mug 1"),)
    played: list[list[Turn]] = [[] for _ in range(24)]
    for number in range(turns):
        prompts = [
            dialogue.continuation(message, record[-1].tokens.finish_reason)
            if record and style == "chat"
            else dialogue.first(message)
            for record in played
        ]
        done = continued(generator, prompts, range(24))
        for record, prompt, one in zip(played, prompts, done, strict=True):
            extends = style == "chat" and number > 0
            tokens = TokenizedTurn(tuple(prompt), one.ids, one.logprobs, one.finish_reason, extends)
            record.append(Turn(number, message, "", "", 0.0, True, tokens))
    records = [
        Trajectory(0, "t", "k", tuple(turns), True, False, "terminated", True, 1.0)
        for turns in played
    ]
    return generator, records


@pytest.mark.parametrize("style", ["chat", "window"])
def test_a_stopped_completion_is_a_prefix_of_the_unstopped_one(style: PromptStyle) -> None:
    generator, ended = sampled(TAGS, style)
    _, free = sampled(None, style)
    reasons = set()
    for one, other in zip(ended, free, strict=True):
        ids, whole = one.turns[0].tokens.completion_ids, other.turns[0].tokens.completion_ids
        assert ids == whole[: len(ids)]
        reason = one.turns[0].tokens.finish_reason
        reasons.add(reason)
        ends = [
            TAGS.end_of_action(generator.dialogue.decode(ids[:n])) for n in range(1, len(ids) + 1)
        ]
        assert ends[:-1] == [None] * (len(ids) - 1)
        assert (reason == "action") == (ends[-1] is not None)
        if reason != "action":
            assert ids == whole
    assert "action" in reasons
    assert len(reasons) > 1


@pytest.mark.parametrize("profile", ["plain", "compat"])
def test_profiles_without_an_end_sample_as_before(profile: str) -> None:
    assert sampled(CompletionFormat(profile), turns=3)[1] == sampled(None, turns=3)[1]  # type: ignore[arg-type]


@pytest.mark.parametrize("style", ["chat", "window"])
def test_later_turns_close_the_message_and_logprobs_are_the_trainers(style: PromptStyle) -> None:
    generator, records = sampled(TAGS, style, turns=3)
    dialogue = generator.dialogue
    for record in records:
        for turn, following in zip(record.turns, record.turns[1:], strict=False):
            has_end = turn.tokens.completion_ids[-1] in dialogue.stop_ids
            assert has_end == (turn.tokens.finish_reason == "stop")
            if style == "chat":
                assert (following.tokens.prompt_ids[0] == dialogue.end_of_turn_id) != has_end
    batch = make_batch(records, 0)
    recomputed = score_completions(WORDS, batch).logprobs
    torch.testing.assert_close(batch.sampling_logprobs, recomputed, rtol=0, atol=1e-4)
