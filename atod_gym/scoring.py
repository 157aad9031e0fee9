"""Score answers to questions: exact match and token F1, as SQuAD's evaluation computes them.

Source: `evaluate-v1.1.py` of SQuAD (Rajpurkar et al. 2016), which the published numbers of
question-answering agents use as well.

One difference: normalisation removes everything from some gold answers, such as `A`, `)` and `---`
(three of 1,000 questions of Natural Questions have one). In SQuAD's script any answer that
normalises to nothing equals them, so `.` is right. Here such a gold answer is compared as written,
except for case and surrounding white space. Published scores do not have this difference.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Return lower case without ASCII punctuation and articles, words separated by one space."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, golden_answers: Iterable[str]) -> bool:
    """Return whether an answer equals a gold answer, both normalised.

    A gold answer that normalises to nothing must be given as written. An empty answer is
    never right.
    """
    given = normalize_answer(answer)
    return any(_equal(answer, given, gold, normalize_answer(gold)) for gold in golden_answers)


def f1_score(answer: str, golden_answers: Iterable[str]) -> float:
    """Return the best token F1 of an answer with a gold answer, both normalised; 0 to 1.

    With a gold answer that normalises to nothing it is 1.0 for an exact match, else 0.0.
    """
    given = normalize_answer(answer)
    return max((_f1(answer, given, g, normalize_answer(g)) for g in golden_answers), default=0.0)


def _equal(answer: str, given: str, gold: str, golden: str) -> bool:
    """Compare an answer with a gold answer, each as written and normalised."""
    if golden:
        return given == golden
    return bool(gold.strip()) and answer.strip().casefold() == gold.strip().casefold()


def _f1(answer: str, given: str, gold: str, golden: str) -> float:
    given_words, golden_words = given.split(), golden.split()
    if not given_words or not golden_words:
        return float(_equal(answer, given, gold, golden))
    shared = (Counter(given_words) & Counter(golden_words)).total()
    # 2 P R / (P + R) with P = shared / given and R = shared / golden.
    return 2 * shared / (len(given_words) + len(golden_words))
