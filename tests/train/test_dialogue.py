from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from atod_gym.errors import AtodError
from atod_gym.types import Message
from atod_train.models.dialogue import DialogueEncoder
from atod_train.models.word_tokenizer import build_word_tokenizer

WORDS = "system user 1 assistant you see a mug 1 take go to desk 2 reply be brief thought"
SYSTEM = Message("system", "be brief")
MUG = Message("user", "you see a mug 1")
DESK = Message("user", "you see a desk 2")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows an empty thought in the last assistant message only, as some reasoning models do; the
# option adds it to the generation prompt.
LAST_THOUGHT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
NO_END = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}\n{% endfor %}"
NUMBERED = CHATML.replace("{{ m['role'] }}", "{{ m['role'] }} {{ messages | length }}")
DROPPING = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'assistant' %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = build_word_tokenizer([WORDS, "<think> </think>"])
    if template is not None:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
        )
        tokenizer.chat_template = template
    return tokenizer


def tokens(encoder: DialogueEncoder, ids: list[int]) -> str:
    return " ".join(encoder.tokenizer.convert_ids_to_tokens(ids))


def test_first_prompt_and_continuations() -> None:
    encoder = DialogueEncoder(make_tokenizer())
    assert tokens(encoder, encoder.first([MUG])) == "<user> you see a mug 1 <assistant>"
    assert (
        tokens(encoder, encoder.continuation([DESK], "stop"))
        == "<user> you see a desk 2 <assistant>"
    )
    assert (
        tokens(encoder, encoder.continuation([DESK], "length"))
        == "<end> <user> you see a desk 2 <assistant>"
    )
    assert encoder.end_of_turn_id == 4
    assert encoder.stop_ids == {4}


@pytest.mark.parametrize("template", [None, CHATML, LAST_THOUGHT])
def test_pieces_make_up_the_rendered_dialogue(template: str | None) -> None:
    encoder = DialogueEncoder(make_tokenizer(template))
    pieces = encoder.first([SYSTEM, MUG]) + encoder.completion("take mug 1")
    pieces += encoder.continuation([DESK], "stop") + encoder.completion("go to desk 2")
    pieces += encoder.continuation([MUG, DESK], "stop")
    dialogue = [SYSTEM, MUG, Message("assistant", "take mug 1"), DESK]
    dialogue += [Message("assistant", "go to desk 2"), MUG, DESK]
    assert pieces == encoder.first(dialogue)
    reply = encoder.completion("take mug 1")
    closed = encoder.finished([*dialogue, Message("assistant", "take mug 1")])
    if template != LAST_THOUGHT:
        assert closed[: len(pieces) + len(reply)] == [*pieces, *reply]
    assert encoder.end_of_turn_id in closed[-2:]


def test_thought_of_the_generation_prompt_stays() -> None:
    encoder = DialogueEncoder(
        make_tokenizer(LAST_THOUGHT), template_options={"enable_thinking": False}
    )
    assert tokens(encoder, encoder.continuation([DESK], "stop")).endswith(
        "<|im_start|> assistant <think> </think>"
    )


def test_thoughts_that_a_template_strips_stay_where_they_were_sampled() -> None:
    stripping = CHATML.replace("{{ m['content'] }}", "{{ m['content'].split('</think>')[-1] }}")
    encoder = DialogueEncoder(make_tokenizer(stripping))
    reply = "<think> desk </think> take mug 1"
    fed = [*encoder.first([MUG]), *encoder.completion(reply), *encoder.continuation([DESK], "stop")]
    assert "<think> desk </think>" in tokens(encoder, fed)
    rendered = encoder.first([MUG, Message("assistant", reply), DESK])
    assert "<think>" not in tokens(encoder, rendered)


def test_thinking_can_be_switched_off_while_the_prompt_asks_for_it() -> None:
    # As in published runs: the model finds its thought closed and is asked for one all the same.
    asking = Message("user", f"{MUG.content} <think> </think>")
    thinking = DialogueEncoder(make_tokenizer(LAST_THOUGHT))
    closed = DialogueEncoder(
        make_tokenizer(LAST_THOUGHT), template_options={"enable_thinking": False}
    )
    assert tokens(thinking, thinking.first([asking])).endswith("<|im_start|> assistant")
    assert tokens(closed, closed.first([asking])).endswith(
        "<|im_start|> assistant <think> </think>"
    )


def test_window_style_has_no_continuation() -> None:
    encoder = DialogueEncoder(make_tokenizer(NUMBERED), "window")
    assert tokens(encoder, encoder.first([MUG])).startswith("<|im_start|> user 1 you see")
    with pytest.raises(AtodError, match="chat style"):
        encoder.continuation([DESK], "stop")


@pytest.mark.parametrize("template", [NUMBERED, DROPPING])
def test_template_that_rewrites_earlier_turns_is_refused(template: str) -> None:
    with pytest.raises(AtodError, match="does not only append"):
        DialogueEncoder(make_tokenizer(template), "chat")


def test_template_without_an_end_token_is_refused() -> None:
    with pytest.raises(AtodError, match="special token"):
        DialogueEncoder(make_tokenizer(NO_END))


@pytest.mark.parametrize("name", ["enable_thinkng", "enable", "date_string"])
def test_an_option_that_the_template_lacks_is_refused(name: str) -> None:
    with pytest.raises(AtodError, match=f"no variable '{name}'"):
        DialogueEncoder(make_tokenizer(LAST_THOUGHT), template_options={name: False})


def test_thoughts_need_no_switch_in_a_template_without_them() -> None:
    DialogueEncoder(make_tokenizer(CHATML), template_options={"enable_thinking": False})
    with pytest.raises(AtodError, match="no variable 'enable_thinking'"):
        DialogueEncoder(make_tokenizer(CHATML), template_options={"enable_thinking": True})


def test_missing_template_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(AtodError, match="no chat template"):
        DialogueEncoder(tokenizer)


def test_decoding_drops_the_end_only() -> None:
    encoder = DialogueEncoder(make_tokenizer())
    ids = encoder.completion("take mug 1")
    assert encoder.decode(ids) == encoder.decode(ids[:-1]) == "take mug 1"
    # A stray special token is shown, so that the action is not repaired behind the model's back.
    assert encoder.decode([2, *ids]) == "<user> take mug 1"
    assert encoder.decode([4]) == ""
