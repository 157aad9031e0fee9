"""Terms and rankings recorded from pyserini 0.22 on Lucene 9.5, all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from bm25_search import read_lines, read_products

from env_servers.search import BM25Index
from env_servers.search.lucene import Analyzer


@pytest.fixture(scope="module")
def products(data_folder: Path) -> BM25Index:
    return BM25Index.build(read_products(data_folder))


@pytest.fixture(scope="module")
def passages(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BM25Index:
    lines = read_lines(data_folder / "searchqa/corpus.jsonl.xz")
    folder = tmp_path_factory.mktemp("passages") / "index"
    return BM25Index.build(((line["id"], line["contents"]) for line in lines), folder=folder)


def test_terms_equal_the_recorded_ones(data_folder: Path) -> None:
    records = read_lines(data_folder / "webshop/golden/analyzer.jsonl.xz")
    assert len(records) == 2178
    analyzer = Analyzer()
    different = [record for record in records if analyzer(record["text"]) != record["tokens"]]
    assert different == []


@pytest.mark.slow
def test_product_rankings_equal_the_recorded_ones(
    way: str, data_folder: Path, products: BM25Index
) -> None:
    assert products.description.tokens == 107_608
    records = read_lines(data_folder / "webshop/golden/rankings.jsonl.xz")
    assert len(records) == 1794
    for record in records:
        hits = products.search(record["q"], 50)
        assert [hit.id for hit in hits] == record["asins"], record["q"]
        # Recorded scores are rounded to four places and spread where they are equal.
        scores = [hit.score for hit in hits]
        assert scores == pytest.approx(record["scores"], abs=2e-4), record["q"]


@pytest.mark.slow
def test_passage_rankings_equal_the_recorded_ones(
    way: str, data_folder: Path, passages: BM25Index
) -> None:
    records = read_lines(data_folder / "searchqa/golden/retrieval.jsonl.xz")
    assert len(records) == 1560
    for record in records:
        hits = passages.search(record["question"], 10)
        assert [hit.row for hit in hits] == record["bm25_top10"], record["id"]
        assert [hit.id for hit in hits] == [str(hit.row) for hit in hits]
        assert [hit.score for hit in hits] == pytest.approx(record["bm25_scores"], abs=2e-4)
