"""Search a matrix exactly for the rows with the largest inner product with a vector.

A first pass in float32 (FAISS if installed, else numpy) returns every row that could be among
the best but for rounding; these few are computed again in float64. The answer therefore depends
neither on FAISS nor on the other vectors: it is the best rows by the inner product rounded to
float32, equal ones in row order.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
from numpy.typing import NDArray

QUERIES_AT_ONCE = 64
BLOCK_NUMBERS = 1 << 22
"""Numbers of the matrix that are converted to float32 at a time: 16 MiB."""
KEPT_NUMBERS = 1 << 26
"""A matrix up to this size is kept as float32: 256 MiB."""
_EXTRA = 8

Matrix = NDArray[np.float16] | NDArray[np.float32]
Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class NearestRows:
    """Searches a matrix; thread-safe.

    Args:
        matrix: float16 or float32 [rows, dimension], may be memory-mapped; rows of length 1.
        with_faiss: whether to use FAISS, which keeps a copy in memory; None: if installed.
    """

    def __init__(self, matrix: Matrix, *, with_faiss: bool | None = None) -> None:
        self._matrix = matrix
        # The error of a float32 sum of d products is at most about d / 2**24 of the vectors'
        # lengths (Higham, Accuracy and Stability of Numerical Algorithms, 3.1); here twice for two
        # sums that are compared, and doubled as a safety margin.
        self._margin = 4 * (matrix.shape[1] + 2) / 2**24
        if with_faiss is None:
            with_faiss = importlib.util.find_spec("faiss") is not None
        self._first = _faiss_index(matrix) if with_faiss else _Blocks(matrix)

    def search(self, queries: Floats, topk: int) -> list[tuple[Rows, Floats]]:
        """Return the best rows [k] and their inner products [k] for each query, best first.

        Args:
            queries: [queries, dimension], of length 1.
            topk: maximum number of rows for a query, at least 1.
        """
        topk = min(topk, len(self._matrix))
        found = []
        for begin in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[begin : begin + QUERIES_AT_ONCE]
            for query, rows in zip(part, self._candidates(part, topk), strict=True):
                # Not a matrix product: its sums depend on the number of rows.
                products = self._matrix[rows].astype(np.float64) * query.astype(np.float64)
                scores = products.sum(axis=1).astype(np.float32)
                best = np.lexsort((rows, -scores))[:topk]
                found.append((rows[best], scores[best]))
        return found

    def _candidates(self, queries: Floats, topk: int) -> Rows:
        """Return at least all rows within the margin of the `topk`-th best [queries, n]."""
        count = topk
        while True:
            count = min(count + _EXTRA, len(self._matrix))
            scores, rows = self._first.search(queries, count)
            limits = scores[:, topk - 1] - self._margin
            if count == len(self._matrix) or (scores[:, -1] < limits).all():
                return rows
            count *= 2


class _Blocks:
    """The first pass with numpy, with the interface of FAISS."""

    def __init__(self, matrix: Matrix) -> None:
        self._size = max(1, BLOCK_NUMBERS // matrix.shape[1])
        # Converting it to float32 takes longer than a search of one query.
        self._matrix = matrix.astype(np.float32) if matrix.size <= KEPT_NUMBERS else matrix

    def search(self, queries: Floats, count: int) -> tuple[Floats, Rows]:
        """Return the `count` largest products and their rows [queries, count], best first."""
        parts: list[tuple[Floats, Rows]] = []
        for begin in range(0, len(self._matrix), self._size):
            block = self._matrix[begin : begin + self._size].astype(np.float32, copy=False)
            products = queries @ block.T
            # Faster than sorting the whole block.
            number = min(count, len(block))
            near = np.argpartition(products, -number, axis=1)[:, -number:]
            parts.append((np.take_along_axis(products, near, axis=1), near + begin))
        scores, rows = (np.concatenate(column, axis=1) for column in zip(*parts, strict=True))
        order = np.argsort(-scores, axis=1)[:, :count]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _faiss_index(matrix: Matrix) -> Any:
    """Return a FAISS index with a copy of the matrix."""
    import faiss

    dimension = matrix.shape[1]
    index: Any = faiss.IndexFlatIP(dimension)
    if matrix.dtype == np.float16:
        # Exact too, in half the memory of a flat index and faster.
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexScalarQuantizer(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    size = max(1, BLOCK_NUMBERS // dimension)
    for begin in range(0, len(matrix), size):
        index.add(matrix[begin : begin + size].astype(np.float32))
    return index
