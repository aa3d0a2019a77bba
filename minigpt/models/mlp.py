"""The position-wise network between two attentions.

    MLP(x)      = W_down act(W_up x + b_up) + b_down
    GatedMLP(x) = W_down (act(W_gate x) * W_up x)        Shazeer 2020, https://arxiv.org/abs/2002.05202

Shapes:  x (..., D), W_up and W_gate (inner, D), W_down (D, inner)
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.models.linear import Linear


def gelu_new(x: Tensor) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), https://arxiv.org/abs/1606.08415"""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "relu": F.relu,
    "silu": F.silu,
}


class MLP(nn.Module):
    """x (..., D) -> (..., D) through `inner` units, usually 4 D."""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.up = Linear(width, inner)
        self.down = Linear(inner, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """The same with a gate for each unit; SwiGLU where the activation is "silu"."""

    def __init__(self, width: int, inner: int, activation: str, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, inner, bias=bias)
        self.up = Linear(width, inner, bias=bias)
        self.down = Linear(inner, width, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))
