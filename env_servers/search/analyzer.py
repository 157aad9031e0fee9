"""Turns text into search terms as Anserini's DefaultEnglishAnalyzer on Lucene 9 does.

In this order: words (`words`), without a possessive 's, in lower case, without 33 stop words, stems
(`porter`). Documents and queries go through the same analyzer.
"""

from __future__ import annotations

from env_servers.search.porter import stem
from env_servers.search.words import split_words

_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then"
    " there these they this to was will with"
)
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Lucene's English stop words (`EnglishAnalyzer.ENGLISH_STOP_WORDS_SET`)."""

_POSSESSIVE = tuple(quote + letter for quote in "'\u2019\uff07" for letter in "sS")


class Analyzer:
    """Text -> terms. Remembers the terms of words it has seen; safe to use from several threads.

    Args:
        remembered: number of words at which it forgets them all and starts again, so that memory
            stays bounded (about 150 bytes a word).
    """

    def __init__(self, remembered: int = 100_000) -> None:
        if remembered < 1:
            raise ValueError("remembered must be at least 1")
        self._remembered = remembered
        self._terms = _Terms()

    def __call__(self, text: str) -> list[str]:
        """The terms of a text in order, with repetitions; empty for a text without any.

        Any string is fine; lone surrogates and control characters count as spaces.
        """
        terms = self._terms
        found = [term for word in split_words(text) if (term := terms[word])]
        if len(terms) > self._remembered:
            self._terms = _Terms()
        return found


class _Terms(dict[str, str]):
    """Word -> term, filled as words are asked for."""

    def __missing__(self, word: str) -> str:
        term = self[word] = term_of(word)
        return term


def term_of(word: str) -> str:
    """The term of one word of a text; empty for a stop word."""
    if word.endswith(_POSSESSIVE):
        word = word[:-2]
    # Java lowers each code point alone: no final sigma, and the dotted capital I becomes an i.
    lower = word.replace("\u0130", "i").replace("\u03a3", "\u03c3").lower()
    return "" if lower in STOP_WORDS else stem(lower)
