"""A linear layer whose weight stays in 4 bits.  Dettmers et al. 2023, https://arxiv.org/abs/2305.14314

    y  = x deq(W)^T + b        dx = dy deq(W)        db = sum of the rows of dy

The codes of W do not train.  Neither pass keeps the dense weight: the backward pass dequantises
again.  In float32 W is dequantised by tiles of some rows, each multiplied at once, so that no dense
W exists at all:

    y[:, rows] = x W[rows]^T   dx += dy[:, rows] W[rows]

In 16 bits the sum over tiles would be rounded for each of them, so dx takes W at once.

Routes: "torch" is this file; "triton" is kernels/nf4_triton.py, where "auto" goes on a GPU.

Shapes:  M rows   K inputs   N outputs
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .backend import resolve
from .nf4 import Quantized, dequantize, tiles

TILE = 2**22  # numbers: more would leave the cache, and fewer would read dx more often than W


def nf4_linear(
    x: Tensor, weight: Quantized, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """y = x deq(W)^T + b

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N) or None.
        backend: "torch", "triton" or "auto".

    Returns:
        (..., N), in x's dtype, or in autocast's where it is on and x is not float64.

    Raises:
        ValueError: the backend is unknown or cannot run here.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return nf4_linear(x, weight, bias, backend)
    rows = x.reshape(-1, x.size(-1))
    beta = None if bias is None else bias.to(x.dtype)
    if torch.compiler.is_compiling():  # kernels/nf4_operator.py takes the weight in its parts
        stored = (weight.packed, weight.scales, weight.scales_of_scales, weight.offset)
        about = (weight.shape, weight.block, False, backend)
        y = torch.ops.minigpt.nf4(rows, beta, *stored, *about)
    else:
        y = _Product.apply(rows, beta, weight, False, backend)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.size(1))


class _Product(torch.autograd.Function):
    """x W^T + b, or turned x W: but for b each is the gradient of the other."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, weight: Quantized, turned: bool, backend: str
    ) -> Tensor:
        ctx.rest = (weight, not turned, backend)
        return product_turned(x, weight, backend) if turned else product(x, weight, bias, backend)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *gradients(ctx, dy, _Product.apply, *ctx.rest), None, None, None


def gradients(
    ctx: Any, dy: Tensor, run: Callable[..., Tensor], *rest: Any
) -> tuple[Tensor | None, Tensor | None]:
    """Those of x and b; `run` is the node or its operator, and `rest` are the inputs after b."""
    needs_x, needs_bias, *_ = ctx.needs_input_grad
    with torch.autocast(dy.device.type, enabled=False):
        return run(dy, None, *rest) if needs_x else None, dy.sum(0) if needs_bias else None


def product(
    x: Tensor, weight: Quantized, bias: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """x W^T + b, (M, K) -> (M, N)."""
    if resolve(backend, x) == "triton":
        from . import nf4_triton

        return nf4_triton.product(x, weight, bias)
    y = x.new_empty(len(x), weight.shape[0])
    for rows, w in tiles(weight, x.dtype, TILE):
        if bias is None:
            torch.mm(x, w.T, out=y[:, rows])
        else:
            torch.addmm(bias[rows], x, w.T, out=y[:, rows])
    return y


def product_turned(dy: Tensor, weight: Quantized, backend: str = "auto") -> Tensor:
    """dy W, (M, N) -> (M, K)."""
    if dy.dtype.itemsize < 4 or resolve(backend, dy) == "triton":
        return dy @ dense(weight, dy.dtype, backend)
    dx = dy.new_zeros(len(dy), weight.shape[1])
    for rows, w in tiles(weight, dy.dtype, TILE):
        dx.addmm_(dy[:, rows], w)
    return dx


def dense(weight: Quantized, dtype: torch.dtype | None = None, backend: str = "auto") -> Tensor:
    """deq(W), of its shape; by default in its dtype."""
    if resolve(backend, weight.packed) == "triton":
        from . import nf4_triton

        return nf4_triton.dequantize(weight, dtype or weight.dtype)
    return dequantize(weight, dtype)
