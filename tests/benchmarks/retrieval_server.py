"""Load on the retrieval server: queries per second, latency, memory, with clients of their own.

    python tests/benchmarks/retrieval_server.py --data <data folder>
    python tests/benchmarks/retrieval_server.py --data <data folder> --other http://127.0.0.1:8001
    python tests/benchmarks/retrieval_server.py --data <data folder> -- --retriever dense ...

The passages and the questions of `<data folder>/searchqa`, three passages a query, with scores.
One client process posts batches of 1, 8 and 64 queries over one open connection, each for some
seconds, and reads the answers; then 16 client processes post single queries at the same time.
Latencies are those of requests as the client sees them. `--other` measures any server that speaks
the same dialect in turns with ours, line by line. What follows `--` goes to our server.
The processor time of the server per query depends less on what else the machine does than the
queries per second do.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from bm25_search import read_lines
from measured_server import Figures, Load, MeasuredServer, poster, run_clients


def search(
    url: str, questions: list[str], batch: int, seconds: float, start: Any, out: Any
) -> None:
    """A client process."""
    post = poster(url)
    load = Load()
    place = os.getpid() % len(questions)
    start.wait()
    begun = time.perf_counter()
    while (now := time.perf_counter()) < begun + seconds:
        place = (place + batch) % len(questions)
        queries = (questions * 2)[place : place + batch] if batch > 1 else [questions[place]]
        reply = post("/retrieve", {"queries": queries, "topk": 3, "return_scores": True})
        load.latencies.append(time.perf_counter() - now)
        if len(reply["result"]) != batch:
            raise SystemExit("an answer has another length than the request")
        load.count += batch
    load.seconds = time.perf_counter() - begun
    out.put(load)


def report(
    server: MeasuredServer,
    options: argparse.Namespace,
    questions: list[str],
    clients: int,
    batch: int,
) -> None:
    """One line of the table."""

    def figures(url: str, measured: MeasuredServer | None) -> Figures:
        call = (url, questions, batch, options.seconds)
        return run_clients(search, [call] * clients, measured)

    own = figures(server.url, server)
    line = (
        f"| {clients} | {batch} | {own.rate:,.0f} | {own.p50:.2f} | {own.p99:.2f} |"
        f" {own.server_microseconds:.0f} | {server.megabytes():.0f} |"
    )
    if options.other:
        other = figures(options.other, None)
        line += f" {other.rate:,.0f} | {other.p50:.2f} | {other.p99:.2f} |"
        line += f" {own.rate / other.rate:.1f} |"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with searchqa/")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each line of the table")
    parser.add_argument("--clients", type=int, default=16, help="of the last line")
    parser.add_argument(
        "--other", metavar="URL", help="another server, measured in turns with ours"
    )
    parser.add_argument("server", nargs="*", help="further arguments of the server, after --")
    options = parser.parse_args()
    records = read_lines(options.data / "searchqa/golden/retrieval.jsonl.xz")
    questions = [record["question"] for record in records]
    corpus = str(options.data / "searchqa/corpus.jsonl.xz")
    server = MeasuredServer(["retrieval", "--corpus", corpus, *options.server])
    columns = ["clients", "batch", "queries/s", "p50 ms", "p99 ms", "server us/query", "server MB"]
    if options.other:
        columns += ["other queries/s", "its p50 ms", "its p99 ms", "ratio"]
    try:
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before:"
            f" ready in {server.ready_seconds:.2f} s ({server.ready_processor_seconds:.2f} s of"
            f" processor time) with {server.megabytes():.0f} MB\n"
        )
        print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
        for clients, batch in ((1, 1), (1, 8), (1, 64), (options.clients, 1)):
            report(server, options, questions, clients, batch)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
