"""A linear layer whose weight stays in 4 bits.  Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

    y  = x deq(W)^T + b        dx = dy deq(W)        db = sum of the rows of dy

The codes of W do not train.  Neither pass keeps the dense weight: the backward pass dequantises
again.  In float32 W is dequantised by tiles of some rows, each multiplied while it is in the cache,
so that no dense W exists at all:

    y[:, rows] = x W[rows]^T   dx += dy[:, rows] W[rows]

In 16 bits the sum over tiles would be rounded for each of them, so dx takes W at once.

Shapes:  M rows   K inputs   N outputs
"""

from typing import Any

import torch
from torch import Tensor

from .nf4 import Quantized, dequantize, tiles

TILE = 2**20  # numbers


def nf4_linear(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """y = x deq(W)^T + b

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N) or None.

    Returns:
        (..., N), in x's dtype, or in autocast's where it is on and x is not float64.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return nf4_linear(x, weight, bias)
    rows = x.reshape(-1, x.size(-1))
    beta = None if bias is None else bias.to(x.dtype)
    y: Tensor = _Product.apply(rows, beta, weight, False)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.size(1))


class _Product(torch.autograd.Function):
    """x W^T + b, or turned x W: but for b each is the gradient of the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Quantized, turned: bool
    ) -> Tensor:
        ctx.weight, ctx.turned = weight, turned
        return product_turned(x, weight) if turned else product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        dx = _Product.apply(dy, None, ctx.weight, not ctx.turned) if needs_x else None  # type: ignore[no-untyped-call]
        return dx, dy.sum(0) if needs_bias else None, None, None


def product(x: Tensor, weight: Quantized, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (M, K) -> (M, N)."""
    y = x.new_empty(len(x), weight.shape[0])
    for rows, w in tiles(weight, x.dtype, TILE):
        if bias is None:
            torch.mm(x, w.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, w.T, out=y[:, rows])
    return y


def product_turned(dy: Tensor, weight: Quantized) -> Tensor:
    """dy W, (M, N) -> (M, K)."""
    if dy.dtype.itemsize < 4:
        return dy @ dequantize(weight, dy.dtype)
    dx = dy.new_zeros(len(dy), weight.shape[1])
    for rows, w in tiles(weight, dy.dtype, TILE):
        dx.addmm_(dy[:, rows], w)
    return dx
