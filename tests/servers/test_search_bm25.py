"""The BM25 index: against a plain computation, on disk, in segments, with odd input."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from env_servers.search import BM25Index, Hit, bm25, builder, lucene
from env_servers.search.lucene import Analyzer
from env_servers.search.storage import ArrayStore, SearchIndexError, StringTable

SHOES = (
    ("b", "red running shoes for men"),
    ("a", "Red shoes, red laces"),
    ("c", "a blue hat"),
    ("é", "the THE of"),
    ("", "running hat's and hats"),
)
# 0 to 39 in the order of their names as strings: 0, 1, 10, 11, ..
MANY = tuple(
    (str(number), f"w{number % 7} w{number % 3} common " + "filler " * (number % 11))
    for number in range(40)
)

WORDS = st.sampled_from(["red", "shoe", "hat", "blue", "lace", "the", "run", "sock", "x1", "é"])
TEXTS = st.lists(WORDS, max_size=60).map(" ".join)


def short_length(length: int) -> int:
    """Lucene's length in one byte, from its description: 24 exact, then the top four bits."""
    if length < 24:
        return length
    rest = length - 24
    drop = max(0, rest.bit_length() - 4)
    return 24 + (rest >> drop << drop)


def expected_hits(
    documents: Sequence[tuple[str, str]], query: str, topk: int, k1: float = 0.9, b: float = 0.4
) -> list[Hit]:
    """Lucene's formula, document by document."""
    f32 = np.float32
    analyzer = Analyzer()
    bags = [analyzer(text) for _, text in documents]
    filled = sum(1 for bag in bags if bag)
    if not filled:
        return []
    average = f32(sum(map(len, bags)) / filled)
    hits = []
    for row, bag in enumerate(bags):
        length = f32(short_length(len(bag)))
        with np.errstate(divide="ignore"):
            norm = f32(1) / (f32(k1) * ((f32(1) - f32(b)) + f32(b) * length / average))
        parts = []
        for term, count in Counter(analyzer(query)).items():
            frequency = bag.count(term)
            if frequency:
                df = sum(1 for other in bags if term in other)
                idf = f32(math.log(1 + (filled - df + 0.5) / (df + 0.5)))
                weight = f32(count) * idf
                parts.append(float(weight - weight / (f32(1) + f32(frequency) * norm)))
        if parts:
            hits.append(Hit(row, documents[row][0], float(f32(math.fsum(parts)))))
    hits.sort(key=lambda hit: (-hit.score, hit.id.encode()))
    return hits[:topk]


def assert_same(found: list[Hit], expected: list[Hit]) -> None:
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    assert [hit.row for hit in found] == [hit.row for hit in expected]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], rel=2e-7)


# --- ranking ---


@pytest.mark.parametrize("query", ["red shoes", "hat", "red red red shoes", "blue running hat"])
def test_hits_follow_the_formula(way: str, query: str) -> None:
    index = BM25Index.build(SHOES)
    assert len(index) == 5
    hits = index.search(query, 3)
    assert hits
    assert_same(hits, expected_hits(SHOES, query, 3))
    assert all(isinstance(hit.row, int) and isinstance(hit.score, float) for hit in hits)


@settings(max_examples=80, deadline=None)
@given(st.lists(TEXTS, max_size=30), TEXTS, st.integers(1, 12), st.booleans())
def test_any_corpus_follows_the_formula(
    texts: list[str], query: str, topk: int, all_at_once: bool
) -> None:
    documents = [(str(number), text) for number, text in enumerate(texts)]
    index = BM25Index.build(documents)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25, "SMALL_INDEX", 1 << 16 if all_at_once else 0)
        assert_same(index.search(query, topk), expected_hits(documents, query, topk))


