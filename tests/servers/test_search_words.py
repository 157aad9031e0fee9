"""Words and terms: against recorded Lucene output, against the rules of UAX #29, under abuse."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from env_servers.search import lucene, words
from env_servers.search.lucene import STOP_WORDS, Analyzer, stem
from env_servers.search.words import OTHER, class_ranges, class_table, split_words

CLASS_TABLE = "2aa8c00b26ff83041e209177e46654a245248214e37e7178ad5de0d8ea62e90a"
ASCII = st.text(alphabet=[chr(code) for code in range(128)] + list("abz019__..,,''::;; \n"))
ANYTHING = st.text(alphabet=st.characters(exclude_categories=()))


@cache
def recorded(kind: str) -> list[Any]:
    path = Path(__file__).parent / "lucene_tokens.json"
    content: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
    return content[kind]


def one_of_each_class() -> list[str]:
    """A few characters of every class of the word rules, and of none."""
    chosen = [" ", "-", "\n"]
    by_class: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, first, last in class_ranges():
        by_class[name].append((first, last))
    for ranges in by_class.values():
        for part in (ranges[0], ranges[len(ranges) // 2], ranges[-1]):
            chosen += map(chr, part)
    return chosen


# --- against Lucene ---


def test_words_equal_those_recorded_from_lucene() -> None:
    assert len(recorded("words")) > 400
    for text, expected in recorded("words"):
        assert split_words(text) == expected, ascii(text)


def test_words_are_cut_where_lucene_cuts_them() -> None:
    for piece, repeats, tail, lengths in recorded("long_words"):
        found = split_words(piece * repeats + tail)
        assert [len(word) for word in found] == lengths, (ascii(piece), repeats, ascii(tail))


def test_terms_equal_those_recorded_from_lucene() -> None:
    analyzer = Analyzer()
    assert len(recorded("terms")) > 300
    for text, expected in recorded("terms"):
        assert analyzer(text) == expected, ascii(text)


# --- against the rules ---

# Characters whose words follow the rules of UAX #29 alone: no emoji, no Hebrew, no Thai, where
# Lucene goes its own way. Each with its Word_Break property.
PROPERTIES = {
    "a": "ALetter", "Z": "ALetter", "é": "ALetter", "Σ": "ALetter", "한": "ALetter", "𐐀": "ALetter",
    "0": "Numeric", "9": "Numeric", "٣": "Numeric", "ア": "Katakana", "ｱ": "Katakana",
    "_": "ExtendNumLet", "‿": "ExtendNumLet", ":": "MidLetter", "·": "MidLetter", ",": "MidNum",
    ";": "MidNum", ".": "MidNumLet", "\u2019": "MidNumLet", "'": "Single_Quote", "\u0301": "Extend",
    "\u200d": "Extend", "\u00ad": "Extend", "\ufe0f": "Extend", "中": "Han", "ひ": "Hiragana",
    " ": "Other", "-": "Other", "\n": "Newline", '"': "Other", "+": "Other",
}  # fmt: skip
HOLDS_A_WORD = {"ALetter", "Numeric", "Katakana", "Han", "Hiragana"}


def breaks_between(before: list[str], after: list[str]) -> bool:
    """Rules WB5 to WB999 on properties, those of Extend characters left out (WB4)."""
    left, right = before[-1], after[0]
    left2 = before[-2] if len(before) > 1 else ""
    right2 = after[1] if len(after) > 1 else ""
    mid_letters = {"MidLetter", "MidNumLet", "Single_Quote"}
    mid_numbers = {"MidNum", "MidNumLet", "Single_Quote"}
    alphanumeric = {"ALetter", "Numeric"}
    joined = (
        (left in alphanumeric and right in alphanumeric)  # WB5, WB8, WB9, WB10
        or (left == "ALetter" and right in mid_letters and right2 == "ALetter")  # WB6
        or (left2 == "ALetter" and left in mid_letters and right == "ALetter")  # WB7
        or (left2 == "Numeric" and left in mid_numbers and right == "Numeric")  # WB11
        or (left == "Numeric" and right in mid_numbers and right2 == "Numeric")  # WB12
        or (left == right == "Katakana")  # WB13
        or (left in {*alphanumeric, "Katakana", "ExtendNumLet"} and right == "ExtendNumLet")
        or (left == "ExtendNumLet" and right in {*alphanumeric, "Katakana"})  # WB13a, WB13b
    )
    return not joined


def words_by_rules(text: str) -> list[str]:
    """The segments of UAX #29 that hold a letter, a number or an ideograph."""
    # A base character with what extends it is one unit; after a line end nothing extends (WB3a).
    units: list[str] = []
    for character in text:
        extends = PROPERTIES[character] == "Extend" and units and units[-1][0] != "\n"
        if extends:
            units[-1] += character
        else:
            units.append(character)
    properties = [PROPERTIES[unit[0]] for unit in units]
    segments: list[list[int]] = []
    for place in range(len(units)):
        if place == 0 or breaks_between(properties[:place], properties[place:]):
            segments.append([])
        segments[-1].append(place)
    return [
        "".join(units[place] for place in segment)
        for segment in segments
        if any(properties[place] in HOLDS_A_WORD for place in segment)
    ]


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet=sorted(PROPERTIES), max_size=40))
def test_words_follow_the_unicode_rules(text: str) -> None:
    assert split_words(text) == words_by_rules(text)


