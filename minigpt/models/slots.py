"""Where a fine-tuning method can enter a model without a flag in a forward pass.

Two modules stand in the models to be replaced: the one through which keys and values pass, and the
one through which embedded tokens pass.  They return their inputs unchanged.
"""

from torch import Tensor, nn


class NoPrefix(nn.Module):
    """The slot where prefix tuning puts its keys and values before those of the tokens, and extends
    the mask.  Without a prefix it returns its inputs.
    """

    def forward(
        self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        return k, v, mask, causal


class NoPrompt(nn.Module):
    """The slot where prompt tuning puts its vectors before the embedded tokens.  Without a prompt
    it returns its inputs.

    Attributes:
        length: number of vectors before the tokens.
        shift: number of positions that these take from the tokens.
        first: position of the first token.
    """

    length = 0
    shift = 0
    first = 0

    def forward(self, x: Tensor, position_ids: Tensor, start: bool) -> tuple[Tensor, Tensor]:
        """Takes embedded tokens (B, T, D), their positions (B or 1, T), and whether the sequence
        starts here.
        """
        return x, position_ids
