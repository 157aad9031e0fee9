"""The grammar of actions, against the pattern that the original uses."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from env_servers.webshop.episode import Action, parse_action

ORIGINAL = re.compile(r"(.+)\[(.+)\]")


def parse_as_original(text: str) -> Action | None:
    match = ORIGINAL.match(text)
    if match is None:
        return None
    name, argument = match.groups()
    return Action(name, argument.lower()) if name in ("search", "click") else None


@pytest.mark.slow
@given(st.text(alphabet="[]\n aB", max_size=12).map("click{}".format) | st.text())
def test_the_same_as_the_pattern(text: str) -> None:
    assert parse_action(text) == parse_as_original(text)


@pytest.mark.parametrize(
    ("text", "argument"),
    [
        ("search[Red Shoes] please", "red shoes"), ("search[shirt]]", "shirt]"),
        ("search[ ]", " "), ("search[]", None), (" search[x]", None), ("Search[x]", None),
        ("search[a][b]", None), ("search[line\nbreak]", None), ("search[line]\nbreak]", "line"),
    ],
)  # fmt: skip
def test_examples(text: str, argument: str | None) -> None:
    expected = None if argument is None else Action("search", argument)
    assert parse_action(text) == expected


def test_hostile_text_takes_no_time() -> None:
    start = time.perf_counter()
    for text in ("[" * 1_000_000, "search" + "[x" * 500_000, "]" * 1_000_000):
        assert parse_action(text) is None
    assert time.perf_counter() - start < 2