@settings(max_examples=150, deadline=None)
@given(ASCII)
def test_the_short_cut_for_ascii_changes_nothing(text: str) -> None:
    assert split_words(text) == words._split_any(text)
    assert split_words(text) == words._split_carefully(text, text.translate(words._CLASSES))


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=one_of_each_class(), max_size=40))
def test_the_careful_way_changes_nothing(text: str) -> None:
    assert split_words(text) == words._split_carefully(text, text.translate(words._CLASSES))


@settings(max_examples=150, deadline=None)
@given(ANYTHING)
def test_any_text_has_words_in_order(text: str) -> None:
    rest = text
    for word in split_words(text):
        assert word
        assert len(word.encode("utf-16-le")) <= 2 * words.MAX_UNITS
        skipped, found, rest = rest.partition(word)
        assert found, skipped
    assert all(term < "\ud800" or term > "\udfff" for term in Analyzer()(text))


@pytest.mark.parametrize(
    "piece",
    ["_", "é_", "_\u0301", "_🏻", "a.", "😀\u200d", "\u200d", "#\u0301", 'א"', "\u2139", "\0"],
)
def test_hostile_texts_take_linear_time(piece: str) -> None:
    # With quadratic work these would take minutes.
    for text in (piece * 20_000, "é" + piece * 20_000, piece * 20_000 + "é"):
        split_words(text)


def test_the_class_table_agrees_with_the_character_database() -> None:
    table = class_table()
    assert len(table) == 0x110000
    assert table[ord("a")] == "L"
    for first, last in ((0xD800, 0xDFFF), (0x0, 0x1F), (0x7F, 0x9F)):
        assert set(table[first : last + 1]) == {OTHER}
    # No range overlaps another.
    sizes = [last - first + 1 for _, first, last in class_ranges()]
    assert sum(sizes) == 0x110000 - table.count(OTHER)
    assert hashlib.sha256(table.encode()).hexdigest() == CLASS_TABLE
    # Characters that Unicode had long before keep their kind, but for Ethiopic digits and one mark.
    old = unicodedata.ucd_3_2_0
    for code in range(0x110000):
        category = old.category(chr(code))
        if category == "Nd" and not 0x1369 <= code <= 0x1371:
            assert table[code] in "ND", hex(code)
        elif category[0] == "L" and code != 0x3006:
            assert table[code] != OTHER, hex(code)
        elif category in {"Cc", "Sc"}:
            assert table[code] == OTHER, hex(code)


# --- the analyzer ---


def test_stop_words_and_possessives_go() -> None:
    analyzer = Analyzer()
    assert len(STOP_WORDS) == 33
    assert analyzer("The dog's and the cats\u2019s AND CAT'S to THESE") == ["dog", "cat", "cat"]
    assert analyzer("") == analyzer(" \n\t.,!") == analyzer("the The THE") == []


def test_lower_case_is_by_code_point() -> None:
    # str.lower alone would give a final sigma and a combining dot.
    assert Analyzer()("ΟΔΟΣ İX") == ["οδοσ", "ix"]


@given(ANYTHING)
def test_stemming_never_fails_and_only_shortens(word: str) -> None:
    lower = word.lower()
    assert len(stem(lower)) <= max(len(lower), 1) + 1
    if len(lower) <= 2 and lower.isascii():
        assert stem(lower) == lower


ENDINGS = (
    "ational tional enci anci izer abli bli alli entli eli ousli ization ation ator alism iveness"
    " fulness ousness aliti iviti biliti logi icate ative alize iciti ical ful ness al ance ence"
    " er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize e ll s sses ies eed ed ing"
    " y"
)
HEADS = "run hop fil comprehens gener oscill trad y by sky conn probab ad plast fizz ed t"


@pytest.mark.slow
def test_stems_equal_those_of_nltk() -> None:
    porter = pytest.importorskip("nltk.stem.porter", reason="nltk is in the extra dev")
    oracle = porter.PorterStemmer(mode=porter.PorterStemmer.MARTIN_EXTENSIONS)
    endings, heads = ENDINGS.split(), HEADS.split()
    made = [head + first + last for head in heads for first in ("", *endings) for last in endings]
    assert len(made) > 50_000
    assert [word for word in made if stem(word) != oracle.stem(word)] == []


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="abceilnostuyz", min_size=1, max_size=14))
def test_stems_of_any_letters_equal_those_of_nltk(word: str) -> None:
    porter = pytest.importorskip("nltk.stem.porter", reason="nltk is in the extra dev")
    oracle = porter.PorterStemmer(mode=porter.PorterStemmer.MARTIN_EXTENSIONS)
    assert stem(word) == oracle.stem(word)


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lucene, "KEPT_WORDS", 50)
    analyzer = Analyzer()
    for number in range(1000):
        assert analyzer(f"a{number}xing shoes") == [f"a{number}x", "shoe"]
        assert len(analyzer._terms) <= 52
    # Long words are not kept at all.
    long = [f"{number}" * 41 for number in range(1, 10)]
    kept = Analyzer()
    assert kept(" ".join(long)) == long
    assert not kept._terms


def test_threads_can_share_an_analyzer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lucene, "KEPT_WORDS", 20)
    shared = Analyzer()
    texts = [f"running {number} caresses word{number % 40}s" for number in range(300)]
    expected = [Analyzer()(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: [shared(text) for text in texts], range(4)))
    assert found == [expected] * 4
