"""Numbers with their uncertainty: perplexity, shares, means over seeds.

    perplexity = exp(loss)                                                 loss in nats a token

    share p of a population, k of n drawn; with p' = k / n, z the normal quantile (Wilson 1927):
        (p' + z^2 / 2n  +-  z sqrt(p' (1 - p') / n + z^2 / 4n^2)) / (1 + z^2 / n)

    difference of two shares with intervals [l, u] (Newcombe 1998, method 10):
        p_1 - p_2  -  sqrt((p_1 - l_1)^2 + (u_2 - p_2)^2),    and + with l and u exchanged

    mean of n runs with standard deviation s, t the quantile of n - 1 degrees of freedom (Student
    1908):      mean  +-  t s / sqrt(n)

All intervals are two-sided 95 % confidence intervals.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)
# Student's 0.975 quantiles of 1, 2, ... degrees of freedom
T = (
    *(12.70620, 4.30265, 3.18245, 2.77645, 2.57058, 2.44691, 2.36462, 2.30600, 2.26216, 2.22814),
    *(2.20099, 2.17881, 2.16037, 2.14479, 2.13145, 2.11991, 2.10982, 2.10092, 2.09302, 2.08596),
    *(2.07961, 2.07387, 2.06866, 2.06390, 2.05954, 2.05553, 2.05183, 2.04841, 2.04523, 2.04227),
)


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
    n = len(values)
    if n < 2:
        raise ValueError(f"{n} values, at least 2 are needed for an interval")
    middle = fmean(values)
    # mean +- t s / sqrt(n)
    half = student(n - 1) * stdev(values) / math.sqrt(n)
    return Estimate(middle, middle - half, middle + half)


def student(freedom: int) -> float:
    """The 0.975 quantile of Student's t; beyond the table by its expansion about the normal one
    (Abramowitz and Stegun 26.7.5), to four decimals.
    """
    if freedom < 1:
        raise ValueError(f"freedom is {freedom}, must be at least 1")
    if freedom <= len(T):
        return T[freedom - 1]
    first = (Z**3 + Z) / 4
    second = (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + first / freedom + second / freedom**2
