"""A word-level tokenizer for models that are trained from scratch.

Environment text is plain English with numbered things ("You arrive at desk 1. On the desk 1, you
see a mug 1, and a pen 2."). Every thing, word and punctuation mark is one token: writing "desk 1"
copies one token, which suits models of a million parameters. Text is lower-cased. A noun that
occurs with a number is in the vocabulary alone and with some larger numbers, as are all integers
from 0 to 99.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_SPECIAL_TOKENS = ("<pad>", "<unk>", "<user>", "<assistant>", "<end>")
"""Their ids are 0 to 4, in this order."""

_INTEGERS = 100
"""The integers 0 .. _INTEGERS - 1 are always in the vocabulary."""

_NUMBERS_BEYOND = 5
"""A noun that occurs with the numbers 1 .. n is in the vocabulary with 1 .. n + _NUMBERS_BEYOND."""

# Tags such as <think> and marks such as [SEP], things (a word and its number), words (with inner
# - ' /, as in "t-shirt" and "in/on"; digits allowed, as in product codes), and single marks.
# Whitespace only separates.
_PIECE = r"</?[a-z]+>|(?<!\w)\[[a-z]+\]|[a-z]+ \d{1,2}(?!\w)|\w+(?:[-'/]\w+)*|[^\w\s]"
_THING = re.compile(r"([a-z]+) (\d{1,2})")

# System and user messages look alike. An assistant message is between <assistant> and <end>, so
# the template is append-only.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <end> "
    "{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer with a chat template from example texts.

    The vocabulary is: the special tokens, the integers 0..99, then the things, words and marks of
    `texts` in alphabetical order. Decoding joins tokens with single spaces, so a lower-case command
    such as "take mug 1 from desk 1" survives encoding and decoding unchanged.

    Args:
        texts: Texts to collect words from (observations, commands, instructions).

    Returns:
        A fast tokenizer; `save_pretrained` and `from_pretrained` keep it, with its chat template.
        Its pad token is `<pad>`, its end-of-turn (eos) token `<end>`.
    """
    words = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
    # Words are joined with single spaces; brackets have no inner spaces, so that the action
    # "search[red shoes]" is decoded as written.
    words.decoder = decoders.Sequence(
        [
            decoders.WordPiece(prefix="\u0000", cleanup=False),
            decoders.Fuse(),
            decoders.Replace(" [ ", "["),
            decoders.Replace(" ]", "]"),
        ]
    )
    found: set[str] = set()
    for text in texts:
        normal = words.normalizer.normalize_str(text)
        found.update(piece for piece, _ in words.pre_tokenizer.pre_tokenize_str(normal))
    for thing in filter(None, map(_THING.fullmatch, sorted(found))):
        noun, number = thing.groups()
        found.add(noun)
        found.update(f"{noun} {n}" for n in range(1, int(number) + _NUMBERS_BEYOND + 1))
    fixed = (*_SPECIAL_TOKENS, *map(str, range(_INTEGERS)))
    tokens = (*fixed, *sorted(found.difference(fixed)))
    words.model = models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>", "<assistant>"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
