"""y = x W^T + b + s (drop(x) A^T) B^T, by the route that fits the machine."""

import torch
from torch import Tensor

from . import dispatch, lora_op, lora_torch, tiles
from .lora_function import Lora, LoraFunction, products, siblings


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
    """A linear layer with a low-rank update beside it.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N) or None.
        lora_a, lora_b: A (R, K) and B (N, R), of any floating dtype.
        scaling: s.
        dropout_p: probability of dropping an input of A.
        seed: of the dropout; None: drawn from torch's generator.
        backend: "torch", "triton", or "auto": what the table in kernels/dispatch.py says.

    Returns:
        (..., N), in x's dtype, or in autocast's where it is on.
    """
    one = Lora(weight, bias, lora_a, lora_b, scaling)
    return lora_linears(x, [one], dropout_p, seed, backend)[0]


def lora_linears(
    x: Tensor,
    loras: list[Lora],
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Several such layers of one input x (..., K), query, key and value for instance: their x A^T
    in one pass over x, and so the gradients of A.  With dropout all of them drop the same inputs.

    Returns:
        One (..., N_i) for each of `loras`.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.reshape(-1, x.size(-1)).to(dtype)
    scalings = [lora.scaling for lora in loras]
    tensors = [
        None if t is None else t.to(dtype)
        for column in zip(*(lora[:4] for lora in loras), strict=True)
        for t in column
    ]
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (rows, *tensors)
    )
    R = sum(len(lora.lora_a) for lora in loras)
    chosen = dispatch.route(backend, rows, loras[0].weight, R, dropout_p)
    with torch.autocast(device, enabled=False):
        if not trains and not dropout_p and 0 < len(rows) <= _few(chosen, rows):
            few_rows = products(chosen).few_rows
            ys = [few_rows(rows, *one) for one in siblings(tensors, scalings)]
        else:
            bits = _draw(chosen, rows, dropout_p, seed) if dropout_p else None
            apply = lora_op.apply if torch.compiler.is_compiling() else LoraFunction.apply
            ys = apply(chosen, dropout_p, scalings, bits, rows, *tensors)
    return [y.view(*x.shape[:-1], y.size(1)) for y in ys]


def _draw(backend: str, x: Tensor, p: float, seed: int | None) -> Tensor:
    """The bits of the elements that dropout keeps.  Nothing returns to the host."""
    if backend == "torch":
        return lora_torch.keep(x, p, seed)
    if seed is None:
        at = torch.randint(2**31, (), device=x.device)
    else:
        at = torch.full((), seed, device=x.device)
    if torch.compiler.is_compiling():
        return lora_op.keep(x, p, at)
    from . import lora_triton

    return lora_triton.keep(x, p, at)


def _few(backend: str, x: Tensor) -> int:
    """How many rows have a route of their own."""
    if backend == "triton":
        return tiles.FEW
    return lora_torch.FEW if x.device.type == "cpu" and x.dtype == torch.float32 else 0
