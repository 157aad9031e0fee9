"""How answers to questions are scored: exact match and token F1, as SQuAD's evaluation does it.

Source: `evaluate-v1.1.py` of SQuAD (Rajpurkar et al. 2016), which the published numbers of
question-answering agents use as well.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, words separated by one space."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golden_answers: Iterable[str]) -> bool:
    """Whether an answer equals a gold answer, both normalised."""
    given = normalize_answer(answer)
    return any(given == normalize_answer(golden) for golden in golden_answers)


def f1_score(answer: str, golden_answers: Iterable[str]) -> float:
    """The best token F1 of an answer with a gold answer, both normalised; 0 to 1.

    Where one of the two has no token, it is 1.0 if neither has one, else 0.0, as in SQuAD 2.0.
    """
    given = normalize_answer(answer).split()
    return max((_f1(given, normalize_answer(gold).split()) for gold in golden_answers), default=0.0)


def _f1(given: list[str], golden: list[str]) -> float:
    if not given or not golden:
        return float(given == golden)
    shared = (Counter(given) & Counter(golden)).total()
    # 2 P R / (P + R) with P = shared / given and R = shared / golden.
    return 2 * shared / (len(given) + len(golden))
