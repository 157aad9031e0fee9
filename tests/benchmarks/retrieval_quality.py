"""Measure how often retrieval finds the answer: hit@3 and hit@10 of BM25, dense and hybrid.

    python tests/benchmarks/retrieval_quality.py --data <data folder>

A question counts as a hit when a gold answer stands in one of the best passages, in lower case; in
brackets: its words stand there in a row after SQuAD normalisation. Intervals are Wilson's at 95 %.
The corpus is indexed in a temporary folder; its vectors are those of the data folder, which the
encoder `minilm` made, unless another encoder is named (then they are made first, which takes long,
and kept in the cache folder). Queries per second are of the processor, 64 at once.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import string
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bm25_search import read_lines

from env_servers.retrieval.bm25 import BM25Retriever, index_cache, index_file
from env_servers.retrieval.corpus import Found, Retriever
from env_servers.retrieval.dense import DenseRetriever, HybridRetriever
from env_servers.retrieval.encoder import Encoder
from env_servers.retrieval.settings import EncoderSettings

SETS = ("nq_subset", "popqa_subset", "2wiki_in_corpus", "hotpot_dev100")
DEPTHS = (3, 10)
QUERIES_AT_ONCE = 64


class Share(NamedTuple):
    """Hits among a number of questions."""

    hits: int
    questions: int

    def __str__(self) -> str:
        return f"{self.hits / self.questions:.3f}"

    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %."""
        z, n, share = 1.959964, self.questions, self.hits / self.questions
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return middle - half, middle + half


def normalised(text: str) -> str:
    """SQuAD's normalisation, with a blank at both ends, so that whole words can be looked for."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    words = re.sub(r"\b(a|an|the)\b", " ", kept).split()
    return f" {' '.join(words)} "


def is_substring(answers: Sequence[str], passages: Sequence[str]) -> bool:
    """Return whether a passage contains an answer, in lower case."""
    return any(answer.lower() in passage.lower() for answer in answers for passage in passages)


def is_whole_words(answers: Sequence[str], passages: Sequence[str]) -> bool:
    """Return whether a passage contains an answer's words in a row."""
    words = [normalised(answer) for answer in answers]
    return any(answer in normalised(passage) for passage in passages for answer in words)


def search(retriever: Retriever, queries: Sequence[str]) -> list[list[Found]]:
    """The best passages for each query."""
    found = []
    for begin in range(0, len(queries), QUERIES_AT_ONCE):
        found += retriever.search_many(queries[begin : begin + QUERIES_AT_ONCE], max(DEPTHS))
    return found


def report_golden(records: Sequence[Mapping[str, Any]], answers: Mapping[str, list[int]]) -> None:
    """Prints how far the rankings by meaning agree with the recorded ones."""
    first = same = overlap = 0
    for record in records:
        recorded, rows = record["dense_top10"], answers[record["question"]]
        first += rows[0] == recorded[0]
        same += rows == recorded
        overlap += len(set(rows) & set(recorded))
    count = len(records)
    print(
        f"\nDense against {count:,} recorded rankings: same first {first / count:.2%}, same ten in"
        f" the same order {same / count:.2%}, overlap of the ten {overlap / count / 10:.2%}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with searchqa/")
    parser.add_argument("--encoder", default="minilm")
    parser.add_argument("--query-prefix", default="")
    parser.add_argument("--passage-prefix", default="")
    parser.add_argument("--pooling", default="mean")
    options = parser.parse_args()
    data = options.data / "searchqa"
    prefixes = options.query_prefix, options.passage_prefix
    encoder = Encoder.load(options.encoder, EncoderSettings(*prefixes, options.pooling))
    vectors = data / "corpus_minilm_fp16.npy" if options.encoder == "minilm" else None
    with tempfile.TemporaryDirectory() as folder:
        indexed = index_file(data / "corpus.jsonl.xz", 0.9, 0.4, Path(folder) / "index")
        by_words = BM25Retriever(indexed.bm25)
        by_meaning = DenseRetriever.open(
            indexed.corpus, encoder, index_cache() / "vectors", vectors
        )
        retrievers = (by_words, by_meaning, HybridRetriever(by_words, by_meaning))
        print("| questions | retriever | hit@3 | 95 % | hit@10 | 95 % | queries/s |")
        print("|---|---|---|---|---|---|---|")
        rankings: dict[str, list[int]] = {}
        for name in SETS:
            lines = (data / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            questions = [json.loads(line) for line in lines]
            queries = [question["question"] for question in questions]
            for retriever in retrievers:
                begun = time.process_time()
                found = search(retriever, queries)
                pace = len(questions) / (time.process_time() - begun)
                cells = [f"{name} ({len(questions):,})", retriever.name]
                for depth in DEPTHS:
                    pairs = [
                        (
                            question["golden_answers"],
                            indexed.corpus.contents([one.row for one in best[:depth]]),
                        )
                        for question, best in zip(questions, found, strict=True)
                    ]
                    hits, whole = (
                        Share(sum(test(*pair) for pair in pairs), len(pairs))
                        for test in (is_substring, is_whole_words)
                    )
                    low, high = hits.interval()
                    cells += [f"{hits} ({whole})", f"{low:.3f}-{high:.3f}"]
                print(f"| {' | '.join(cells)} | {pace:,.0f} |", flush=True)
                if retriever is by_meaning:
                    for query, best in zip(queries, found, strict=True):
                        rankings[query] = [one.row for one in best]
    if vectors is not None:
        records = read_lines(data / "golden/retrieval.jsonl.xz")
        report_golden([record for record in records if record["question"] in rankings], rankings)


if __name__ == "__main__":
    main()
