"""An endless sequence of epochs, each of which holds every row once, in a random order.

The row at a place of the sequence is a function of the seed and the place alone, so a run that
resumes at any step sees what an uninterrupted one would.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


def place(seed: int, n: int, number: int) -> int:
    """Which of n rows stands at `number` of the sequence, 0, 1, 2, ..."""
    epoch, within = divmod(number, n)
    return _order(seed, epoch, n)[within]


@lru_cache(maxsize=2)  # a batch touches one epoch, or two
def _order(seed: int, epoch: int, n: int) -> list[int]:
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def number_of(seed: Sequence[int]) -> int:
    """One seed out of several numbers."""
    return int(np.random.SeedSequence([*seed]).generate_state(1, np.uint64)[0] >> np.uint64(1))
