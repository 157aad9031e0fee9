"""Compute the same as Lucene 9: terms of a text, stems, and the numbers of BM25.

Terms: `Analyzer` turns text into search terms as Anserini's DefaultEnglishAnalyzer does, for
documents and queries alike. In this order: words (`words`), without a possessive 's, in lower case,
without 33 stop words, stems.

Stems: Porter's algorithm as in Lucene's `PorterStemFilter`: M.F. Porter, "An algorithm for suffix
stripping", Program 14(3), 1980, with the two departures of its author's own program: `bli` becomes
`ble` (not `abli` `able`), and `logi` becomes `log`. Words of one or two characters stay as they
unchanged. Written by hand because PyStemmer and Snowball's "porter" differ on some English words.

Numbers: float32, with document lengths in one byte (Lucene's `BM25Similarity`, `SmallFloat`). A
term that occurs tf times in a document adds

    weight - weight / factor,   factor = 1 + tf / (k1 * (1 - b + b * length / average length))

where weight = idf * (how often the query has the term); every operation rounds to float32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from env_servers.search.words import split_words

_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then"
    " there these they this to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Lucene's English stop words (`EnglishAnalyzer.ENGLISH_STOP_WORDS_SET`)."""

_POSSESSIVE = tuple(quote + letter for quote in "'\u2019\uff07" for letter in "sS")

KEPT_WORDS = 100_000
"""Number of words whose terms are cached, about 150 bytes each; beyond it the cache is cleared."""
LONGEST_KEPT_WORD = 40
"""Longer words are analysed each time: cached, clients could fill the memory with them."""


class Analyzer:
    """Convert text to terms; thread-safe."""

    def __init__(self) -> None:
        self._terms = _Terms()

    def __call__(self, text: str) -> list[str]:
        """Return the terms of a text in order, with repetitions.

        Any string is accepted; lone surrogates and control characters count as spaces.
        """
        terms = self._terms
        found = [term for word in split_words(text) if (term := terms[word])]
        if len(terms) > KEPT_WORDS:
            self._terms = _Terms()
        return found


class _Terms(dict[str, str]):
    """Word -> term, filled on look-up."""

    def __missing__(self, word: str) -> str:
        term = term_of(word)
        if len(word) <= LONGEST_KEPT_WORD:
            self[word] = term
        return term


def term_of(word: str) -> str:
    """Return the term of one word of a text; empty for a stop word."""
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    # Java lowers each code point separately: no final sigma, and the dotted capital I becomes an i.
    lower = word.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()
    return "" if lower in STOP_WORDS else stem(lower)


# Porter's stemmer

_RULES_2 = (
    "ational:ate tional:tion enci:ence anci:ance izer:ize bli:ble alli:al entli:ent eli:e"
    " ousli:ous ization:ize ation:ate ator:ate alism:al iveness:ive fulness:ful ousness:ous"
    " aliti:al iviti:ive biliti:ble logi:log"
)
_RULES_3 = "icate:ic ative: alize:al iciti:ic ical:ic ful: ness:"
_STEP_2 = dict(rule.split(":") for rule in _RULES_2.split())
_STEP_3 = dict(rule.split(":") for rule in _RULES_3.split())
_ENDINGS = "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
_STEP_4 = frozenset(_ENDINGS.split())


