"""Estimates against published values, the equations that define them, and integrals by hand."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom

from minigpt import Tokenizer
from minigpt.data.text import read_text
from minigpt.metrics.intervals import (
    Estimate,
    bootstrap,
    difference,
    mean,
    perplexity,
    positive_mean,
    share,
)
from minigpt.metrics.popular_tokens import longer_than, popular_share, popular_tokens
from tests.conftest import real_data

NEWCOMBE = {  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    (81, 263): (0.2553, 0.3662),
    (15, 148): (0.0624, 0.1605),
    (0, 20): (0.0, 0.1611),
    (1, 29): (0.0061, 0.1718),
}


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert perplexity(-math.log(1 / 50257)) == pytest.approx(50257)
    assert perplexity(0.0) == 1.0
    assert perplexity(1e4) == math.inf


@pytest.mark.parametrize("counts", NEWCOMBE, ids=str)
def test_share_has_the_published_interval(counts: tuple[int, int]) -> None:
    estimate = share(*counts)
    assert estimate.value == counts[0] / counts[1]
    assert (estimate.low, estimate.high) == pytest.approx(NEWCOMBE[counts], abs=5e-5)


@pytest.mark.parametrize(("k", "n"), [(1, 2), (3, 7), (470, 1000), (999, 1000), (1, 10**6)])
def test_the_ends_of_a_share_are_just_rejected_by_the_score_test(k: int, n: int) -> None:
    estimate = share(k, n)
    for end in (estimate.low, estimate.high):
        z = abs(k / n - end) / math.sqrt(end * (1 - end) / n)
        assert z == pytest.approx(1.959963984540054, rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 30, 12345])
def test_a_share_of_none_or_all_mirrors(n: int) -> None:
    none, every = share(0, n), share(n, n)
    assert none.value == none.low == 0.0
    assert every.value == every.high == 1.0
    # (1 - p)^(1/2) = z (p / n)^(1/2) at k = n
    assert none.high == pytest.approx(1 - every.low) == pytest.approx(1 / (1 + n / 3.841458821))


def test_the_interval_of_a_share_holds_the_truth_as_often_as_it_says() -> None:
    """Exactly, by summing the binomial: over many p, near 95 % on the average."""
    n = 60
    intervals = [share(k, n) for k in range(n + 1)]
    held = []
    for step in range(1, 400):
        p = step / 400
        held.append(
            sum(
                math.comb(n, k) * p**k * (1 - p) ** (n - k)
                for k, i in enumerate(intervals)
                if i.low <= p <= i.high
            )
        )
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.01)
    assert min(held) > 0.83


@pytest.mark.parametrize(("k", "n", "reason"), [(0, 0, "n is 0"), (5, 4, "k is 5"), (-1, 4, "k")])
def test_an_impossible_share_is_an_error(k: int, n: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        share(k, n)


def student_mass(t: float, freedom: int) -> float:
    """Probability of (-t, t) by Simpson's rule over the density."""
    c = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    scale = math.exp(c) / math.sqrt(freedom * math.pi)
    steps = 4000
    h = t / steps
    heights = [(1 + (i * h) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    total = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    return 2 * scale * h / 3 * total


@pytest.mark.parametrize("n", [2, 3, 5, 31, 32, 60, 1000])
def test_the_interval_of_a_mean_is_students(n: int) -> None:
    values = [math.sin(3 * i) for i in range(n)]
    estimate = mean(values)
    middle = sum(values) / n
    error = math.sqrt(sum((x - middle) ** 2 for x in values) / (n - 1) / n)
    assert estimate.value == pytest.approx(middle)
    assert estimate.high - middle == pytest.approx(middle - estimate.low)
    t = (estimate.high - middle) / error
    assert student_mass(t, n - 1) == pytest.approx(0.95, abs=1e-7)


def test_the_interval_of_a_variance_is_above_zero() -> None:
    values = [0.1, 0.2, 2.4]
    estimate, plain = positive_mean(values), mean(values)
    assert plain.low < 0 < estimate.low < estimate.value == plain.value < estimate.high
    # log of the mean +- t times the standard error of that log, by the derivative
    t = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    error = math.sqrt((0.8**2 + 0.7**2 + 1.5**2) / 2) / math.sqrt(3) / 0.9
    ends = [math.log(estimate.low), math.log(estimate.high)]
    assert ends == pytest.approx([math.log(0.9) - t * error, math.log(0.9) + t * error])
    # an interval that is narrow is the plain one
    narrow, usual = positive_mean([1.0, 1.0001]), mean([1.0, 1.0001])
    assert (narrow.low, narrow.high) == pytest.approx((usual.low, usual.high), abs=1e-6)


def test_the_interval_of_a_variance_holds_the_truth_nearly_as_often_as_it_says() -> None:
    """Variances of normal samples of 20, five of them, 4000 times."""
    random = np.random.default_rng(0)
    samples = random.normal(size=(4000, 5, 20)).var(axis=2, ddof=1)
    held = [e.low <= 1 <= e.high for e in map(positive_mean, samples.tolist())]
    assert sum(held) / len(held) == pytest.approx(0.95, abs=0.02)


def test_variances_that_are_zero_or_have_a_negative_mean() -> None:
    assert positive_mean([0.0, 0.0]) == Estimate(0.0, 0.0, 0.0)
    assert positive_mean([-1.0, 4.0]).low > 0
    with pytest.raises(ValueError, match=r"the mean is -0\.5, must not be below 0"):
        positive_mean([-2.0, 1.0])
    with pytest.raises(ValueError, match="1 values, at least 2"):
        positive_mean([1.0])


def test_mean_over_seeds() -> None:
    estimate = mean([4.0, 6.0, 11.0])
    half = 4.302653 * math.sqrt(((-3) ** 2 + (-1) ** 2 + 4**2) / 2) / math.sqrt(3)
    assert estimate.value == 7.0
    assert (estimate.low, estimate.high) == pytest.approx((7 - half, 7 + half), abs=1e-4)
    assert mean([2.5, 2.5]) == Estimate(2.5, 2.5, 2.5)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_one_run_has_no_interval(values: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{len(values)} values, at least 2"):
        mean(values)


@pytest.mark.parametrize(("k", "n"), [(30, 100), (3, 50), (150, 160)])
def test_the_bootstrap_of_ones_and_zeros_is_binomial(k: int, n: int) -> None:
    """The sum of n rows drawn with replacement is, so the percentiles are known."""
    rows = [1.0] * k + [0.0] * (n - k)
    for seed in range(5):
        estimate = bootstrap(rows, seed, resamples=4000)
        assert estimate.value == k / n
        for end, level in ((estimate.low, 0.025), (estimate.high, 0.975)):
            # within what 4000 draws tell of a percentile, four standard errors
            spread = 4 * math.sqrt(level * (1 - level) / 4000)
            low, high = (binom.ppf(level + sign * spread, n, k / n) for sign in (-1, 1))
            assert low - 1e-9 <= end * n <= high + 1e-9


def test_the_bootstrap_is_the_seed_s() -> None:
    rows = [0.0, 0.2, 0.9, 1.0, 0.4]
    assert bootstrap(rows, 3) == bootstrap(rows, 3)
    assert bootstrap(rows, 3) != bootstrap(rows, 4)
    assert bootstrap([0.25], 0) == Estimate(0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="there is no value"):
        bootstrap([], 0)
    with pytest.raises(ValueError, match="resamples is 0, must be at least 1"):
        bootstrap(rows, 0, resamples=0)


def test_an_estimate_is_shown_with_its_interval() -> None:
    assert str(share(81, 263)) == "0.308 [0.2553, 0.3662]"


def test_popular_tokens_are_the_most_frequent() -> None:
    ids = [7] * 5 + [3] * 4 + [9] * 4 + [1] * 2 + [4]
    assert popular_tokens(ids, 1) == {7}
    assert popular_tokens(ids, 2) == {7, 3}  # as frequent as 9, but first
    assert popular_tokens(ids, 2, lambda token: token != 7) == {3, 9}
    assert popular_share(ids, {7, 4}) == share(6, 16)


def test_popular_tokens_can_be_the_long_ones() -> None:
    def decode(ids: list[int]) -> str:
        return "".join({1: ",", 2: " the", 3: " of", 4: "to"}[i] for i in ids)

    ids = [1, 1, 1, 4, 4, 2, 2, 3]
    assert popular_tokens(ids, 2, longer_than(2, decode)) == {2, 3}  # " of" has three
    assert popular_tokens(ids, 1, longer_than(3, decode)) == {2}


@pytest.mark.parametrize(("k", "reason"), [(0, "k is 0"), (3, "k is 3, the text has 2 different")])
def test_popular_tokens_that_there_are_not(k: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        popular_tokens([1, 2, 2], k)


def test_popular_shares_of_real_texts() -> None:
    """The shares that an imitator of these texts approaches, counted elsewhere with GPT-2's
    vocabulary: Alice in its own set and in Poe's, Poe likewise.
    """
    tokenizer = Tokenizer.load(real_data("tokenizers", "gpt_neo_125m"))
    files = [real_data("texts", name) for name in ("alice.txt", "poe.txt")]
    texts = [tokenizer.encode(read_text(file)) for file in files]
    allowed: Callable[[int], bool] = longer_than(2, tokenizer.decode)
    sets = [popular_tokens(ids, 100, allowed) for ids in texts]
    shares = [popular_share(ids, popular).value for ids in texts for popular in sets]
    assert shares == pytest.approx([0.2980, 0.2484, 0.2154, 0.2483], abs=0.0015)


def test_the_difference_of_two_shares_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17, 873-890, table II, method 10
    for first, second, low, high in (
        ((56, 70), (48, 80), 0.0524, 0.3339),
        ((9, 10), (3, 10), 0.1705, 0.8090),
        ((10, 10), (0, 20), 0.6791, 1.0),
    ):
        estimate = difference(share(*first), share(*second))
        assert estimate.low == pytest.approx(low, abs=6e-5)
        assert estimate.high == pytest.approx(high, abs=6e-5)
        assert estimate.value == pytest.approx(first[0] / first[1] - second[0] / second[1])
