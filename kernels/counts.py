"""How many updates each parameter has had, counted on the device.

One number for all would be read by some programs of a launch while another writes it, so that each
program has a slot of its own; and parameters may have joined later than others.
"""

from collections.abc import Collection
from itertools import accumulate
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .device import outside_capture, upload


class Counts:
    """The updates made: slots for each parameter, of which its `state["step"]` is the first."""

    params: list[Any]
    tensor: Tensor
    views: list[Tensor]
    version: int

    def __init__(self) -> None:
        self.slots: list[int] = []

    def take(self, columns: list[list[Any]], slots: list[int], state: dict[Any, Any]) -> Tensor:
        """A tensor of `slots[i]` equal numbers for parameter i, and so on.

        They are filled from the state's when these are not the views made here, after loading, or
        when somebody wrote to one.
        """
        params, steps = columns[0], columns[-1]
        if slots == self.slots and same(steps, self.views) and not self._written():
            return self.tensor
        device = params[0].device
        outside_capture(device)
        known = [torch.as_tensor(step, dtype=torch.float32).to(device) for step in steps]
        repeats = upload(torch.tensor(slots), device)
        filled = torch.stack(known).repeat_interleave(repeats, output_size=sum(slots))
        if slots == self.slots and same(params, self.params) and self.tensor.device == device:
            self.tensor.copy_(filled)  # in place: a captured CUDA graph reads it
        else:  # what other parameters count in stays as it is
            self.tensor, self.slots, self.params = filled, slots, params
        starts = accumulate(slots, initial=0)
        self.views = [self.tensor[i] for i, _ in zip(starts, slots, strict=False)]
        for p, view in zip(params, self.views, strict=True):
            state[p]["step"] = view
        self.own_writes()
        return self.tensor

    def own_writes(self) -> None:
        """What was written until now is as it should be."""
        self.version = self.tensor._version

    def _written(self) -> bool:
        return self.version != self.tensor._version


def same(some: Collection[Any], others: Collection[Any]) -> bool:
    """Whether these are the same objects, in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))
