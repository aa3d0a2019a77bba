"""Learning-rate schedules: a factor in [0, 1] for each update.

With t the number of updates so far, w the warm-up, and S the schedule's length:

    t < w        t / w                              so the first update after t = 0 has rate 0
    linear       (S - t) / (S - w)
    cosine       (1 + cos(pi (t - w) / (S - w))) / 2
    constant     1

An update that follows t others runs at the factor of t, as in `transformers`.
"""

import math

SCHEDULES = ("linear", "cosine", "constant")


def factor(schedule: str, t: int, warmup: int, length: int) -> float:
    """The factor of the update that follows `t` others."""
    if t < warmup:
        return t / warmup
    left = (length - t) / max(1, length - warmup)
    if schedule == "linear":
        return left
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (1 - left))) / 2
    return 1.0
