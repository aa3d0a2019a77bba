"""Numbers with their uncertainty: perplexity, shares, means over seeds and over rows.

    perplexity = exp(loss)                                                 loss in nats a token

    share p of a population, k of n drawn; with p' = k / n, z the normal quantile (Wilson 1927):
        (p' + z^2 / 2n  +-  z sqrt(p' (1 - p') / n + z^2 / 4n^2)) / (1 + z^2 / n)

    difference of two shares with intervals [l, u] (Newcombe 1998, method 10):
        p_1 - p_2  -  sqrt((p_1 - l_1)^2 + (u_2 - p_2)^2),    and + with l and u exchanged

    mean of n runs with standard deviation s, t the quantile of n - 1 degrees of freedom (Student
    1908):      mean  +-  t s / sqrt(n)

    mean of n variances, or of what else is positive: the same on the scale of logarithms, where
    the standard error is s / (mean sqrt(n)) (delta method; Miller 1968 for variances):
                mean exp(+-t s / (mean sqrt(n)))

    mean of n rows of any distribution, such as scores that pile up at 0 and 1: draw n of the rows
    with replacement, 1,000 times; the interval is from the 2.5th to the 97.5th percentile of the
    means (Efron and Tibshirani 1993, chapter 13)

All intervals are two-sided 95 % confidence intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

import numpy as np

Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def perplexity(loss: float) -> float:
    """exp(loss); infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def share(k: int, n: int) -> Estimate:
    """The share k / n with Wilson's interval, which stays in [0, 1] and is wide at k = 0, n too.

    Raises:
        ValueError: n is not positive, or k lies outside [0, n].
    """
    if n < 1:
        raise ValueError(f"n is {n}, must be at least 1")
    if not 0 <= k <= n:
        raise ValueError(f"k is {k}, must lie in [0, {n}]")
    p = k / n
    # (p' + z^2 / 2n  +-  z sqrt(p' (1 - p') / n + z^2 / 4n^2)) / (1 + z^2 / n)
    scale = 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / scale
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / scale
    low = 0.0 if k == 0 else centre - half  # exactly: their difference is rounding
    high = 1.0 if k == n else centre + half
    return Estimate(p, low, high)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """The difference first - second of two independent shares."""
    # p_1 - p_2  -  sqrt((p_1 - l_1)^2 + (u_2 - p_2)^2)
    middle = first.value - second.value
    below = math.hypot(first.value - first.low, second.high - second.value)
    above = math.hypot(first.high - first.value, second.value - second.low)
    return Estimate(middle, middle - below, middle + above)


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent runs, such as seeds, with Student's interval.

    Raises:
        ValueError: fewer than two values, from which no spread can be known.
    """
    from scipy.stats import t

    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values, at least 2 are needed for an interval")
    middle = fmean(values)
    # mean +- t s / sqrt(n)
    half = float(t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Estimate(middle, middle - half, middle + half)


def positive_mean(values: Sequence[float]) -> Estimate:
    """The mean of variances, with an interval on the scale of logarithms: it stays above 0.

    Single values may be negative, as the jackknife's are.

    Raises:
        ValueError: fewer than two values, or a mean below 0.
    """
    plain = mean(values)
    if plain.value < 0:
        raise ValueError(f"the mean is {plain.value}, must not be below 0")
    if plain.value == 0:
        return plain
    # mean exp(+-t s / (mean sqrt(n)))
    factor = math.exp((plain.high - plain.value) / plain.value)
    return Estimate(plain.value, plain.value / factor, plain.value * factor)


def bootstrap(values: Sequence[float], seed: int, resamples: int = 1000) -> Estimate:
    """The mean of rows with its percentile interval; the same seed gives the same interval.

    Raises:
        ValueError: there is no value, or no resample is asked for.
    """
    n = len(values)
    if n < 1:
        raise ValueError("there is no value to take the mean of")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}, must be at least 1")
    random, rows = np.random.default_rng(seed), np.asarray(values, dtype=np.float64)
    means = [rows[random.integers(n, size=n)].mean() for _ in range(resamples)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(fmean(values), float(low), float(high))