def test_both_ways_agree_on_a_large_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ranks = (400 ** rng.random((2000, 30))).astype(int)
    documents = [
        (f"{row * 7919 % 2000}", " ".join(f"t{rank}" for rank in ranks[row]))
        for row in range(len(ranks))
    ]
    index = BM25Index.build(documents)
    queries = [" ".join(f"t{rank}" for rank in row[:7]) for row in ranks[::40]]
    for topk in (1, 3, 10, 50, 3000):
        monkeypatch.setattr(bm25, "SMALL_INDEX", 1 << 16)
        everything = index.search_many(queries, topk)
        monkeypatch.setattr(bm25, "SMALL_INDEX", 0)
        assert index.search_many(queries, topk) == everything


def test_frequent_terms_are_not_read_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "SMALL_INDEX", 0)
    documents = [(str(row), "rare word" if row % 500 == 0 else "word") for row in range(20_000)]
    index = BM25Index.build(documents)
    read = []
    parts = bm25._parts

    def counted(term: bm25._QueryTerm, factors: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        read.append(len(term.docs))
        return parts(term, factors)

    monkeypatch.setattr(bm25, "_parts", counted)
    hits = index.search("word rare", 10)
    assert [hit.row % 500 for hit in hits] == [0] * 10
    assert sum(read) < 1000


def test_equal_scores_are_ordered_by_id_as_a_string(way: str) -> None:
    documents = [(name, "same text") for name in ("10", "9", "b", "B", "é", "z", "", "￿", "😀")]
    ids = [hit.id for hit in BM25Index.build(documents).search("text", 50)]
    assert ids == ["", "10", "9", "B", "b", "z", "é", "￿", "😀"]
    # Also where only some of them fit.
    assert [hit.id for hit in BM25Index.build(documents).search("text", 4)] == ids[:4]


def test_search_many_is_search_of_each(way: str) -> None:
    index = BM25Index.build(MANY)
    queries = ["w1 common", "", "w2 w2 filler", "nothing of it"]
    assert index.search_many(queries, 5) == [index.search(query, 5) for query in queries]
    assert index.search_many([], 5) == []


def test_parameters_change_the_ranking() -> None:
    for k1, b in ((1.5, 0.75), (0.0, 0.0), (2.0, 1.0)):
        index = BM25Index.build(MANY, k1=k1, b=b)
        assert_same(index.search("w1 filler", 20), expected_hits(MANY, "w1 filler", 20, k1, b))


def test_documents_without_terms_do_not_count() -> None:
    # SHOES has one document of stop words only.
    index = BM25Index.build(SHOES)
    assert (index.description.documents, index.description.documents_with_terms) == (5, 4)


def test_lengths_take_one_byte_and_are_rounded_down() -> None:
    lengths = np.arange(70_000)
    codes = lucene.encoded_lengths(lengths)
    assert codes.dtype == np.uint8
    decoded = lucene.DECODED_LENGTHS[codes].tolist()
    assert decoded == [short_length(length) for length in lengths.tolist()]
    assert [decoded[n] for n in (23, 39, 41, 47, 100, 250, 500)] == [23, 39, 40, 46, 96, 248, 472]
    assert len(lucene.DECODED_LENGTHS) == 256


# --- odd input ---

SHOE_INDEX = BM25Index.build(SHOES)


@pytest.mark.parametrize("query", ["", "   ", "the of", "unknown", "\ud800\x00\x1b", '?!*:"~^()'])
def test_queries_without_known_terms_have_no_hits(way: str, query: str) -> None:
    assert BM25Index.build(SHOES).search(query, 10) == []


def test_topk_must_be_positive_and_may_be_huge(way: str) -> None:
    index = BM25Index.build(SHOES)
    for topk in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            index.search("red", topk)
        with pytest.raises(ValueError, match="at least 1"):
            index.search("", topk)
    assert len(index.search("red hat", 10**30)) == 4


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=())), st.integers(1, 100))
def test_any_query_is_answered(query: str, topk: int) -> None:
    assert len(SHOE_INDEX.search(query, topk)) <= min(topk, 5)


