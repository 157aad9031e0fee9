"""Measure the retrieval server by size of corpus: time and memory to index, start and serve.

    python tests/benchmarks/retrieval_scaling.py --passages 20000 200000 2000000

Corpora of made-up passages, 80 words each as in `bm25_search.py`. The first start reads the corpus
and makes the index, the second one opens it. The resident memory is that of the second server
after its start and after queries of six words each; pages of mapped files count as long as the
system keeps them. Rates are over HTTP with one client, three passages a query.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from bm25_search import WORDS_PER_DOCUMENT, made_up_texts
from measured_server import MeasuredServer, poster

QUERIES = 1024


def write_corpus(path: Path, passages: int) -> None:
    """A corpus file with titles of two words."""
    with path.open("w", encoding="utf-8") as file:
        for row, text in enumerate(made_up_texts(passages, WORDS_PER_DOCUMENT, seed=1)):
            title = " ".join(text.split(" ", 2)[:2])
            file.write(json.dumps({"id": str(row), "contents": f'"{title}"\n{text}'}) + "\n")


def rate(server: MeasuredServer, queries: list[str], batch: int) -> float:
    """Queries per second with batches of one size."""
    post = poster(server.url)
    begun = time.perf_counter()
    for begin in range(0, len(queries), batch):
        part = queries[begin : begin + batch]
        post("/retrieve", {"queries": part, "topk": 3, "return_scores": True})
    return len(queries) / (time.perf_counter() - begun)


def measure(passages: int, folder: Path) -> None:
    """One line of the table."""
    corpus, index = folder / "corpus.jsonl", folder / "index"
    write_corpus(corpus, passages)
    arguments = ["retrieval", "--corpus", str(corpus), "--index", str(index)]
    first = MeasuredServer(arguments)
    peak = first.peak_megabytes()
    first.stop()
    size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file()) / 1e6
    server = MeasuredServer(arguments)
    started = server.megabytes()
    queries = list(made_up_texts(QUERIES, 6, seed=2))
    rates = [rate(server, queries, batch) for batch in (1, 64)]
    print(
        f"| {passages:,} | {corpus.stat().st_size / 1e6:,.0f} | {first.ready_seconds:,.1f} |"
        f" {first.ready_processor_seconds:,.1f} | {peak:,.0f} | {size:,.0f} |"
        f" {server.ready_seconds:.2f} | {started:,.0f} | {server.megabytes():,.0f} |"
        f" {rates[0]:,.0f} | {rates[1]:,.0f} |",
        flush=True,
    )
    server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--passages", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--folder", type=Path, help="where files go; a temporary one if not set")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before\n")
    print(
        "| passages | corpus MB | index s | of processor | peak MB | index MB | start s | MB |"
        " MB after queries | queries/s, batch 1 | batch 64 |\n" + "|---" * 11 + "|"
    )
    for passages in options.passages:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            os.environ["ATOD_CACHE"] = folder
            measure(passages, Path(folder))


if __name__ == "__main__":
    main()
