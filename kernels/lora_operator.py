"""The node of kernels/lora.py as operators for torch.compile, which state the shapes they return,
so that the graph around them is whole.  Eager code never calls them: an operator imports the
compiler.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from typing import Any

import torch
from torch import Tensor

from . import lora as node

keep = torch.library.custom_op("minigpt::keep", node.keep, mutates_args=())
lora = torch.library.custom_op("minigpt::lora", node.forward, mutates_args=())


@torch.library.custom_op("minigpt::lora_backward", mutates_args=())
def lora_backward(
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
) -> list[Tensor]:
    """`backward` of kernels/lora.py, without the gradients that are not needed."""
    gradients = node.backward(dy.contiguous(), x, weight, lora_a, lora_b, xa, bits, c, route, needs)
    return [gradient for gradient in gradients if gradient is not None]


@keep.register_fake
def _(x: Tensor, p: float, seed: Tensor) -> Tensor:
    return x.new_empty(x.size(0), (x.size(1) + 7) // 8, dtype=torch.uint8)


@lora.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, lora_a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    M = x.size(0)  # len() would make a constant of it
    return x.new_empty(M, weight.size(0)), x.new_empty(M, lora_a.size(0))


@lora_backward.register_fake
def _(
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
) -> list[Tensor]:
    N, K = weight.size(0), weight.size(1)
    shapes = [(dy.size(0), K), (N, K), (N,), (lora_a.size(0), K), (N, lora_b.size(1))]
    return [dy.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Any, ...]:
    def run(*inputs: Any) -> list[Tensor | None]:
        gradients = iter(lora_backward(*inputs))
        return [next(gradients) if needed else None for needed in inputs[-1]]

    return *node.gradients(ctx, dy, run), None, None, None


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    node.remember(ctx, inputs, output)


lora.register_autograd(_backward, setup_context=_setup)
