"""The numbers of BM25 as Lucene 9 computes them: float32, with document lengths in one byte.

Sources: Lucene's `BM25Similarity` and `SmallFloat`. A term that occurs tf times in a document adds

    weight - weight / factor,   factor = 1 + tf / (k1 * (1 - b + b * length / average length))

where weight = idf * (how often the query has the term); every operation rounds to float32.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

MAX_FREQUENCY = (1 << 24) - 1
"""Larger term frequencies count as this one: float32 holds no more."""


def _decoded_lengths() -> NDArray[np.int64]:
    """The 256 lengths that one byte stands for: exact below 40, then 4 significant bits."""
    lengths = list(range(24))
    for code in range(256 - 24):
        bits, exponent = code & 7, (code >> 3) - 1
        lengths.append(24 + (bits if exponent < 0 else (bits | 8) << exponent))
    return np.array(lengths, dtype=np.int64)


DECODED_LENGTHS = _decoded_lengths()
"""int64 [256], ascending: what each byte stands for (`SmallFloat.byte4ToInt`)."""


def encoded_lengths(lengths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Document lengths in terms, rounded down to what a byte can stand for; same shape."""
    return (np.searchsorted(DECODED_LENGTHS, lengths, side="right") - 1).astype(np.uint8)


def idf(documents_with_term: int, documents: int) -> np.float32:
    """The inverse document frequency; documents without any term are not counted."""
    ratio = (documents - documents_with_term + 0.5) / (documents_with_term + 0.5)
    rounded: np.float32 = np.float32(math.log(1 + ratio))
    return rounded


def inverse_norms(k1: float, b: float, average_length: float) -> NDArray[np.float32]:
    """float32 [256]: 1 / (k1 * (1 - b + b * length / average length)) for every length byte."""
    one, k, part = np.float32(1), np.float32(k1), np.float32(b)
    lengths = DECODED_LENGTHS.astype(np.float32)
    norms: NDArray[np.float32] = k * ((one - part) + part * lengths / np.float32(average_length))
    with np.errstate(divide="ignore"):
        inverse: NDArray[np.float32] = one / norms
    return inverse


def factors(frequencies: NDArray[np.int64], norms: NDArray[np.float32]) -> NDArray[np.float32]:
    """The factor of the module's formula, from frequencies [n] and inverse norms [n]."""
    result: NDArray[np.float32] = np.float32(1) + frequencies.astype(np.float32) * norms
    return result
