"""Weighted quantiles of durations, in bins of a logarithm."""

from __future__ import annotations

import numpy as np

from paceline.autoscaling.simulate.profile import Array

LEAST = 1e-4
PER_DECADE = 40
BINS = 10 * PER_DECADE
"""From 0.1 ms to 1e6 s, 6% wide."""


def binned(values: Array, weights: Array) -> Array:
    """Weights by bin."""
    place = np.log10(np.maximum(values, LEAST) / LEAST) * PER_DECADE
    return np.bincount(np.minimum(place, BINS - 1).astype(np.int64), weights, BINS).astype(np.float64, copy=False)


def quantile(histogram: Array, q: float) -> float | None:
    """Within a bin the logarithm is spread evenly; None if there is nothing."""
    sums = np.cumsum(histogram)
    if sums[-1] <= 0:
        return None
    bin_ = int(np.searchsorted(sums, q * sums[-1]))
    before = sums[bin_ - 1] if bin_ else 0.0
    inside = (q * sums[-1] - before) / histogram[bin_] if histogram[bin_] else 0.0
    return float(LEAST * 10 ** ((bin_ + inside) / PER_DECADE))


def mean(histogram: Array) -> float | None:
    total = histogram.sum()
    middles = LEAST * 10 ** ((np.arange(BINS) + 0.5) / PER_DECADE)
    return float((histogram * middles).sum() / total) if total else None
