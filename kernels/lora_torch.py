"""The four products of LoRA over torch's (cuBLAS on a GPU, the BLAS of the machine on a CPU).

kernels/lora_triton.py has the same functions as kernels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FEW = 5  # rows on a CPU that take a route of their own


def keep(x: Tensor, p: float, seed: int | None) -> Tensor:
    """Which elements of x (M, K) dropout keeps, with probability 1 - p: (M, ceil(K / 8)) bytes of
    eight bits on a CPU, elsewhere the mask itself.
    """
    random = None if seed is None else torch.Generator(x.device).manual_seed(seed)
    mask = torch.rand(x.shape, generator=random, device=x.device) >= p
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return mask
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1))


def unpack(bits: Tensor, K: int) -> Tensor:
    """The mask (M, K) that `keep` drew."""
    if bits.dtype == torch.bool:
        return bits
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=K).view(bool))


def shrink(x: Tensor, a: Tensor, c: float, bits: Tensor | None, out: Tensor) -> None:
    """S (M, R) = c drop(x) A^T, x (M, K), A (R, K), into `out`."""
    x = x if bits is None else x * unpack(bits, x.size(1))
    torch.addmm(out, x, a.T, beta=0, alpha=c, out=out)


def expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: float,
    bits: Tensor | None = None,
) -> Tensor:
    """Y (M, N) = x W^T + bias + c S B^T, the update masked by the dropout of an (M, N) input."""
    y = F.linear(x, w, bias)
    if bits is None:
        return y.addmm_(s, b.T, alpha=c)
    return y.addcmul_(s @ b.T, unpack(bits, y.size(1)), value=c)


def add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Y (M, N) += x W^T"""
    y.addmm_(x, w.T)


def outer(s: Tensor, x: Tensor, c: float, bits: Tensor | None = None) -> Tensor:
    """D (R, K) = c S^T drop(x), x (M, K), S (M, R)."""
    x = x if bits is None else x * unpack(bits, x.size(1))
    return (c * s).T @ x


def few_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: float
) -> Tensor:
    """Rows (M, K) of a generation on a CPU, where the time is that of reading W once: from the left
    it is read fastest, y^T = W x^T + c B (A x^T), if x^T has at least two columns.
    """
    columns = (F.pad(x, (0, 0, 0, 1)) if len(x) == 1 else x).T
    y = torch.addmm(weight @ columns, b, a @ columns, alpha=c).T[: len(x)].contiguous()
    return y if bias is None else y + bias
