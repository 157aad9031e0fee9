from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atod_gym.envs.search_qa.env import CUT_MARK, information, parse_action
from atod_gym.envs.search_qa.settings import (
    MIN_CHARACTERS,
    MIN_PASSAGE_CHARACTERS,
    Passage,
    make_passage,
)

any_text = st.text(st.characters(exclude_categories=()), max_size=200)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("search[red shoes]", ("search", "red shoes")),
        (" ANSWER [ Paris ]\n", ("answer", "Paris")),
        ("Search[a [b] c]", ("search", "a [b] c")),
        ("search[a]b]", ("search", "a]b")),
        ("answer[a\nb]", ("answer", "a\nb")),
        ("search[]", ("", "The brackets of search[..] are empty.")),
        ("Answer[ ]", ("", "The brackets of answer[..] are empty.")),
        (f"search[{'x' * 10_001}]", ("", "A query has at most 10,000 characters, not 10,001.")),
    ],
)
def test_actions(action: str, expected: tuple[str, str]) -> None:
    assert parse_action(action) == expected


@pytest.mark.parametrize(
    "action", ["search", "search[a", "look search[a]", "search[a] please", "click[a]", ""]
)
def test_malformed_actions(action: str) -> None:
    assert parse_action(action) == ("", f"An action is search[..] or answer[..], not {action!r}.")


@pytest.mark.parametrize(
    ("contents", "title", "text"),
    [
        ('"Halden Mill"\nIt is old.', "Halden Mill", "It is old."),
        ("Halden Mill\nIt is\nold.\r\nVery.", "Halden Mill", "It is old. Very."),
        ('"A "quoted" name"\n', 'A "quoted" name', ""),
        ('"', "", '"'),
        ("", "", ""),
        ("all in one line", "", "all in one line"),
        ('"Halden Mill"', "Halden Mill", ""),
        ('""\nno title', "", "no title"),
        ("\nno title", "", "no title"),
    ],
)
def test_passages(contents: str, title: str, text: str) -> None:
    assert make_passage("7", contents) == Passage("7", title, text)


def test_information() -> None:
    passages = [Passage("a", "Halden Mill", "It is old."), Passage("b", "Empty", "")]
    text, shown = information(passages, 1000, 4000)
    assert text == (
        "<information>\nDoc 1 (Title: Halden Mill) It is old.\nDoc 2 (Title: Empty)\n</information>"
    )
    assert shown == ("a", "b")
    nothing = "<information>\nNo passage matches this query.\n</information>"
    assert information([], 1000, 4000) == (nothing, ())


def test_budgets_cut_with_a_mark() -> None:
    passages = [Passage(name, f"Title {name}", "word " * 40) for name in "abc"]
    text, shown = information(passages, 21, 4000)
    lines = text.splitlines()[1:-1]
    assert lines == [f"Doc {n} (Title: Title {c}) word word word{CUT_MARK}"
                     for n, c in enumerate("abc", 1)]  # fmt: skip
    assert shown == ("a", "b", "c")
    # 29 characters around the lines, 222 for the first one and its end, 27 for the next title.
    text, shown = information(passages, 1000, 300)
    lines = text.splitlines()[1:-1]
    assert len(text) <= 300
    assert lines[0] == f"Doc 1 (Title: Title a) {'word ' * 40}".strip()
    assert lines[1].startswith("Doc 2 (Title: Title b) word")
    assert lines[1].endswith(CUT_MARK)
    assert (lines[2:], shown) == (["[...]"], ("a", "b"))
    text, shown = information(passages, 1000, 255)
    assert (text.splitlines()[2:-1], shown) == (["[...]"], ("a",))


@given(
    st.lists(st.builds(make_passage, st.text("abc", max_size=2), any_text), max_size=5),
    st.integers(MIN_PASSAGE_CHARACTERS, 250),
    st.integers(MIN_CHARACTERS, 500),
)
def test_budgets_hold_for_all_passages(passages: list[Passage], each: int, whole: int) -> None:
    text, shown = information(passages, each, whole)
    assert len(text) <= whole
    assert text.startswith("<information>\n")
    assert text.endswith("\n</information>")
    assert shown == tuple(passage.passage_id for passage in passages[: len(shown)])
    if len(shown) < len(passages):
        assert text.endswith("\n[...]\n</information>")
    for number, passage in enumerate(passages[: len(shown)], 1):
        assert f"Doc {number} (Title: {passage.title[:4].rstrip()}" in text
    whole_text, everything = information(passages, 10_000, 100_000)
    assert len(everything) == len(passages)
    assert all(passage.text in whole_text for passage in passages)
