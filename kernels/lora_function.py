"""y_i = x W_i^T + b_i + s_i (drop(x) A_i^T) B_i^T as one node of the graph, for the siblings i that
share an input (query, key and value, say; or a single layer).  Hu et al. 2021,
https://arxiv.org/abs/2106.09685

With A the A_i one under the other, and dS the dS_i side by side:

    xA   = drop(x) A^T                     kept, (M, R): one pass over x for all
    y_i  = x W_i^T + b_i + s_i xA_i B_i^T

    dS_i = s_i dy_i B_i                    (M, R_i)
    dx   = sum_i dy_i W_i + drop'(dS A)    dA = dS^T drop(x)       dB_i = s_i dy_i^T xA_i
    dW_i = dy_i^T x,  db_i = sum dy_i      where they train

Kept are x, xA and, with dropout, one bit for each element of x: a graph of single operations would
keep the dropped x and its mask in full.  Every sum has its order, so two runs give the same bits.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import lora_torch


class Lora(NamedTuple):
    """A linear layer and the update beside it: weight (N, K), bias (N) or None, A (R, K), B (N, R)
    and s.
    """

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


class Needs(NamedTuple):
    """Which gradients are asked for: of x, and of each sibling's tensors."""

    x: bool
    weight: list[bool]
    bias: list[bool]
    a: list[bool]
    b: list[bool]

    @classmethod
    def of(cls, flags: list[bool]) -> "Needs":
        """For x, all weights, all biases, all A_i, all B_i, one after the other."""
        return cls(flags[0], *_fours(flags[1:]))

    @property
    def reads_x(self) -> bool:
        return any(self.weight) or any(self.a)


def products(backend: str) -> ModuleType:
    """The module with `shrink`, `expand` and `outer` of a backend, "torch" or "triton"."""
    if backend == "torch":
        return lora_torch
    from . import lora_triton

    return lora_triton


def forward(
    backend: str, x: Tensor, bits: Tensor | None, p: float, loras: list[Lora]
) -> tuple[list[Tensor], Tensor]:
    """The y_i (M, N_i), and xA (M, R) of all siblings."""
    by = products(backend)
    a = _together(loras)
    xa = x.new_empty(len(x), len(a))
    by.shrink(x, a, 1 / (1 - p), bits, xa)
    ys = [
        by.expand(x, lora.weight, lora.bias, own, lora.lora_b, lora.scaling)
        for lora, own in zip(loras, _columns(xa, loras), strict=True)
    ]
    return ys, xa


def backward(
    backend: str,
    dys: list[Tensor],
    x: Tensor | None,
    bits: Tensor | None,
    p: float,
    loras: list[Lora],
    xa: Tensor,
    needs: Needs,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, then of all weights, all biases, all A_i and all B_i."""
    by = products(backend)
    c = 1 / (1 - p)
    dx: Tensor | None = None
    das: list[Tensor | None] = [None] * len(loras)
    if needs.x or any(needs.a):
        ds = torch.empty_like(xa)
        for dy, lora, own in zip(dys, loras, _columns(ds, loras), strict=True):
            by.shrink(dy, lora.lora_b.T, lora.scaling, None, own)
        a = _together(loras)
        if needs.x:  # the first product takes the update of all siblings with it
            dx = by.expand(dys[0], loras[0].weight.T, None, ds, a.T, c, bits)
            for dy, lora in zip(dys[1:], loras[1:], strict=True):
                by.add_product(dx, dy, lora.weight.T)
        if any(needs.a):
            da = by.outer(ds, x, c, bits).to(a.dtype)
            das = list(da.split([len(lora.lora_a) for lora in loras]))
    dws = [
        dy.T @ x if needed and x is not None else None
        for dy, needed in zip(dys, needs.weight, strict=True)
    ]
    dbiases = [dy.sum(0) if needed else None for dy, needed in zip(dys, needs.bias, strict=True)]
    dbs = [
        by.outer(own, dy, lora.scaling).T.to(lora.lora_b.dtype) if needed else None
        for own, dy, lora, needed in zip(_columns(xa, loras), dys, loras, needs.b, strict=True)
    ]
    return dx, *dws, *dbiases, *das, *dbs


class LoraFunction(torch.autograd.Function):
    """`forward` and `backward` above, as autograd wants them."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        p: float,
        scalings: list[float],
        bits: Tensor | None,
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """`tensors`: all weights, then all biases, all A_i, all B_i."""
        ys, xa = forward(backend, x, bits, p, siblings(tensors, scalings))
        needs = Needs.of(list(ctx.needs_input_grad[4:]))
        ctx.save_for_backward(bits, xa, x if needs.reads_x else None, *tensors)
        ctx.settings = (backend, p, scalings, needs)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Any, ...]:
        bits, xa, x, *tensors = ctx.saved_tensors
        backend, p, scalings, needs = ctx.settings
        loras = siblings(tensors, scalings)
        return None, None, None, None, *backward(backend, list(dys), x, bits, p, loras, xa, needs)


def siblings(tensors: Any, scalings: list[float]) -> list[Lora]:
    """All weights, all biases, all A_i, all B_i -> one `Lora` each."""
    return [Lora(*own) for own in zip(*_fours(tensors), scalings, strict=True)]


def _fours(items: Any) -> list[Any]:
    n = len(items) // 4
    return [items[i : i + n] for i in range(0, 4 * n, n)]


def _together(loras: list[Lora]) -> Tensor:
    """A (R, K) of all siblings."""
    pieces = [lora.lora_a for lora in loras]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _columns(whole: Tensor, loras: list[Lora]) -> tuple[Tensor, ...]:
    """The columns (M, R_i) of each sibling in (M, R)."""
    return whole.split([len(lora.lora_a) for lora in loras], 1)
