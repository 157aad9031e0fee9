"""Split text into words exactly as Lucene 9's StandardTokenizer does.

The rules are those of the grammar from which Lucene generates its tokenizer
(`StandardTokenizerImpl.jflex`): the word boundaries of Unicode Standard Annex #29, version 12.1,
with these choices: runs of South East Asian characters (Thai and others) are one word, every Han
and Hiragana character is a word, emoji sequences are words, and the longest match is
taken. A word ends after 255 UTF-16 units; the rest is the next word.

Text is first mapped to one character class per character (`word_break_12_1.txt`), then regular
expressions over the classes find the words. Pure ASCII text takes a fast path with the same
result. The version of Unicode is fixed because Lucene 9's tokenizer has it built in: later versions
changed the properties of some characters (U+2605, a star, is not an emoji any more), so libraries
that follow the newest version split differently from release to release.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from importlib import resources
from itertools import accumulate

MAX_UNITS = 255
"""Length at which Lucene cuts a word, in UTF-16 units."""

# Characters that may follow a character without ending its word (UAX #29, rule WB4); emoji treat
# the presentation selectors V and W separately.
_EXTEND = "[EZVWYTXFs]*"
_EMOJI_EXTEND = "[EZYTXFs]*"

_LETTERS = f"[LAG]{_EXTEND}(?:[MO']{_EXTEND}[LHAG]{_EXTEND})*"
_DIGITS = f"[ND]{_EXTEND}(?:[CO']{_EXTEND}[ND]{_EXTEND})*"
# A Hebrew letter takes a single quote, or a double quote with another Hebrew letter; after a
# middle character it takes neither.
_HEBREW = f"H{_EXTEND}(?:'{_EXTEND}|\"{_EXTEND}H{_EXTEND}|(?:[MO']{_EXTEND}[LHAG]{_EXTEND})*)"
_PIECE = f"(?:(?:K{_EXTEND})+|(?:{_LETTERS}|{_DIGITS}|{_HEBREW})+)"
_JOINER = f"(?:U{_EXTEND})"
_WORD = f"{_JOINER}*{_PIECE}(?:{_JOINER}+{_PIECE})*{_JOINER}*"

_PICTURE = f"[PA]{_EMOJI_EXTEND}"
_MODIFIER = f"F{_EMOJI_EXTEND}"
# Pictures joined by ZWJ. `_EMOJI_EXTEND` also takes the ZWJ, hence the look behind.
_EMOJI = (
    f"Z*{_PICTURE}VT+X"
    f"|(?:Z*{_PICTURE}|{_MODIFIER}(?<=Z){_PICTURE})"
    f"(?:(?<=Z){_PICTURE}|VZ+{_PICTURE}|VZ{_MODIFIER}(?<=Z){_PICTURE})*(?:VZ{_MODIFIER}|V)?"
    f"|{_MODIFIER}"
)
_KEY_CAP = f"k{_EMOJI_EXTEND}(?:VY|Y){_EMOJI_EXTEND}"
_FLAG = f"R{_EXTEND}R{_EXTEND}"
_SINGLE = f"[IJ]{_EXTEND}"
_COMPLEX = "[Ss][EZVWYTXFsS]*"

# The same, but the joiners before the first piece are taken all or not at all (as an atomic group).
_CAREFUL_WORD_PATTERN = re.compile(f"(?=({_JOINER}*))\\1{_WORD}")
_OTHER_PATTERN = re.compile(f"{_EMOJI}|{_KEY_CAP}|{_FLAG}|{_SINGLE}|{_COMPLEX}")
# Most words are letters and digits that no extending character follows.
_PLAIN = "[LDN]+(?![^.])"
_ANY_PATTERN = re.compile(f"{_PLAIN}|{_WORD}|{_EMOJI}|{_KEY_CAP}|{_FLAG}|{_SINGLE}|{_COMPLEX}")
_START_PATTERN = re.compile("[LHAGNDKUPZFkRIJSs]")
# What a word can begin with, but not end with; of what is in such a run only U and Z can begin one.
_PREFIX_PATTERN = re.compile("U[UEVWYTX]*|Z+|")
# Text with this in its classes needs the careful way: A is both a letter and an emoji, and in a
# run that is long enough a word may have to be cut.
_CAREFUL_PATTERN = re.compile(r"A|[^.]{128}")

_ASCII_PATTERN = re.compile(
    "[0-9A-Za-z_]+(?:(?:(?<=[A-Za-z])[.:'](?=[A-Za-z])|(?<=[0-9])[.,;'](?=[0-9]))[0-9A-Za-z_]+)*"
)

OTHER = "."
"""The class of all characters that are in no word."""


def class_ranges() -> Iterator[tuple[str, int, int]]:
    """Yield (class, first, last code point) of all characters that may be in a word."""
    table = resources.files(__package__).joinpath("word_break_12_1.txt")
    for line in table.read_text(encoding="ascii").splitlines():
        name, *ranges = line.split()
        for part in ranges if name != "#" else ():
            first, _, last = part.partition("-")
            yield name, int(first, 16), int(last or first, 16)


def class_table() -> str:
    """Return the class of every code point: 0x110000 characters, for `str.translate`."""
    table = bytearray(OTHER.encode() * 0x110000)
    for name, first, last in class_ranges():
        table[first : last + 1] = name.encode() * (last + 1 - first)
    return table.decode("ascii")


_CLASSES = class_table()


def split_words(text: str) -> list[str]:
    """Return the words of a text, in order and unchanged.

    Any string is accepted: lone surrogates and control characters end words like spaces.
    """
    if text.isascii():
        found = _ASCII_PATTERN.findall(text)
        if "_" in text:
            found = [word for word in found if word.strip("_")]
        if not found or len(max(found, key=len)) <= MAX_UNITS:
            return found
    return _split_any(text)


def _split_any(text: str) -> list[str]:
    """Split any text, without the fast path."""
    classes = text.translate(_CLASSES)
    if _CAREFUL_PATTERN.search(classes) is None:
        spans = [match.span() for match in _ANY_PATTERN.finditer(classes)]
        return [text[begin:end] for begin, end in spans]
    return _split_carefully(text, classes)


def _split_carefully(text: str, classes: str) -> list[str]:
    """Split word by word in windows of 255 units, as Lucene's buffer does."""
    found = []
    wide = max(text, default="") > "\uffff"
    units = [0, *accumulate(2 if character > "\uffff" else 1 for character in text)] if wide else []
    start = _START_PATTERN.search(classes)
    while start is not None:
        begin = start.start()
        limit = bisect_right(units, units[begin] + MAX_UNITS) - 1 if wide else begin + MAX_UNITS
        words = (
            _CAREFUL_WORD_PATTERN.match(classes, begin, limit),
            _OTHER_PATTERN.match(classes, begin, limit),
        )
        end = max((word.end() for word in words if word is not None), default=begin)
        if end > begin:
            found.append(text[begin:end])
        else:
            # In a long run of such characters none has the end of the run in its window.
            prefix = _PREFIX_PATTERN.match(classes, begin)
            end = max(begin + 1, prefix.end() - MAX_UNITS + 1 if prefix else 0)
        start = _START_PATTERN.search(classes, end)
    return found
