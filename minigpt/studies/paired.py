"""Figures of runs: of two sides, paired seed by seed or round by round; their means; losses."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, median, quantiles

from minigpt.metrics.intervals import Estimate, mean, positive_mean


def differences(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """A - b of each pair."""
    return [x - y for x, y in zip(a, b, strict=True)]


def ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """a / b of each pair."""
    return [x / y for x, y in zip(a, b, strict=True)]


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over seeds; of one seed's value nothing is known about its spread."""
    if len(values) == 1:
        return Estimate(values[0], -math.inf, math.inf)
    return mean(values)


def variance_over_seeds(values: Sequence[float]) -> Estimate:
    """The mean of a variance over seeds, with an interval above 0."""
    if len(values) == 1:
        return Estimate(values[0], 0.0, math.inf)
    return positive_mean(values)


def last_tenth(losses: Sequence[float]) -> float:
    """The mean over the last tenth of the steps: the final loss of a run."""
    return fmean(losses[-max(1, len(losses) // 10) :])


def successive_variance(values: Sequence[float]) -> float:
    """The variance about a slow trend: half the mean square of successive differences (von Neumann
    1941).
    """
    return fmean((b - a) ** 2 for a, b in pairwise(values)) / 2


def middle_half(values: Sequence[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, _, high = quantiles(values, n=4)
    return median(values), low, high
