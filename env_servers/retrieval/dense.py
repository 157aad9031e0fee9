"""Finds passages by their meaning: exact search among the vectors of a sentence encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from env_servers.retrieval.corpus import Corpus
from env_servers.retrieval.encoder import Encoder
from env_servers.retrieval.nearest import Matrix, NearestRows
from env_servers.retrieval.retrievers import Found
from env_servers.retrieval.vectors import encoded_corpus, given_vectors, stored_vectors


class DenseRetriever:
    """Ranks all passages by the inner product of their vectors with the query's.

    A query's answer does not depend on the queries that come with it.

    Args:
        encoder: turns queries into vectors.
        vectors: those of the passages, [passages, dimension], rows of length 1.
    """

    name = "dense"

    def __init__(self, encoder: Encoder, vectors: Matrix) -> None:
        self._encoder = encoder
        self._nearest = NearestRows(vectors)
        self.settings: Mapping[str, object] = {
            "encoder": encoder.name,
            "dimension": encoder.dimension,
            **asdict(encoder.settings),
        }

    @classmethod
    def build_or_open(
        cls, corpus: Corpus, encoder: Encoder, folder: Path | None, vectors: Path | None
    ) -> DenseRetriever:
        """Encodes the passages, unless their vectors are there.

        Args:
            corpus: the passages.
            encoder: turns them into vectors.
            folder: where vectors are stored for later starts; in memory if None.
            vectors: a .npy file with the passages' vectors, in the order of the corpus.

        Raises:
            EncoderError: vectors are damaged, or are not those of this corpus and encoder.
            OSError: the folder cannot be written.
        """
        if vectors is not None:
            return cls(encoder, given_vectors(corpus, encoder, vectors))
        if folder is not None:
            return cls(encoder, stored_vectors(corpus, encoder, folder))
        return cls(encoder, encoded_corpus(corpus, encoder))

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """The best `topk` passages for each query, best first; scores are inner products.

        Any query finds passages, since every text has a meaning to an encoder.
        """
        found = self._nearest.search(self._encoder.encode_queries(queries), topk)
        return [
            [Found(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]
            for rows, scores in found
        ]
