"""Where a fine-tuning method can enter a model without a flag in a forward pass.

Two modules stand in the models to be replaced: the one through which keys and values pass, and the
one through which embedded tokens pass.  They return their inputs unchanged.
"""

from torch import Tensor, nn


class NoPrefix(nn.Module):
    """The slot where prefix tuning puts k and v of its own before the real ones, and their columns
    into the mask.  Empty, it hands on what it gets.
    """

    def forward(
        self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        return k, v, mask, causal


class NoPrompt(nn.Module):
    """The slot where prompt tuning puts vectors of its own before the embedded tokens.  Empty, it
    hands on what it gets.

    Attributes:
        length: vectors it puts before the tokens.
        shift: positions that stand before those of the tokens.
    """

    length = 0
    shift = 0

    def forward(self, x: Tensor, position_ids: Tensor, start: bool) -> tuple[Tensor, Tensor]:
        """Embedded tokens (B, T, D), their positions (B or 1, T), whether a sequence starts."""
        return x, position_ids
