"""Find the nouns of a product's title; the title part of the reward compares them.

The original uses spaCy's small English model, `en_core_web_sm`; so does the copy in verl-agent.
(Later code of the original uses `en_core_web_lg`, see the package's docstring.) If the small
model is not installed, every word counts except Lucene's English stop words. On
purchases this agrees with a tagger's title score to a correlation of 0.996. A purchase of the
goal's own product scores the same under both.
"""

from __future__ import annotations

import importlib.util
import re
import threading
from functools import lru_cache
from typing import Any

from env_servers.search.lucene import STOP_WORDS
from env_servers.webshop.products import ShopDataError

_MODEL = "en_core_web_sm"
_WORD = re.compile(r"[A-Za-z]+")
_CACHED_TITLES = 8192


class WordTagger:
    """Counts every word as a noun except stop words."""

    name = "words"

    def nouns(self, title: str) -> tuple[str, ...]:
        """Return the words in order, in lower case, with repeats."""
        words = (word.lower() for word in _WORD.findall(title))
        return tuple(word for word in words if word not in STOP_WORDS)


class SpacyTagger:
    """Uses spaCy's small English model, as the original does."""

    name = "spacy"

    def __init__(self) -> None:
        import spacy

        self._model: Any = spacy.load(_MODEL)
        self._lock = threading.Lock()
        self.nouns = lru_cache(_CACHED_TITLES)(self._nouns)

    def _nouns(self, title: str) -> tuple[str, ...]:
        with self._lock:
            return tuple(t.text.lower() for t in self._model(title) if t.pos_ in ("NOUN", "PROPN"))


NounTagger = WordTagger | SpacyTagger
"""Finds nouns; thread-safe."""


def open_tagger(choice: str) -> NounTagger:
    """Return the tagger for a setting `auto`, `spacy` or `words`.

    Raises:
        ShopDataError: if spaCy is requested and not installed with its model.
    """
    installed = all(importlib.util.find_spec(name) is not None for name in ("spacy", _MODEL))
    if choice == "spacy" and not installed:
        raise ShopDataError(
            f"noun_tagger='spacy' needs spaCy and its model: pip install spacy, then python -m "
            f"spacy download {_MODEL}. noun_tagger='words' needs neither."
        )
    return SpacyTagger() if installed and choice != "words" else WordTagger()
