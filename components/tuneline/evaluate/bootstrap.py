"""Percentile bootstrap of means over rows, paired by construction.

All columns (metrics x models) are resampled with the same rows, so that the difference of two
columns, resample by resample, is the paired one (Efron & Tibshirani 1993, sections 13.3 and 16.4).
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
_PIECE: Final = 4_000_000
"""Row counts held at once, 8 bytes each, so that a million rows need no matrix of all resamples."""

Array = NDArray[np.float64]


def resampled_means(values: Array, weights: Array, *, seed: int = 0) -> Array:
    """Weighted mean of each column in each resample: sum(w x) / sum(w) over the drawn rows.

    Args:
        values: (n, k) scores, finite.
        weights: (n, k), at least 0; 1 for plain means, the number of tokens for means over tokens,
            0 where a row has no score.
        seed: of the resampling, so that a report can be made again.

    Returns:
        (RESAMPLES, k) means; NaN where a resample drew no row with weight.
    """
    rows, columns = values.shape
    rng = np.random.default_rng(seed)
    stacked = np.concatenate([values * weights, weights], axis=1)
    means = np.empty((RESAMPLES, columns))
    piece = max(1, min(RESAMPLES, _PIECE // max(rows, 1)))
    for start in range(0, RESAMPLES, piece):
        size = min(piece, RESAMPLES - start)
        drawn = rng.integers(0, rows, size=(size, rows))
        drawn += np.arange(size)[:, None] * rows
        counts = np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)
        sums = counts.astype(np.float64) @ stacked
        with np.errstate(invalid="ignore", divide="ignore"):
            means[start : start + size] = sums[:, :columns] / sums[:, columns:]
    return means


def weighted_mean(values: Array, weights: Array) -> float:
    """sum(w x) / sum(w); NaN without weight."""
    total = float(weights.sum())
    return float((values * weights).sum()) / total if total else float("nan")


def interval(resamples: Array) -> tuple[float, float]:
    """The 95 % percentile interval of (RESAMPLES,) values; NaNs are left out."""
    kept = resamples[~np.isnan(resamples)]
    if not len(kept):
        return float("nan"), float("nan")
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(kept, [tail, 1 - tail])
    return float(low), float(high)