def stem(word: str) -> str:
    """Return the stem of one word, which must be in lower case.

    Any string is accepted. Every character except a, e, i, o, u (and y behind a consonant) counts
    as a consonant; a character beyond U+FFFF counts as two, as in Java.
    """
    if word.isascii() or max(word) <= "\uffff":
        return _stem(word)
    pairs = "".join(map(chr, memoryview(word.encode("utf-16-le", "surrogatepass")).cast("H")))
    return _stem(pairs).encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def _stem(word: str) -> str:
    if len(word) <= 2:
        return word
    word = _without_plural_and_tense(word)
    if word[-1] == "y" and "v" in _shape(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(word, _STEP_2, longest=7)
    word = _replaced(word, _STEP_3, longest=5)
    word = _without_suffix(word)
    return _tidied(word)


def _shape(word: str) -> str:
    """Return `v` for every vowel and `c` for every other character."""
    shape = ""
    last = "v"  # as if a vowel stood before the word: a y at its beginning is a consonant
    for character in word:
        is_vowel = character in "aeiou" or (character == "y" and last == "c")
        last = "v" if is_vowel else "c"
        shape += last
    return shape


def _measure(stem: str) -> int:
    """Return Porter's m: the number of consonants that follow a vowel."""
    return _shape(stem).count("vc")


def _ends_consonant_vowel_consonant(word: str) -> bool:
    """Return Porter's condition *o: such a word keeps its final e."""
    return _shape(word)[-3:] == "cvc" and word[-1] not in "wxy"


def _without_plural_and_tense(word: str) -> str:
    """Apply steps 1a and 1b."""
    if word.endswith(("sses", "ies")):
        word = word[:-2]
    elif word[-1] == "s" and word[-2] != "s":
        word = word[:-1]
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    suffix = "ed" if word.endswith("ed") else "ing" if word.endswith("ing") else ""
    if not suffix or "v" not in _shape(word[: -len(suffix)]):
        return word
    word = word[: -len(suffix)]
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if len(word) > 1 and word[-1] == word[-2] and _shape(word)[-1] == "c":
        return word if word[-1] in "lsz" else word[:-1]
    if _measure(word) == 1 and _ends_consonant_vowel_consonant(word):
        return word + "e"
    return word


def _replaced(word: str, rules: dict[str, str], longest: int) -> str:
    """Apply step 2 or 3: replace the longest suffix that has a rule, if m > 0 before it."""
    for length in range(longest, 2, -1):
        suffix = word[-length:]
        if suffix in rules:
            head = word[:-length]
            return head + rules[suffix] if _measure(head) > 0 else word
    return word


def _without_suffix(word: str) -> str:
    """Apply step 4: remove the longest suffix of the list, if m > 1 before it."""
    for length in range(5, 1, -1):
        if word[-length:] in _STEP_4:
            head = word[:-length]
            if length == 3 and word.endswith("ion") and not head.endswith(("s", "t")):
                continue
            return head if _measure(head) > 1 else word
    return word


def _tidied(word: str) -> str:
    """Apply step 5: remove a final e, and one of two final l, from long stems."""
    measure = _measure(word)
    if word[-1] == "e":
        head = word[:-1]
        if measure > 1 or (measure == 1 and not _ends_consonant_vowel_consonant(head)):
            word = head
    if measure > 1 and word.endswith("ll"):
        word = word[:-1]
    return word


# The numbers of BM25

MAX_FREQUENCY = (1 << 24) - 1
"""Larger term frequencies count as this one: float32 holds no more."""


def _decoded_lengths() -> NDArray[np.int64]:
    """Return the 256 lengths of one byte: exact below 40, then 4 significant bits."""
    lengths = list(range(24))
    for code in range(256 - 24):
        bits, exponent = code & 7, (code >> 3) - 1
        lengths.append(24 + (bits if exponent < 0 else (bits | 8) << exponent))
    return np.array(lengths, dtype=np.int64)


DECODED_LENGTHS = _decoded_lengths()
"""int64 [256], ascending: the value of each byte (`SmallFloat.byte4ToInt`)."""


def encoded_lengths(lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the bytes of document lengths in terms, rounded down; same shape."""
    return (np.searchsorted(DECODED_LENGTHS, lengths, side="right") - 1).astype(np.uint8)


def idf(documents_with_term: int, documents: int) -> np.float32:
    """Return the inverse document frequency; documents without any term are not counted."""
    ratio = (documents - documents_with_term + 0.5) / (documents_with_term + 0.5)
    rounded: np.float32 = np.float32(math.log(1 + ratio))
    return rounded


def inverse_norms(k1: float, b: float, average_length: float) -> NDArray[np.float32]:
    """Return 1 / (k1 * (1 - b + b * length / average length)) for every length byte [256]."""
    one, k, part = np.float32(1), np.float32(k1), np.float32(b)
    lengths = DECODED_LENGTHS.astype(np.float32)
    norms: NDArray[np.float32] = k * ((one - part) + part * lengths / np.float32(average_length))
    with np.errstate(divide="ignore"):
        inverse: NDArray[np.float32] = one / norms
    return inverse


def factors(frequencies: NDArray[np.int64], norms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the formula's factor [n] from frequencies [n] and inverse norms [n]."""
    result: NDArray[np.float32] = np.float32(1) + frequencies.astype(np.float32) * norms
    return result
