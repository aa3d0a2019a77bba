"""A linear layer with a low-rank update as one node of the graph.
Hu et al. 2021, https://arxiv.org/abs/2106.09685

    y  = x W^T + b + s (drop(x) A^T) B^T

With c = s / (1 - p) and the mask m of what dropout keeps:

    xA = c (m x) A^T                       kept for the backward pass, (M, R)
    y  = xA B^T + b,  then  y += x W^T     the update first

    dS = c dy B                            (M, R)
    dx = m (dS A),    then  dx += dy W     the update first
    dA = dS^T (m x)      dB = dy^T xA      dW = dy^T x      db = sum of the rows of dy

The update comes first because the large product can add to what its output holds: that saves a
pass over y, and in bf16 the sum is rounded once, not twice.  On one CPU core it takes 0.97 to 1.01
of the time of the other order, and has 0.73 to 0.87 of its rms error in bf16.

Kept are x, xA and one bit for each element of x that dropout sees; a graph of single operations
keeps the dropped x and its mask in full.  No sum uses atomics: two runs give the same bits.

Routes (kernels/backend.py): "torch" is this file; "triton" and "fused" are kernels/lora_triton.py.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from . import backend as backends
from . import dropout
from .dropout import unpack

FEW = 5  # rows of float32 that a CPU multiplies from the left


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """y = x W^T + b + s (drop(x) A^T) B^T

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N) or None.
        lora_a, lora_b: A (R, K) and B (N, R), of any floating dtype.
        scaling: s.
        dropout_p: probability of dropping an input of A, in steps of 2^-16.
        seed: of the dropout; None: drawn from torch's generator.  The mask depends on the seed and
            the device, not on the route.
        backend: "torch", "triton", "fused", or "auto": the measured route (kernels/backend.py).

    Returns:
        (..., N), in x's dtype, or in autocast's where it is on and x is not float64.

    Raises:
        ValueError: the backend is unknown or cannot run here, or dropout_p lies outside [0, 1).
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
        with torch.autocast(device, enabled=False):
            return lora_linear(x, weight, bias, lora_a, lora_b, scaling, dropout_p, seed, backend)
    rows = x.reshape(-1, x.size(-1))
    route = "torch"
    if backend != "auto" or device != "cpu":
        route = backends.choose(backend, rows, lora_b, dropout_p > 0)
    few = device == "cpu" and x.dtype == torch.float32 and 0 < rows.size(0) <= FEW
    if few and route == "torch" and not dropout_p and not torch.is_grad_enabled():
        y = few_rows(rows, weight, bias, lora_a, lora_b, scaling)
        return y.view(*x.shape[:-1], y.size(1))
    bits = draw(rows, dropout_p, seed) if dropout_p else None
    c = scaling / (1 - dropout_p)
    # operators are for the compiler (kernels/lora_operator.py): one that is called imports it
    node = torch.ops.minigpt.lora if torch.compiler.is_compiling() else LoraFunction.apply
    inputs = (rows, weight, bias, lora_a, lora_b, bits, c, route)
    y, _ = node(*inputs)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], y.size(1))


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    bits: Tensor | None,
    c: float,
    route: str,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and xA (M, R)."""
    w, a, b = weight.to(x.dtype), lora_a.to(x.dtype), lora_b.to(x.dtype)
    beta = None if bias is None else bias.to(x.dtype)
    if route != "torch":
        from . import lora_triton

        return lora_triton.forward(x, w, beta, a, b, bits, c, route)
    dropped = x if bits is None else x * unpack(bits, x.size(1))
    # xA = c (m x) A^T
    xa = torch.addmm(x.new_empty(1), dropped, a.T, beta=0, alpha=c)
    # y = xA B^T + b + x W^T
    y = xa @ b.T if beta is None else torch.addmm(beta, xa, b.T)
    y.addmm_(x, w.T)
    return y, xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    bits: Tensor | None,
    c: float,
    route: str,
    needs: list[bool],
) -> list[Tensor | None]:
    """The gradients of x, W, b, A and B, of those that `needs` names."""
    w, a, b = (t.to(dy.dtype) for t in (weight, lora_a, lora_b))
    dx = da = db = None
    if route != "torch":
        from . import lora_triton

        dx, da, db = lora_triton.backward(dy, x, w, a, b, xa, bits, c, route, needs)
    else:
        if needs[0] or needs[3]:
            ds = torch.addmm(dy.new_empty(1), dy, b, beta=0, alpha=c)  # dS = c dy B
        if needs[0]:
            dx = ds @ a  # dx = m (dS A) + dy W
            dx = dx if bits is None else dx * unpack(bits, dx.size(1))
            dx.addmm_(dy, w)
        if needs[3] and x is not None:
            da = ds.T @ (x if bits is None else x * unpack(bits, x.size(1)))  # dA = dS^T (m x)
        if needs[4]:
            db = (xa.T @ dy).T.contiguous()  # dB = dy^T xA: quicker with dy at the right
    dw = dy.T @ x if needs[1] and x is not None else None
    dbias = dy.sum(0) if needs[2] else None
    return [dx, dw, dbias, da, db]


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps what the backward pass reads; x only where W, A or B trains."""
    x, weight, _, a, b, bits, c, route = inputs
    _, trains_w, _, trains_a, trains_b, *_ = ctx.needs_input_grad
    kept = x if trains_w or trains_a or trains_b else None
    ctx.save_for_backward(kept, weight, a, b, output[1], bits)
    ctx.settings = (c, route)
    ctx.set_materialize_grads(False)  # of xA, which nobody else reads


