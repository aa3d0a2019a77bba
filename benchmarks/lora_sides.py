"""One LoRA layer without a bias, by each side of `benchmarks.lora_linear`.

    y = x W^T + s (drop(x) A^T) B^T        W is frozen; dx, dA and dB are asked for

`Unsloth` and `Fusion` are those projects' formulas as the sequence of torch calls they come to.
Unsloth's is what it runs; LoRAFusion runs some of these calls as one kernel, which torch cannot.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks import paper, reference
from benchmarks.paper import Shape
from minigpt_kernels import lora_linear

SCALING = 2.0


class Inputs(NamedTuple):
    """x (M, K), W (N, K), A (R, K), B (N, R), dy (M, N)."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    dy: Tensor


class Layer(NamedTuple):
    """x (M, K) -> y (M, N), one of each sibling, and the factors that train: all A, then all B."""

    call: Callable[[Tensor], tuple[Tensor, ...]]
    factors: list[Tensor]


def inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Normal numbers; W and A as small as in a model, so that y is about 1."""
    M, K, N, R = shape
    random = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, size: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=random, device=device)
        return (size * drawn).to(dtype)

    x, w, a = draw(M, K).requires_grad_(), draw(N, K, K**-0.5), draw(R, K, K**-0.5)
    return Inputs(x, w, a.requires_grad_(), draw(N, R, R**-0.5).requires_grad_(), draw(M, N))


def layers(side: str, sets: list[Inputs], p: float) -> list[Layer]:
    """The layer of each set of inputs."""
    if side in (paper.PEFT, paper.PEFT_FP32):
        return [_of_peft([inputs], p, fp32=side == paper.PEFT_FP32) for inputs in sets]
    product = _product(side, p)

    def layer(inputs: Inputs) -> Layer:
        factors = [inputs.lora_a, inputs.lora_b]
        return Layer(
            lambda x: (product(x, inputs.weight, *factors),), [] if side == paper.BASE else factors
        )

    return [layer(inputs) for inputs in sets]


def _product(side: str, p: float) -> Callable[..., Tensor]:
    """(x, W, A, B) -> y"""
    routes = {
        paper.OURS_TORCH: "torch",
        paper.OURS_TRITON: "triton",
        paper.OURS_FUSED: "fused",
    }
    if side in routes:
        return lambda x, w, a, b: lora_linear(x, w, None, a, b, SCALING, p, backend=routes[side])
    if side == paper.BASE:
        return lambda x, w, a, b: F.linear(x, w)
    if side == paper.UNSLOTH:
        return lambda x, w, a, b: Unsloth.apply(x, w, a, b)  # type: ignore[no-untyped-call]
    if side == paper.FUSION:
        return lambda x, w, a, b: Fusion.apply(x, w, a, b, p)  # type: ignore[no-untyped-call]

    def eager(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return reference.lora_linear(x, w, None, a, b, SCALING, p)

    return torch.compile(eager, dynamic=False) if side == paper.COMPILED else eager


def ours(siblings: list[Inputs], p: float) -> Layer:
    """Ours by the route that fits, one layer or several of the first one's x."""

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            lora_linear(x, inputs.weight, None, inputs.lora_a, inputs.lora_b, SCALING, p)
            for inputs in siblings
        )

    return Layer(
        call, [inputs.lora_a for inputs in siblings] + [inputs.lora_b for inputs in siblings]
    )


def peft_layer(siblings: list[Inputs], p: float) -> Layer:
    """HF PEFT's, one layer or several of one x."""
    return _of_peft(siblings, p, fp32=False)


class _Linears(nn.Module):
    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for i, w in enumerate(weights):
            linear = nn.Linear(w.size(1), w.size(0), bias=False, device="meta")
            linear.weight = nn.Parameter(w, requires_grad=False)
            self.add_module(f"linear{i}", linear)


def _of_peft(siblings: list[Inputs], p: float, fp32: bool) -> Layer:
    import peft

    plain = _Linears([inputs.weight for inputs in siblings])
    names = [name for name, _ in plain.named_children()]
    config = peft.LoraConfig(
        r=len(siblings[0].lora_a),
        lora_alpha=int(SCALING * len(siblings[0].lora_a)),
        lora_dropout=p,
        target_modules=names,
    )
    model: Any = peft.get_peft_model(plain, config, autocast_adapter_dtype=fp32).train()
    layers = [getattr(model.base_model.model, name) for name in names]
    a, b = ([getattr(layer, f)["default"].weight for layer in layers] for f in ("lora_A", "lora_B"))
    with torch.no_grad():
        for inputs, a_i, b_i in zip(siblings, a, b, strict=True):
            a_i.copy_(inputs.lora_a)
            b_i.copy_(inputs.lora_b)
    return Layer(lambda x: tuple(layer(x) for layer in layers), [*a, *b])


def _scaled(left: Tensor, right: Tensor) -> Tensor:
    """Left times right times s, in one call."""
    out = left.new_empty(len(left), right.size(1))
    return torch.addmm(out, left, right, beta=0, alpha=SCALING, out=out)


class Unsloth(torch.autograd.Function):
    """Three calls forward; backward computes dy B twice and x A^T again.  No dropout."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        return (x @ w.T).addmm_(x @ a.T, b.T, alpha=SCALING)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, w, a, b = ctx.saved_tensors
        da = _scaled((dy @ b).T, x)
        db = _scaled(dy.T, x @ a.T)
        dx = (dy @ w).addmm_(dy @ b, a, alpha=SCALING)
        return dx, None, da, db  # type: ignore[return-value]


class Fusion(torch.autograd.Function):
    """The update first, then the base product is added to it.  LoRAFusion drops x and multiplies it
    by A in one kernel, and reads dy once for dy B and dB.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float) -> Tensor:
        dropped, mask = torch.native_dropout(x, p, True) if p else (x, None)
        xa = dropped @ a.T
        ctx.save_for_backward(dropped, mask, xa, w, a, b)
        ctx.c = 1 / (1 - p)
        return _scaled(xa, b.T).addmm_(x, w.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dropped, mask, xa, w, a, b = ctx.saved_tensors
        ds = _scaled(dy, b)
        db = _scaled(dy.T, xa)
        da = ds.T @ dropped
        dx = ds @ a
        if mask is not None:
            dx = torch.ops.aten.native_dropout_backward(dx, mask, ctx.c)
        return dx.addmm_(dy, w), None, da, db, None


def errors(layer: Layer, given: Inputs) -> dict[str, float]:
    """The largest errors of y, dx, dA and dB without dropout, as shares of the largest value."""
    x, w, a, b, dy = (t.detach().double() for t in given)
    ds = SCALING * dy @ b
    exact = {
        "y": x @ w.T + SCALING * (x @ a.T) @ b.T,
        "dx": dy @ w + ds @ a,
        "da": ds.T @ x,
        "db": SCALING * dy.T @ (x @ a.T),
    }
    (y,) = layer.call(given.x)
    results = [y, *torch.autograd.grad(y, [given.x, *layer.factors], given.dy)]
    return {
        name: ((got.double() - want).abs().max() / want.abs().max()).item()
        for (name, want), got in zip(exact.items(), results, strict=True)
    }
