"""y = x W^T + b + s (drop(x) A^T) B^T, by the route that fits the machine."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dispatch import route
from kernels.lora_function import LoraFunction, TritonLoraFunction

FEW = 5  # rows


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
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if dropout_p and seed is None:
        seed = int(torch.randint(2**31, ()))
    rows = x.reshape(-1, x.size(-1)).to(dtype)
    weight, a, b = weight.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    trains = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (rows, weight, bias, a, b)
    )
    chosen = route(backend, rows, weight, len(a), dropout_p)
    few = 0 < len(rows) <= FEW and device == "cpu" and dtype == torch.float32
    y: Tensor
    with torch.autocast(device, enabled=False):
        if few and chosen == "torch" and not trains and not dropout_p:
            y = _few_rows(rows, weight, bias, a, b, scaling)
        else:
            function = TritonLoraFunction if chosen == "triton" else LoraFunction
            y = function.apply(rows, weight, bias, a, b, scaling, dropout_p, seed or 0)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.size(0))


def _few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
) -> Tensor:
    """Rows (M, K) of a generation on a CPU, where the time is that of reading W once: from the left
    it is read fastest, y^T = W x^T + s B (A x^T), if x^T has at least two columns.
    """
    columns = (F.pad(x, (0, 0, 0, 1)) if len(x) == 1 else x).T
    y = torch.addmm(weight @ columns, b, a @ columns, alpha=scaling).T[: len(x)].contiguous()
    return y if bias is None else y + bias
