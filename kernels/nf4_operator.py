"""The node of kernels/nf4_linear.py as an operator for torch.compile, as kernels/lora_operator.py
has those of LoRA.  An operator takes tensors, so the weight comes in its parts.

Shapes:  M rows   K inputs   N outputs
"""

from typing import Any

import torch
from torch import Tensor

from . import nf4_linear as node
from .nf4 import Quantized


@torch.library.custom_op("minigpt::nf4", mutates_args=())
def nf4(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    scales: Tensor,
    scales_of_scales: Tensor | None,
    offset: Tensor | None,
    shape: list[int],
    block: int,
    turned: bool,
    backend: str,
) -> Tensor:
    """x W^T + b, or turned x W."""
    stored = (packed, scales, scales_of_scales, offset)
    weight = Quantized(*stored, torch.Size(shape), x.dtype, block)
    if turned:
        return node.product_turned(x, weight, backend)
    return node.product(x, weight, bias, backend)


@nf4.register_fake
def _(x: Tensor, bias: Any, packed: Any, *rest: Any) -> Tensor:
    (N, K), _, turned, _ = rest[-4:]
    return x.new_empty(x.size(0), K if turned else N)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, *stored, shape, block, turned, backend = inputs
    ctx.save_for_backward(*stored)
    ctx.rest = (shape, block, not turned, backend)


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *node.gradients(ctx, dy.contiguous(), nf4, *ctx.saved_tensors, *ctx.rest), *[None] * 8


nf4.register_autograd(_backward, setup_context=_setup)
