"""The same node for torch.compile: operators that say which shapes they return, so that a graph
with them in it is whole.  An eager run calls kernels/lora_function.py without them, which costs
less for each call.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import lora_function
from .lora_function import Needs, siblings

Numbers = Sequence[float]
Tensors = Sequence[Tensor]


@torch.library.custom_op("minigpt::keep", mutates_args=())
def keep(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Bits (M, ceil(K / 8)) of the elements of x (M, K) that dropout keeps, by Triton."""
    from . import lora_triton

    return lora_triton.keep(x, p, seed)


@torch.library.custom_op("minigpt::lora", mutates_args=())
def lora(
    backend: str,
    p: float,
    scalings: Numbers,
    bits: Tensor | None,
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    a: Tensors,
    b: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The y_i (M, N_i), then xA (M, R) of all siblings.  An empty bias is none."""
    loras = siblings([*weights, *map(_or_none, biases), *a, *b], list(scalings))
    ys, xa = lora_function.forward(backend, x, bits, p, loras)
    return [*ys, xa]


@torch.library.custom_op("minigpt::lora_backward", mutates_args=())
def lora_backward(
    backend: str,
    p: float,
    scalings: Numbers,
    bits: Tensor | None,
    x: Tensor | None,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    xa: Tensor,
    dys: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients that `needs` names, in its order."""
    loras = siblings([*weights, *[None] * len(a), *a, *b], list(scalings))
    dys = [dy.contiguous() for dy in dys]
    found = lora_function.backward(backend, dys, x, bits, p, loras, xa, Needs.of(list(needs)))
    # what an operator returns has memory of its own
    return [
        g.clone(memory_format=torch.contiguous_format) if g._is_view() else g
        for g in found
        if g is not None
    ]


@keep.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(len(x), (x.size(1) + 7) // 8, dtype=torch.uint8)


@lora.register_fake
def _(
    backend: str,
    p: float,
    scalings: Numbers,
    bits: Tensor | None,
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    a: Tensors,
    b: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    columns = [*map(len, weights), sum(map(len, a))]
    return [x.new_empty(len(x), n) for n in columns]


@lora_backward.register_fake
def _(
    backend: str,
    p: float,
    scalings: Numbers,
    bits: Tensor | None,
    x: Tensor | None,
    weights: Tensors,
    a: Tensors,
    b: Tensors,
    xa: Tensor,
    dys: Tensors,
    needs: Sequence[bool],
) -> list[Tensor]:
    M, K = len(xa), a[0].size(1)
    shapes = [(M, K), *(w.shape for w in weights), *((len(w),) for w in weights)]
    shapes += [one.shape for one in (*a, *b)]
    return [xa.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    backend, p, scalings, bits, x, weights, _, a, b, needs = inputs
    kept = x if Needs.of(list(needs)).reads_x else None
    ctx.save_for_backward(bits, kept, output[-1], *weights, *a, *b)
    ctx.settings = (backend, p, scalings, needs)


def _backward(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    bits, x, xa, *rest = ctx.saved_tensors
    backend, p, scalings, needs = ctx.settings
    n = len(rest) // 3
    weights, a, b = rest[:n], rest[n : 2 * n], rest[2 * n :]
    dys = gradients[:-1]
    found = iter(lora_backward(backend, p, scalings, bits, x, weights, a, b, xa, dys, needs))
    dx, *of = [next(found) if needed else None for needed in needs]
    dws, dbiases, das, dbs = (of[i : i + n] for i in range(0, 4 * n, n))
    return None, None, None, None, dx, dws, dbiases, das, dbs, None


lora.register_autograd(_backward, setup_context=_setup)


def apply(
    backend: str,
    p: float,
    scalings: list[float],
    bits: Tensor | None,
    x: Tensor,
    *tensors: Tensor | None,
) -> list[Tensor]:
    """As `LoraFunction.apply`."""
    n = len(scalings)
    needs = [t is not None and t.requires_grad for t in (x, *tensors)]
    full = [x.new_empty(0) if t is None else t for t in tensors]
    columns = [full[i : i + n] for i in range(0, 4 * n, n)]
    return lora(backend, p, scalings, bits, x, *columns, needs)[:-1]


def _or_none(bias: Tensor) -> Tensor | None:
    return bias if bias.numel() else None
