"""Rows of tokens of different lengths -> batches of few padding tokens.

Packing (Krell et al. 2021, https://arxiv.org/abs/2107.02027): a window of T tokens holds several
rows one after another.  The number of a token's row, from 1 on, stands in `attention_mask`, 0 for
padding, and its place in the row in `position_ids`:

    input_ids        a1 a2 a3 b1 b2  0
    attention_mask    1  1  1  2  2  0      a token sees those of its own number alone
    position_ids      0  1  2  0  1  0      (minigpt/models/attention.py)

so that loss and gradients are those of the rows by themselves.  Grouping: a window holds one row,
and rows of similar length share a batch.  Padding stands at the end, where no token sees it.

Batch number i is a function of the seed and i alone, as in minigpt/data/text.py.

Shapes:  B batch   T time   n tokens of a row
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from minigpt.data.text import IGNORED, Batch

POOL = 50  # batches whose rows are sorted by length together, at most a quarter of all

Windows = list[list[int]]  # each the numbers of the rows in it
Arrange = Callable[[Sequence[int], np.random.Generator], list[Windows]]  # lengths -> batches


@dataclass(frozen=True)
class Example:
    """A row: the tokens that are read, and aligned with them the labels, IGNORED where there is
    nothing to predict; both (n,).
    """

    input_ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Packing:
    """Batches of `batch_size` windows of at most `length` tokens, in random order.

    Best fit, decreasing: from the longest row on, each goes where it leaves the least room.  The
    number of windows depends on the lengths alone.
    """

    length: int
    batch_size: int

    def __call__(self, lengths: Sequence[int], random: np.random.Generator) -> list[Windows]:
        if max(lengths) > self.length:
            raise ValueError(f"a row has {max(lengths)} tokens, a window {self.length}")
        windows: Windows = []
        rooms: list[tuple[int, int]] = []  # tokens that still fit, number of the window; sorted
        shuffled = random.permutation(len(lengths)).tolist()
        for row in sorted(shuffled, key=lambda row: -lengths[row]):
            place = bisect_left(rooms, (lengths[row], 0))
            if place == len(rooms):
                windows.append([])
                rooms.append((self.length, len(windows) - 1))
            room, window = rooms.pop(place)
            windows[window].append(row)
            insort(rooms, (room - lengths[row], window))
        order = random.permutation(len(windows)).tolist()
        return _cut([windows[i] for i in order], self.batch_size)


@dataclass(frozen=True)
class Grouping:
    """Batches of `batch_size` windows of one row, in random order.  The rows of up to `POOL`
    batches are drawn at random, and sorted by length before they are cut into batches.
    """

    batch_size: int

    def __call__(self, lengths: Sequence[int], random: np.random.Generator) -> list[Windows]:
        order = random.permutation(len(lengths)).tolist()
        batches: list[Windows] = []
        pool = self.batch_size * max(1, min(POOL, len(order) // (4 * self.batch_size)))
        for start in range(0, len(order), pool):
            rows = sorted(order[start : start + pool], key=lambda row: -lengths[row])
            windows = [[row] for row in rows]
            batches += _cut(windows, self.batch_size)
        return [batches[i] for i in random.permutation(len(batches)).tolist()]


class ShuffledRows:
    """Batch i of an endless sequence of epochs, each of which holds every example once.

    Raises:
        ValueError: there is no example, or one does not fit a window.
    """

    def __init__(self, examples: Sequence[Example], arrange: Arrange, seed: int) -> None:
        if not examples:
            raise ValueError("there are no examples")
        lengths = [len(example) for example in examples]

        @lru_cache(maxsize=2)
        def epoch(e: int) -> list[Windows]:
            return arrange(lengths, np.random.default_rng([seed, e]))

        self.examples, self.epoch = examples, epoch
        self.batches = len(epoch(0))  # as many in every epoch

    def __call__(self, i: int) -> Batch:
        e, place = divmod(i, self.batches)
        return collate([[self.examples[row] for row in w] for w in self.epoch(e)[place]])


def all_rows(examples: Sequence[Example], arrange: Arrange) -> Iterator[Batch]:
    """Every example once, in batches that are the same for every seed."""
    rows = ShuffledRows(examples, arrange, seed=0)
    return (rows(i) for i in range(rows.batches))


def collate(windows: Sequence[Sequence[Example]]) -> Batch:
    """Windows of rows, filled up to the longest.  Where each holds one row there is no mask: no
    token sees what stands after it.
    """
    B, T = len(windows), max(sum(map(len, window)) for window in windows)
    ids, numbers, places = torch.zeros(3, B, T, dtype=torch.long)
    labels = torch.full((B, T), IGNORED)
    for b, window in enumerate(windows):
        start = 0
        for number, example in enumerate(window, 1):
            piece = slice(start, start + len(example))
            ids[b, piece], labels[b, piece] = example.input_ids, example.labels
            numbers[b, piece], places[b, piece] = number, torch.arange(len(example))
            start = piece.stop
    batch = {"input_ids": ids, "labels": labels}
    if any(len(window) > 1 for window in windows):
        batch |= {"attention_mask": numbers, "position_ids": places}
    return batch


def _cut(windows: Windows, batch_size: int) -> list[Windows]:
    return [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]
