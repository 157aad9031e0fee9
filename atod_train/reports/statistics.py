"""Compute the interval of all results: a crossed bootstrap over seeds and tasks.

Success of a model is a matrix, replicates (seeds) x tasks. The interval of its mean is the
percentile interval of a crossed ("pigeonhole") bootstrap (Owen 2007, Annals of Applied Statistics
1, 386-411): rows and columns are resampled with replacement, independently of each other, so that
it includes both the spread between seeds and the choice of tasks. A difference of two models is the
matrix of their differences, paired by seed and task. Limits:

- With one replicate only tasks are resampled: the interval does not include the spread of seeds.
- With few replicates the spread between them is underestimated, on average by the factor
  (n - 1) / n in the variance, as in every bootstrap of n values.
- If all values are equal, the draws have no spread although n tasks cannot rule out a small
  rate. The interval then reaches `z^2 / (n + z^2)` from the value: the score bound (Wilson 1927)
  of a rate of 0 or n of n, and the bound of paired differences (Tango 1998) without any.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from atod_gym.errors import AtodError

DRAWS = 5000
CONFIDENCE = 0.95
_LARGE = 1000
"""From this number of tasks on, equal columns are drawn together, which is much faster."""


class InvalidCountsError(AtodError, ValueError):
    """Values that have no mean or interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean over replicates and tasks with its 95 % interval; shares, or differences of shares."""

    value: float
    low: float
    high: float
    replicates: int
    tasks: int


@lru_cache(maxsize=16)
def _counts(repeats: tuple[int, ...], axis: int, seed: int) -> NDArray[np.float64]:
    """Draw rows (axis 0) or columns (1), each present `repeats` times; counts [draws, size]."""
    rng = np.random.default_rng((seed, axis))
    total = sum(repeats)
    return rng.multinomial(total, np.array(repeats) / total, size=DRAWS).astype(np.float64)


def crossed_means(matrix: NDArray[np.float64], seed: int = 0) -> NDArray[np.float64]:
    """Return the means of a matrix with resampled rows and columns (Owen 2007).

    Args:
        matrix: [replicates, tasks]; with one row only columns are drawn.
        seed: of the draws; the same seed gives the same draws.

    Returns:
        [draws].
    """
    rows, columns = matrix.shape
    repeats = np.ones(columns, dtype=np.int64)
    if columns > _LARGE:
        matrix, repeats = np.unique(matrix, axis=1, return_counts=True)
    drawn_rows = _counts((1,) * rows, 0, seed)
    sums = _counts(tuple(repeats.tolist()), 1, seed) @ matrix.T
    means: NDArray[np.float64] = (sums * drawn_rows).sum(axis=1)
    return means / (rows * columns)


def estimate(matrix: NDArray[np.float64], lowest: float = 0.0) -> Estimate:
    """Return the mean of success rates with its interval.

    Args:
        matrix: [replicates, tasks].
        lowest: possible value of the mean: 0 for rates, -1 for differences; the highest is 1.

    Raises:
        InvalidCountsError: the matrix is empty.
    """
    if matrix.ndim != 2 or not matrix.size:
        raise InvalidCountsError("An interval needs at least one task.")
    low, high = _percentiles(crossed_means(matrix))
    value = float(matrix.mean())
    if matrix.min() == matrix.max():
        margin = _margin(matrix.shape[1])
        low, high = max(lowest, value - margin), min(1.0, value + margin)
    return Estimate(value, low, high, *matrix.shape)


def paired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate:
    """Return mean(first) - mean(second), both [replicates, tasks] of the same seeds and tasks."""
    return estimate(first - second, lowest=-1.0)


def unpaired_difference(first: NDArray[np.float64], second: NDArray[np.float64]) -> Estimate:
    """Return mean(first) - mean(second) of different tasks; `tasks` counts those of both."""
    one, two = estimate(first), estimate(second)
    low, high = _percentiles(crossed_means(first) - crossed_means(second, seed=1))
    value = one.value - two.value
    # At least as wide as the interval of each, which matters if one has no spread.
    low = min(low, value - max(one.value - one.low, two.high - two.value))
    high = max(high, value + max(one.high - one.value, two.value - two.low))
    replicates = min(one.replicates, two.replicates)
    return Estimate(value, max(-1.0, low), min(1.0, high), replicates, one.tasks + two.tasks)


def _percentiles(draws: NDArray[np.float64]) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(draws, [tail, 100 - tail])
    return float(low), float(high)


def _margin(tasks: int) -> float:
    """Return the largest distance of the mean of n equal values from them: z^2 / (n + z^2)."""
    squared = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2) ** 2
    return squared / (tasks + squared)
