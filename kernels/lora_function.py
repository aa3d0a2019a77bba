"""y = x W^T + b + s (drop(x) A^T) B^T as one node of the graph.  Hu et al. 2021,
https://arxiv.org/abs/2106.09685

    xA = drop(x) A^T                     kept, (M, R)
    y  = x W^T + b + s xA B^T            the base product, the update added by its own product

    dS = s dY B                          (M, R)
    dx = dY W + drop'(dS A)              dA = dS^T drop(x)       dB = s dY^T xA
    dW = dY^T x,  db = sum dY            where they train

Kept are x, xA and, with dropout, one bit for each element of x: a graph of single operations would
keep the dropped x and its mask in full.  Every sum has its order, so two runs give the same bits.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def draw(x: Tensor, p: float, seed: int) -> Tensor:
    """Which elements of x (M, K) dropout keeps: True with probability 1 - p."""
    random = torch.Generator(x.device).manual_seed(seed)
    return torch.rand(x.shape, generator=random, device=x.device) >= p


def pack(mask: Tensor) -> Tensor:
    """Eight of the elements (M, K) in a byte; elsewhere than on the CPU they stay as they are."""
    return torch.from_numpy(np.packbits(mask.numpy())) if mask.device.type == "cpu" else mask


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`."""
    if bits.device.type != "cpu":
        return bits
    mask = np.unpackbits(bits.numpy(), count=shape.numel()).view(bool)
    return torch.from_numpy(mask).view(shape)


class LoraFunction(torch.autograd.Function):
    """x (M, K), weight (N, K), bias (N), a (R, K), b (N, R), all of one dtype -> y (M, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout_p: float,
        seed: int,
    ) -> Tensor:
        bits = None
        if dropout_p:
            mask = draw(x, dropout_p, seed)
            bits = pack(mask)
            xa = (x * mask) @ (a.T / (1 - dropout_p))
        else:
            xa = x @ a.T
        y = F.linear(x, weight, bias)
        y.addmm_(xa, b.T, alpha=scaling)
        reads_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if reads_x else None, weight, a, b, xa, bits)
        ctx.scaling, ctx.kept = scaling, 1 - dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, xa, bits = ctx.saved_tensors
        s, kept = ctx.scaling, ctx.kept
        mask = None if bits is None else unpack(bits, dy.shape[:1] + a.shape[1:])
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        dx = da = None
        ds = s * (dy @ b)  # (M, R)
        if needs_a:
            da = ds.T @ x if mask is None else (ds.T / kept) @ (x * mask)
        if needs_x:
            dx = dy @ weight
            if mask is None:
                dx.addmm_(ds, a)
            else:
                dx.addcmul_(ds @ a, mask, value=1 / kept)
        dw = dy.T @ x if needs_weight else None
        dbias = dy.sum(0) if needs_bias else None
        db = s * (dy.T @ xa) if needs_b else None
        return dx, dw, dbias, da, db, None, None, None


class TritonLoraFunction(torch.autograd.Function):
    """The same by the kernels of kernels/lora_kernels.py: no mask is kept, dropout is Philox of the
    seed wherever it is needed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout_p: float,
        seed: int,
    ) -> Tensor:
        from kernels.lora_kernels import expand, shrink

        xa = shrink(x, a, 1.0, dropout_p, seed)
        y = expand(x, weight, bias, xa, b, scaling)
        reads_x = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if reads_x else None, weight, a, b, xa)
        ctx.settings = (scaling, dropout_p, seed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from kernels.lora_kernels import expand, outer, shrink

        x, weight, a, b, xa = ctx.saved_tensors
        s, p, seed = ctx.settings
        needs_x, needs_weight, needs_bias, needs_a, needs_b = ctx.needs_input_grad[:5]
        ds = shrink(dy, b.T, s)  # (M, R)
        dx = expand(dy, weight.T, None, ds, a.T, 1.0, p, seed) if needs_x else None
        da = outer(ds, x, 1.0, p, seed).to(a.dtype) if needs_a else None
        db = outer(xa, dy, s).T.to(b.dtype) if needs_b else None
        dw = dy.T @ x if needs_weight else None
        dbias = dy.sum(0) if needs_bias else None
        return dx, dw, dbias, da, db, None, None, None
