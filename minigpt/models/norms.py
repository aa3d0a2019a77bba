"""Root-mean-square normalisation.  Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467

    RMSNorm(x) = g * x / sqrt(mean(x^2) + epsilon)

x (..., D), g (D,).  As in Llama, x is normalised in float32 and rounded to its own dtype before g
scales it.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x (..., D) -> (..., D)."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * wide.to(x.dtype)