def gradients(ctx: Any, dy: Tensor, run: Any) -> list[Tensor | None]:
    """Those of x, W, b, A and B by `run`, which is `backward` or its operator."""
    device = dy.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return gradients(ctx, dy, run)
    x, weight, a, b, xa, bits = ctx.saved_tensors
    c, route = ctx.settings
    needs = list(ctx.needs_input_grad[:5])
    if torch.is_grad_enabled():  # create_graph: torch's products can be differentiated again
        run, route = backward, "torch"
        if x is not None:
            dropped = x if bits is None else x * unpack(bits, x.size(1))
            xa = c * (dropped @ a.to(x.dtype).T)
    grads: list[Tensor | None] = run(dy, x, weight, a, b, xa, bits, c, route, needs)
    return grads


class LoraFunction(torch.autograd.Function):
    """`forward` and `backward` as a node of the graph."""

    forward = staticmethod(forward)
    setup_context = staticmethod(remember)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: None) -> tuple[Any, ...]:
        return *gradients(ctx, dy, backward), None, None, None


def few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, s: float
) -> Tensor:
    """The few rows (M, K) of a generation step on a CPU, where reading W takes the time: a product
    from the left reads it fastest, y^T = W x^T + s B (A x^T), if x^T has at least two columns.
    """
    w, a, b = (t.to(x.dtype) for t in (weight, lora_a, lora_b))
    columns = (F.pad(x, (0, 0, 0, 1)) if len(x) == 1 else x).T
    y = torch.addmm(w @ columns, b, a @ columns, alpha=s).T[: len(x)].contiguous()
    return y if bias is None else y + bias.to(x.dtype)


# --- dropout ------------------------------------------------------------------------------------


def draw(x: Tensor, p: float, seed: int | None) -> Tensor:
    """The bits of a mask for x (M, K).  The seed stays on the device: a CUDA graph captures it."""
    if not 0 < p < 1:
        raise ValueError(f"dropout_p is {p}, must lie in [0, 1)")
    at = torch.full((), seed, device=x.device) if seed is not None else None
    if at is None:
        at = torch.randint(2**31, (), device=x.device)
    if torch.compiler.is_compiling() or is_fake(x):
        return torch.ops.minigpt.keep(x, p, at)
    return keep(x, p, at)


def keep(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Bits (M, ceil(K / 8)) of the elements of x (M, K) that dropout keeps: bit k % 8 of byte
    k // 8 is set where a random number of 16 bits is at least 2^16 p.
    """
    if x.device.type != "cpu":
        from . import lora_triton

        return lora_triton.keep(x, p, seed)
    return dropout.keep(x, p, seed)
