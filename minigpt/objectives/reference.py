"""The model as it was before training: pi_ref.

With an adapter it is the same model with the adapter switched off, and takes no memory.  Full
fine-tuning and freezing change the model's own weights, so there it is a frozen copy, which takes
as much memory as the model.  It runs without dropout and without gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch

from minigpt.models.architecture import Decoder
from minigpt.models.mode import mode
from peft_lite.handle import Handle

COPIED = ("full", "freeze")  # methods that change the model's own weights


class Reference:
    """Made before the method is attached.

    Args:
        method: the method's name.
    """

    def __init__(self, model: Decoder, method: str) -> None:
        self.copy = deepcopy(model).requires_grad_(False) if method in COPIED else None

    @contextmanager
    def of(self, model: Decoder, handle: Handle | None) -> Iterator[Decoder]:
        """Within the block the decoder computes log pi_ref.

        Args:
            model, handle: what trains, and what switches its adapter off.
        """
        if self.copy is not None:
            with torch.no_grad(), mode(self.copy, training=False):
                yield self.copy
            return
        if handle is None:
            raise ValueError("without an adapter and without a copy there is no reference")
        with torch.no_grad(), mode(model, training=False), handle.enabled(False):
            yield model
