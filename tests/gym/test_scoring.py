from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_gym.scoring import exact_match, f1_score, normalize_answer

any_text = st.text(st.characters(exclude_categories=()), max_size=40)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Beatles", "beatles"),
        ("  a  Man, an  Island & the\tSea! ", "man island sea"),
        ("another theory", "another theory"),
        ("U.S.A.", "usa"),
        ("1,000.50", "100050"),
        ("well-known", "wellknown"),
        # The hyphen goes first, so what it joined is no article any more.
        ("a-ha", "aha"),
        ("“Über” naïve", "“über” naïve"),
        ("the", ""),
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("answer", "golden", "matches", "f1"),
    [
        ("Paris", ["paris"], True, 1.0),
        ("the city of Paris", ["Paris"], False, 0.5),  # P = 1/3, R = 1
        ("Paris", ["Rome", "Paris, France", "PARIS!"], True, 1.0),
        ("Rome", ["Paris"], False, 0.0),
        ("new york new york", ["New York"], False, 2 / 3),  # P = 1/2, R = 1
        ("York", ["New York"], False, 2 / 3),
        ("Barack Hussein Obama", ["Obama", "Barack Obama"], False, 0.8),
        ("yes", ["no"], False, 0.0),
        ("the", ["a"], True, 1.0),
        ("", ["Paris"], False, 0.0),
        ("the", ["Paris"], False, 0.0),
        ("Paris", [], False, 0.0),
    ],
)
def test_exact_match_and_f1(answer: str, golden: list[str], matches: bool, f1: float) -> None:
    assert exact_match(answer, golden) == matches
    assert f1_score(answer, golden) == pytest.approx(f1)


@given(any_text, st.lists(any_text, min_size=1, max_size=4))
def test_scores_agree_with_each_other(answer: str, golden: list[str]) -> None:
    f1 = f1_score(answer, golden)
    assert 0 <= f1 <= 1
    if exact_match(answer, golden):
        assert f1 == 1
    assert exact_match(answer, [*golden, answer])
    assert f1_score(answer, [*golden, "x"]) >= f1
    # Order does not count for F1, so words turned around are no match but as good.
    assert f1_score(" ".join(reversed(normalize_answer(answer).split())), [answer]) == 1
    assert normalize_answer(normalize_answer(answer)) in (
        normalize_answer(answer),
        # Lower case of a letter may have more letters, and an article may appear.
        normalize_answer(normalize_answer(normalize_answer(answer))),
    )
