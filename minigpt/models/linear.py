"""y = x W^T + b, by the product that suits its shape.  The weight is stored as W (out, in).

Few rows of float32 on a CPU (generation): reading W once takes most of the time, and y^T = W x^T
reads it faster, if x^T has at least two columns (benchmarks/generation.py).

Many rows whose width is not a multiple of 16 (50,257 logits): unaligned rows slow the product down,
so the rows are stored a multiple of 16 elements apart.

Every other shape uses nn.Linear's own product.

Shapes:  M rows   K inputs   N outputs
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 5  # rows
WIDE, APART = 8192, 16


class Linear(nn.Linear):
    """Equal to nn.Linear up to rounding."""

    def forward(self, x: Tensor) -> Tensor:
        device, weight, bias = x.device.type, self.weight, self.bias
        rows = x.reshape(-1, self.in_features)
        autocast = torch.is_autocast_enabled(device)
        few = 0 < len(rows) <= FEW and device == "cpu" and x.dtype == torch.float32
        if few and not autocast:
            y = few_rows(rows, weight, bias)
        elif self.out_features >= WIDE and self.out_features % APART:
            dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
            tensors = [t if t is None else t.to(dtype) for t in (rows, weight, bias)]
            y = _WideRows.apply(*tensors)  # type: ignore[no-untyped-call]
        else:
            return super().forward(x)
        return y.view(*x.shape[:-1], self.out_features)

    plain_linear = forward  # it computes x W^T + b, so a fused product may stand in for it


def few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Rows x (M, K) -> (M, N) by y^T = W x^T; a single column gets a second one of zeros."""
    columns = F.pad(x, (0, 0, 0, 1)) if len(x) == 1 else x
    y = (weight @ columns.T).T[: len(x)].contiguous()
    return y if bias is None else y + bias


class _WideRows(torch.autograd.Function):
    """Rows x (M, K) -> (M, N), stored a multiple of `APART` elements apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        M, N = len(x), len(weight)
        y = torch.empty_strided((M, N), (N + -N % APART, 1), dtype=x.dtype, device=x.device)
        if bias is None:
            return torch.mm(x, weight.T, out=y)
        return torch.addmm(bias, x, weight.T, out=y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            dy @ weight if needs_x else None,
            dy.T @ x if needs_weight else None,
            dy.sum(0) if needs_bias else None,
        )
