from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from atod_train.models.word_tokenizer import build_word_tokenizer

TEXTS = (
    "You arrive at desk 1. On the desk 1, you see a mug 1, and a pen 2.",
    "take mug 1 from desk 1",
    "put mug 1 in/on desk 1",
    "search[red t-shirt] <think> drawer 1234 </think>",
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_word_tokenizer(TEXTS)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))


def test_special_tokens_and_integers_come_first(tokenizer: PreTrainedTokenizerFast) -> None:
    first = tokenizer.convert_ids_to_tokens(list(range(106)))
    assert first[:5] == ["<pad>", "<unk>", "<user>", "<assistant>", "<end>"]
    assert first[5:105] == [str(number) for number in range(100)]
    assert first[105] == ","  # then the words, sorted
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id) == (0, 1, 4)


def test_words_numbers_and_marks_are_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = encode(tokenizer, "You see a Pen 2, and drawer 1234.")
    assert tokens == ["you", "see", "a", "pen 2", ",", "and", "drawer", "1234", "."]
    assert encode(tokenizer, "<think>mug</think>") == ["<think>", "mug", "</think>"]
    assert encode(tokenizer, "zebra, 99 12345") == ["<unk>", ",", "99", "<unk>"]
    assert encode(tokenizer, "pen 7 pen 8") == ["pen 7", "<unk>"]  # seen with 2: known up to 7


@pytest.mark.parametrize(
    "command",
    [
        "take mug 1 from desk 1",
        "put mug 6 in/on desk 5",
        "search[red t-shirt]",
        "<think> take mug 1 </think> see pen 2",
    ],
)
def test_decoding_gives_a_command_back(tokenizer: PreTrainedTokenizerFast, command: str) -> None:
    assert tokenizer.decode(tokenizer.encode(command, add_special_tokens=False)) == command


def test_a_mark_in_brackets_is_one_token_and_an_argument_is_not() -> None:
    tokenizer = build_word_tokenizer(["Search [SEP] red click[red]"])
    assert encode(tokenizer, "Search [SEP] red") == ["search", "[sep]", "red"]
    assert encode(tokenizer, "click[red]") == ["click", "[", "red", "]"]


def test_vocabulary_does_not_depend_on_the_order_of_texts() -> None:
    forward, backward = build_word_tokenizer(TEXTS), build_word_tokenizer(reversed(TEXTS))
    assert forward.get_vocab() == backward.get_vocab()
    words = set(build_word_tokenizer(["a mug 1"]).get_vocab())
    things = {f"mug {number}" for number in range(1, 7)}
    assert words - set(build_word_tokenizer(()).get_vocab()) == {"a", "mug"} | things


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = [
        {"role": "user", "content": "you see a mug 1"},
        {"role": "assistant", "content": "take mug 1"},
        {"role": "user", "content": "you see a pen 2"},
    ]
    text = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
    expected = (
        "<user> you see a mug 1 <assistant> take mug 1 <end> <user> you see a pen 2 <assistant>"
    )
    assert " ".join(encode(tokenizer, text)) == expected
    closed = tokenizer.apply_chat_template(dialogue[:2], tokenize=False)
    assert closed.split()[-1] == "<end>"


def test_saved_and_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for kind in (PreTrainedTokenizerFast, AutoTokenizer):
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert loaded.chat_template == tokenizer.chat_template
        assert loaded.pad_token_id == 0
        ids = loaded.encode("take Mug 1 from desk 1", add_special_tokens=False)
        assert loaded.decode(ids) == "take mug 1 from desk 1"
        assert ids == tokenizer.encode("take mug 1 from desk 1", add_special_tokens=False)
