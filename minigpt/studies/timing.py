"""Times of several things, taken in turn, so that what else the machine does slows all alike."""

import time
from collections.abc import Callable, Mapping
from statistics import median, quantiles

Seconds = dict[str, list[float]]


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> Seconds:
    """Seconds of each side in each of `rounds`; the first `warmup` rounds do not count."""
    found: Seconds = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if i >= warmup:
                found[name].append(time.perf_counter() - begin)
    return found


def ratio(times: Seconds, side: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the rounds' ratios of one side to another."""
    ratios = [a / b for a, b in zip(times[side], times[to], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return median(ratios), low, high