def test_a_very_long_query_is_answered(way: str) -> None:
    index = BM25Index.build(MANY)
    hits = index.search(" ".join(f"w{number}" for number in range(20_000)), 50)
    assert len(hits) == 40
    assert index.search("red " * 25_000 + "w1", 1)[0].score == index.search("w1", 1)[0].score


def test_an_index_of_nothing_finds_nothing(way: str, tmp_path: Path) -> None:
    for documents in ([], [("a", ""), ("b", "the")]):
        assert BM25Index.build(documents).search("a the", 3) == []
        folder = tmp_path / str(len(documents))
        assert len(BM25Index.build(documents, folder=folder)) == len(documents)
        assert BM25Index.open(folder).search("a the", 3) == []


def test_bad_documents_and_parameters_are_refused(tmp_path: Path) -> None:
    for long in ("", "x" * 100):
        with pytest.raises(ValueError, match="documents 1 and 2 have the same id"):
            BM25Index.build([(long + "a", "x"), (long + "b", "y"), (long + "b", "z")])
    with pytest.raises(ValueError, match="NUL"):
        BM25Index.build([("a\0", "x")])
    for k1, b in ((-1, 0.4), (math.nan, 0.4), (math.inf, 0.4), (0.9, 1.1), (0.9, -0.1)):
        with pytest.raises(ValueError, match="must be"):
            BM25Index.build(SHOES, k1=k1, b=b)
    with pytest.raises(ValueError, match="same id"):
        BM25Index.build([("a", "x"), ("a", "y")], folder=tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_lone_surrogates_in_documents_are_kept_out_of_terms(tmp_path: Path) -> None:
    index = BM25Index.build([("\ud800", "one \udfff two")], folder=tmp_path / "index")
    assert [hit.id for hit in index.search("two\ud800one", 1)] == ["\ud800"]


# --- segments and files ---


def test_segments_give_the_same_index(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = BM25Index.build(MANY, folder=tmp_path / "whole")
    for tokens in (3, 50):
        monkeypatch.setattr(builder, "SEGMENT_TOKENS", tokens)
        folder = tmp_path / f"parts-{tokens}"
        parts = BM25Index.build(MANY, folder=folder)
        assert parts.description == whole.description
        for file in (tmp_path / "whole").iterdir():
            assert (folder / file.name).read_bytes() == file.read_bytes(), file.name
        assert BM25Index.build(MANY).search("w1 w2", 9) == parts.search("w1 w2", 9)
    assert len(list(tmp_path.iterdir())) == 3


def test_documents_are_read_once() -> None:
    assert len(BM25Index.build(iter(MANY))) == 40


def test_a_saved_index_opens_as_it_was(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "index"
    built = BM25Index.build(MANY, k1=1.2, b=0.7, folder=folder)
    opened = BM25Index.open(folder)
    assert opened.description == built.description
    assert (opened.description.k1, opened.description.b) == (1.2, 0.7)
    for query in ("w1 common", "filler w2", "common"):
        assert opened.search(query, 10) == BM25Index.build(MANY, k1=1.2, b=0.7).search(query, 10)
    assert isinstance(opened._arrays.docs.base, np.memmap)
    # The folder is complete in itself and can be moved.
    moved = folder.rename(tmp_path / "moved")
    assert BM25Index.open(moved).search("w1", 3) == opened.search("w1", 3)
    with pytest.raises(SearchIndexError, match="exists already"):
        BM25Index.build(MANY, folder=moved)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="not on this system")
def test_room_on_the_disk_is_taken_before_it_is_mapped(tmp_path: Path) -> None:
    array = ArrayStore(tmp_path).new("docs", 1 << 20, "int32")
    assert (tmp_path / "docs.npy").stat().st_blocks * 512 > array.nbytes == 4 << 20


def test_the_content_hash_names_the_documents() -> None:
    def hash_of(*documents: tuple[str, str]) -> str:
        return BM25Index.build(documents).description.content_hash

    hashes = {
        hash_of(),
        hash_of(("a", "b")),
        hash_of(("ab", "")),
        hash_of(("a", ""), ("b", "")),
        hash_of(("b", ""), ("a", "")),
    }
    assert len(hashes) == 5
    assert hash_of(("a", "b")) == hash_of(("a", "b"))


def test_a_failed_build_leaves_no_index(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[str, str]]:
        yield "a", "text"
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        BM25Index.build(broken(), folder=tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == [".index.lock"]


def test_two_builds_for_one_folder_leave_one_index(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    with ThreadPoolExecutor(2) as pool:
        builds = [pool.submit(BM25Index.build, SHOES, folder=folder) for _ in range(2)]
    (error,) = filter(None, [build.exception() for build in builds])
    assert "exists already" in str(error)
    assert len(BM25Index.open(folder)) == 5
    assert list(tmp_path.iterdir()) == [folder]


def test_folders_that_are_no_index_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchIndexError, match=r"no index\.json.*build one"):
        BM25Index.open(tmp_path)
    with pytest.raises(SearchIndexError, match=r"no index\.json"):
        BM25Index.open(tmp_path / "missing")
    path = tmp_path / "index.json"
    for content, message in (
        ("{", "is damaged"),
        ("[]", "not a search index"),
        ('{"format": "other"}', "not a search index"),
        ('{"format": "atod-bm25", "version": 99}', "version 99.*build"),
        ('{"format": "atod-bm25", "version": 1}', "is damaged"),
        ('{"format": "atod-bm25", "version": 1, "arrays": 3}', "is damaged"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(SearchIndexError, match=message):
            BM25Index.open(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(SearchIndexError, match="is damaged"):
        BM25Index.open(tmp_path)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    BM25Index.build(MANY, folder=good)
    paths = list(good.iterdir())
    assert len(paths) == 11
    for path in paths:
        content = path.read_bytes()
        for damaged in (None, content[:-3], b"", b"PK\3\4x"):
            path.write_bytes(damaged or b"")
            if damaged is None:
                path.unlink()
            with pytest.raises(SearchIndexError, match=r"damaged|no index\.json"):
                BM25Index.open(good)
            path.write_bytes(content)
    assert len(BM25Index.open(good)) == 40


def test_an_index_with_a_wrong_description_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "index"
    BM25Index.build(MANY, folder=folder)
    path = folder / "index.json"
    good = json.loads(path.read_text(encoding="utf-8"))
    changes = (
        {"documents": 39},
        {"arrays": {**good["arrays"], "docs": {"dtype": "float64", "length": 1}}},
        {"arrays": {**good["arrays"], "ranks": {"dtype": "int32", "length": "x"}}},
        {"arrays": {**good["arrays"], "ranks": 3}},
        {"documents": "many"},
    )
    for change in changes:
        path.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(SearchIndexError, match="damaged"):
            BM25Index.open(folder)


def test_a_table_of_strings_finds_its_strings() -> None:
    strings = sorted({f"{number:x}" * (number % 5) for number in range(300)} | {"é", "z\U0001f600"})
    encoded = [text.encode() for text in strings]
    offsets = np.cumsum([0, *map(len, encoded)])
    table = StringTable(np.frombuffer(b"".join(encoded), np.uint8), offsets)
    assert table.texts(range(len(table))) == strings
    assert [table.find(text) for text in strings] == list(range(len(strings)))
    for absent in ("0x", "zz", "\U0001f601", "e"[:0] + "-"):
        assert table.find(absent) is None


def test_unknown_terms_are_not_kept() -> None:
    index = BM25Index.build(SHOES)
    for number in range(200):
        assert index.search(f"unknown{number} shoes", 1)
    assert index._terms.keys() == {"shoe"}


# --- threads ---


def test_threads_can_search_one_index(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "KEPT_TERMS", 3)
    index = BM25Index.build(MANY)
    queries = [f"w{number % 7} w{number % 5} common" for number in range(200)]
    expected = BM25Index.build(MANY).search_many(queries, 7)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: index.search_many(queries, 7), range(6)))
    assert found == [expected] * 6
