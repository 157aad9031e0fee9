"""Retrieve by meaning: exact search in the vectors of a sentence encoder, alone or with BM25.

The vectors of a corpus are in a .npy file: written once, mapped later. Encoding takes long, so
the file grows block by block under a temporary name, and an interrupted run is continued. The
final name depends on the corpus, and on the encoder with its settings.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from env_servers.new_folder import locked
from env_servers.retrieval.corpus import Corpus, Found, Retriever
from env_servers.retrieval.encoder import Encoder, EncoderError
from env_servers.retrieval.nearest import QUERIES_AT_ONCE, Matrix, NearestRows
from env_servers.text import well_formed

CONSTANT = 60
"""The k of reciprocal rank fusion, as in the paper."""
DEPTH = 10
"""Least number of best passages of each list that are fused."""
BLOCK = 2048
"""Number of passages that are encoded and written before the next ones are read."""
_FORMAT = 1
"""Raise it when vectors change, so that old files are not opened."""
_CHECKED_ROWS = 8
_LARGEST_DISTANCE = 0.05
"""Far above the effect of number formats and batches, about 0.01 for bfloat16."""
_DTYPE = np.dtype("<f2")


class DenseRetriever:
    """Rank all passages by the inner product of their vectors with the query's.

    A query's answer is independent of the other queries.

    Args:
        encoder: converts queries to vectors.
        vectors: those of the passages, [passages, dimension], rows of length 1.
    """

    name = "dense"
    efficient_queries = QUERIES_AT_ONCE

    def __init__(self, encoder: Encoder, vectors: Matrix) -> None:
        self._encoder = encoder
        self._nearest = NearestRows(vectors)
        about = {
            "encoder": encoder.name,
            "dimension": encoder.dimension,
            **asdict(encoder.settings),
        }
        # Arguments of the command line may contain bytes that are not UTF-8.
        self.settings: Mapping[str, object] = {
            name: well_formed(value) if isinstance(value, str) else value
            for name, value in about.items()
        }

    @classmethod
    def open(
        cls, corpus: Corpus, encoder: Encoder, folder: Path, vectors: Path | None
    ) -> DenseRetriever:
        """Use the given vectors, else those stored in a folder, which are made on first use.

        Raises:
            EncoderError: vectors are damaged, or do not belong to this corpus and encoder.
            OSError: the folder cannot be written.
        """
        if vectors is None:
            return cls(encoder, stored_vectors(corpus, encoder, folder))
        return cls(encoder, given_vectors(corpus, encoder, vectors))

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """Return the best `topk` passages for each query, best first; scores are inner products.

        Every query with a character other than spaces finds passages.
        """
        found = self._nearest.search(self._encoder.encode_queries(queries), topk)
        return [
            [Found(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]
            for rows, scores in found
        ]


class HybridRetriever:
    """Fuse the best lists of two retrievers by reciprocal ranks.

    The score of a passage is the sum of 1 / (60 + rank) over the lists that have it, ranks from 1
    (Cormack, Clarke and Buettcher, SIGIR 2009). Equal scores, which are frequent, keep the order of
    the first list, then that of the second. The best 10 of each are fused, or the best `topk` if
    that is more: up to 10, an answer is the beginning of every longer one.
    """

    name = "hybrid"
    efficient_queries = QUERIES_AT_ONCE

    def __init__(self, first: Retriever, second: Retriever) -> None:
        self._retrievers = (first, second)
        self.settings: Mapping[str, object] = {
            "constant": CONSTANT,
            "depth": DEPTH,
            first.name: dict(first.settings),
            second.name: dict(second.settings),
        }

    def search_many(self, queries: Sequence[str], topk: int) -> list[list[Found]]:
        """Return the best `topk` passages for each query, best first; scores are fused ones."""
        depth = max(DEPTH, topk)
        lists = [retriever.search_many(queries, depth) for retriever in self._retrievers]
        return [_fused(pair)[:topk] for pair in zip(*lists, strict=True)]


def _fused(lists: Sequence[Sequence[Found]]) -> list[Found]:
    scores: defaultdict[int, float] = defaultdict(float)
    for found in lists:
        for rank, (row, _) in enumerate(found, start=1):
            scores[row] += 1 / (CONSTANT + rank)
    # Sorting keeps the order in which rows first occurred.
    return [Found(*item) for item in sorted(scores.items(), key=lambda item: -item[1])]


def stored_vectors(corpus: Corpus, encoder: Encoder, folder: Path) -> Matrix:
    """Map the vectors float16 [passages, dimension] in a folder; make them if there are none.

    Raises:
        EncoderError: the stored vectors are damaged.
        OSError: the folder cannot be written.
    """
    key = f"{_FORMAT} {corpus.hash} {encoder.identity()}"
    path = folder / f"vectors-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with locked(path):
            # Another process may have made them during the wait.
            if not path.exists():
                partial = path.with_suffix(".partial")
                partial.touch()
                with partial.open("r+b") as file:
                    _continue(file, corpus, encoder)
                partial.rename(path)
    matrix = _mapped(path)
    if matrix.dtype != _DTYPE or matrix.shape != (len(corpus), encoder.dimension):
        raise EncoderError(f"the stored vectors {path} are damaged: delete this file")
    return matrix


def vectors_file(path: Path, encoder: Encoder) -> Matrix:
    """Map the vectors in a .npy file: float16 or float32 [passages, dimension].

    Raises:
        EncoderError: it is not one, or its rows differ in length from the encoder's vectors.
    """
    matrix = _mapped(path)
    if matrix.ndim != 2 or matrix.dtype not in (np.float16, np.float32):
        raise EncoderError(f"--vectors {path} must be a float16 or float32 matrix")
    if matrix.shape[1] != encoder.dimension:
        raise EncoderError(
            f"--vectors {path} has {matrix.shape[1]} numbers a row and the encoder {encoder.name}"
            f" makes {encoder.dimension}: give the encoder that made them"
        )
    return matrix


def given_vectors(corpus: Corpus, encoder: Encoder, path: Path) -> Matrix:
    """Map the user's vectors, after a check that they are this encoder's.

    Args:
        corpus: its passages are in the order of the rows.
        encoder: the encoder of the vectors.
        path: as in `vectors_file`; rows of length 1.

    Raises:
        EncoderError: they do not belong to the corpus or the encoder.
    """
    matrix = vectors_file(path, encoder)
    if len(matrix) != len(corpus):
        raise EncoderError(
            f"--vectors {path} has {len(matrix):,} rows and the corpus {len(corpus):,} passages:"
            " give the vectors of this corpus"
        )
    rows = np.unique(np.linspace(0, len(corpus) - 1, _CHECKED_ROWS).astype(int)).tolist()
    expected = encoder.encode_passages(corpus.contents(rows))
    distances = np.linalg.norm(matrix[rows].astype(np.float32) - expected, axis=1)
    for row, distance in zip(rows, distances.tolist(), strict=True):
        if not distance <= _LARGEST_DISTANCE:
            raise EncoderError(
                f"--vectors {path}: row {row} differs by {distance:.2f} from the vector that the"
                f" encoder {encoder.name} gives for passage {row}. Rows must be in the order of the"
                " corpus, of length 1, and made with the same encoder, --passage-prefix, --pooling"
                " and --max-length"
            )
    return matrix


def _continue(file: IO[bytes], corpus: Corpus, encoder: Encoder) -> None:
    """Write the missing part of a file that contains the first blocks, or nothing."""
    header = io.BytesIO()
    shape = (len(corpus), encoder.dimension)
    np.lib.format.write_array_header_1_0(
        header, {"descr": _DTYPE.str, "fortran_order": False, "shape": shape}
    )
    bytes_of_block = BLOCK * encoder.dimension * _DTYPE.itemsize
    blocks = max(0, file.seek(0, os.SEEK_END) - header.tell()) // bytes_of_block
    file.seek(0)
    file.write(header.getvalue())
    file.seek(blocks * bytes_of_block, os.SEEK_CUR)
    file.truncate()
    begins = range(blocks * BLOCK, len(corpus), BLOCK)
    # In a log one line a minute is enough.
    pause = 1 if sys.stderr.isatty() else 60
    with tqdm(
        desc="Encoding passages", total=len(corpus), initial=begins.start, unit=" passages",
        mininterval=pause,
    ) as progress:  # fmt: skip
        for begin in begins:
            rows = range(begin, min(begin + BLOCK, len(corpus)))
            vectors = encoder.encode_passages(corpus.contents(rows), progress.update)
            file.write(vectors.astype(_DTYPE).data)
            file.flush()
            os.fsync(file.fileno())


def _mapped(path: Path) -> Matrix:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise EncoderError(f"there is no file {path} with vectors") from None
    except (OSError, ValueError, EOFError) as error:
        raise EncoderError(f"{path} is not a .npy file with vectors ({error})") from error
