"""Speed, memory and size of the BM25 search, in one thread of one process each.

    python tests/benchmarks/bm25_search.py --data <data folder> --documents 20000 200000

Queries per second on the two real corpora of the data folder (1,000 products with the recorded
queries, top 50; the passages of the question sets with their questions, top 3 and 10), with
tokenising and without; then, for every number of documents, building, opening and searching a
made-up corpus: words drawn from a Zipf-Mandelbrot distribution, 80 a document, on disk. Seconds
are of the processor (`time.process_time`) except where they are called wall. Each corpus has a
process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measured_server import resident

from env_servers.search.bm25 import BM25Index
from env_servers.search.lucene import Analyzer

VOCABULARY = 500_000
WORDS_PER_DOCUMENT = 80
SHIFT = 20.0


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of an xz file with one JSON object a line."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def product_text(entry: dict[str, Any]) -> str:
    """Return the text in WebShop's index for one entry of its product file."""
    bullets = entry["small_description"]
    options = [
        f"{name.lower()}: "
        + ", ".join(value["value"].strip().replace("/", " | ").lower() for value in values)
        for name, values in (entry["customization_options"] or {}).items()
        if values is not None
    ]
    parts = (
        entry["name"],
        entry["full_description"],
        bullets[0] if isinstance(bullets, list) else bullets,
        ", and ".join(options),
    )
    return " ".join(parts).lower()


def read_products(data: Path) -> list[tuple[str, str]]:
    """The documents (asin, text) of the small WebShop catalogue."""
    with lzma.open(data / "webshop/items_shuffle_1000.json.xz", "rt", encoding="utf-8") as file:
        return [(entry["asin"], product_text(entry)) for entry in json.load(file)[:1000]]


def rate(action: Callable[[], object], count: int, rounds: int = 3) -> float:
    """Best of some rounds, in items per second of the processor."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return count / min(seconds)


def report_searches(index: BM25Index, queries: Sequence[str], topk: int) -> None:
    """Prints the rates of one set of queries."""
    index.search_many(queries, topk)
    all_rate = rate(lambda: index.search_many(queries, topk), len(queries))
    analyzer = Analyzer()
    tokens_rate = rate(lambda: [analyzer(query) for query in queries], len(queries))
    search_rate = 1 / max(1e-9, 1 / all_rate - 1 / tokens_rate)
    print(
        f"  top {topk}: {all_rate:,.0f} queries/s, {search_rate:,.0f} without tokenising"
        f" ({1e6 / tokens_rate:.1f} us a query)"
    )


def measure_real(name: str, data: Path) -> None:
    """One of the real corpora, in memory."""
    if name == "products":
        documents = read_products(data)
        queries = [line["q"] for line in read_lines(data / "webshop/golden/rankings.jsonl.xz")]
        sizes = (50, 10)
    else:
        passages = read_lines(data / "searchqa/corpus.jsonl.xz")
        documents = [(line["id"], line["contents"]) for line in passages]
        lines = read_lines(data / "searchqa/golden/retrieval.jsonl.xz")
        queries = [line["question"] for line in lines]
        sizes = (3, 10)
    start = time.process_time()
    index = BM25Index.build(documents)
    seconds = time.process_time() - start
    print(f"{name}: {len(index):,} documents, {len(queries):,} queries; built in {seconds:.2f} s")
    for topk in sizes:
        report_searches(index, queries, topk)


def made_up_texts(count: int, words: int, seed: int) -> Iterator[str]:
    """Texts of words from a Zipf-Mandelbrot distribution: P(rank) ~ 1 / (rank + SHIFT)."""
    consonants, vowels = "bcdfgklmnprstvz", "aeiou"
    syllables = [a + b for a in consonants for b in vowels]
    rng = np.random.default_rng(seed)
    vocabulary = [
        "".join(syllables[rank // 75**place % 75] for place in range(3)) + "ted"[: rank % 4]
        for rank in range(VOCABULARY)
    ]
    for begin in range(0, count, 1000):
        draws = rng.random((min(1000, count - begin), words))
        ranks = SHIFT * ((VOCABULARY + SHIFT) / SHIFT) ** draws - SHIFT
        for row in ranks.astype(np.int64).tolist():
            yield " ".join([vocabulary[rank] for rank in row])


def measure_made_up(count: int, folder: Path) -> None:
    """Builds, opens and searches a made-up corpus on disk."""
    queries = list(made_up_texts(1000, 6, seed=2))
    before = resident("VmHWM") / 2**20
    path = folder / f"index-{count}"
    documents = (
        (f"{row:07d}", text)
        for row, text in enumerate(made_up_texts(count, WORDS_PER_DOCUMENT, seed=1))
    )
    start = time.process_time()
    sample = len(list(made_up_texts(10_000, WORDS_PER_DOCUMENT, seed=1)))
    generating = (time.process_time() - start) * count / sample
    start = time.process_time()
    BM25Index.build(documents, folder=path)
    seconds = time.process_time() - start - generating
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    start_wall = time.perf_counter()
    index = BM25Index.open(path)
    opening = time.perf_counter() - start_wall
    peak = resident("VmHWM") / 2**20
    print(
        f"made up: {count:,} documents, built in {seconds:.1f} s, peak {peak:,.0f} MB"
        f" ({before:,.0f} MB before), {size:,.0f} MB on disk,"
        f" opened in {opening * 1000:.1f} ms wall"
    )
    for topk in (3, 10, 50):
        report_searches(index, queries, topk)


def in_own_process(target: Callable[..., None], *arguments: object) -> None:
    """Runs a function in a fresh process and waits for it."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(process.exitcode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with webshop/ and searchqa/")
    parser.add_argument("--documents", type=int, nargs="*", default=[20_000, 200_000])
    parser.add_argument("--folder", type=Path, help="where indexes go; a temporary one if not set")
    options = parser.parse_args()
    if options.data:
        for name in ("products", "passages"):
            in_own_process(measure_real, name, options.data)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for count in options.documents:
            in_own_process(measure_made_up, count, Path(folder))


if __name__ == "__main__":
    main()
