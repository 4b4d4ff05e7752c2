"""Per-row scores and what they say with how much certainty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import numpy as np

_RESAMPLES: Final = 10_000
_CONFIDENCE: Final = 0.95


def exact_match(answer: str, reference: str) -> float:
    """1.0 if the answer is the reference: as text without outer white space, or as JSON value."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return 1.0
    try:
        return float(_canonical(answer) == _canonical(reference))
    except (ValueError, RecursionError):
        return 0.0


def _canonical(text: str) -> str:
    # as text, since Python takes true for 1 and 1 for 1.0
    return json.dumps(json.loads(text), sort_keys=True)


def bootstrap_interval(scores: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean (Efron & Tibshirani 1993, section 13.3).

    For paired comparisons pass the row-wise differences.

    Args:
        scores: one value a row.
        seed: of the resampling, so that a report can be made again.
    """
    values = np.asarray(scores, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # in pieces, so that a million rows need no matrix of resamples x rows
    means = np.empty(_RESAMPLES)
    piece = max(1, min(_RESAMPLES, 10_000_000 // len(values)))
    for start in range(0, _RESAMPLES, piece):
        size = min(piece, _RESAMPLES - start)
        drawn = rng.integers(0, len(values), size=(size, len(values)))
        means[start : start + size] = values[drawn].mean(axis=1)
    tail = (1 - _CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)
