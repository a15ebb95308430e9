"""Means over seeds with their 95 % intervals, and differences between rows by equal seeds. Needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

LEVEL = 0.95
"""Probability of the intervals."""
RESAMPLES = 1000
"""How often `resample_deviations` draws anew."""


def summarize_seeds(values: Sequence[float]) -> dict[str, Any]:
    """{"values", "mean", "deviation", "interval"}: the sample deviation is 0 for a single value; the interval, of the
    mean by Student's t, is there for two values or more, if they are finite."""
    mean, deviation = statistics.fmean(values), 0.0
    finite = all(map(math.isfinite, values))
    if len(values) > 1:
        deviation = statistics.stdev(values) if finite else math.nan
    summary = {"values": list(values), "mean": mean, "deviation": deviation}
    if len(values) > 1 and finite:
        half = compute_t_quantile(len(values) - 1) * deviation / math.sqrt(len(values))
        summary["interval"] = [mean - half, mean + half]
    return summary


def summarize_differences(values: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """The summary of `values` less `reference`, seed by seed: what seeds have in common cancels out."""
    return summarize_seeds([value - other for value, other in zip(values, reference, strict=True)])


def resample_deviations(values_NM: np.ndarray) -> np.ndarray:
    """The standard deviations of the means of columns, (M,), by the bootstrap: over RESAMPLES draws of the N rows with
    replacement, of a fixed seed."""
    rng, count = np.random.default_rng(0), len(values_NM)
    means = [values_NM[rng.integers(count, size=count)].mean(axis=0) for _ in range(RESAMPLES)]
    return np.std(means, axis=0, ddof=1)


def compute_t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t within which Student's distribution with `freedom` degrees, 1 or more, has the probability `level`."""
    low, high = 0.0, 1.0
    while _compute_t_probability(high, freedom) < level:
        low, high = high, 2 * high
    for _ in range(60):  # each halves the error
        middle = (low + high) / 2
        low, high = (middle, high) if _compute_t_probability(middle, freedom) < level else (low, middle)
    return (low + high) / 2


def _compute_t_probability(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term = math.cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
