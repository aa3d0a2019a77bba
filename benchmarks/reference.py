"""The LoRA product in plain PyTorch, one operation after the other: what the kernels are measured
against.

Shapes:  M rows   K inputs   N outputs   R rank
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x W^T + b + s (drop(x) A^T) B^T.   Hu et al. 2021, https://arxiv.org/abs/2106.09685

    x (..., K), weight (N, K), bias (N), lora_a (R, K), lora_b (N, R) -> (..., N), in x's dtype.
    autograd keeps x and x A^T for the backward pass (and, with dropout, drop(x) and its mask).
    """
    y = F.linear(x, weight, bias)
    a, b = lora_a.to(y.dtype), lora_b.to(y.dtype)
    xa = F.linear(F.dropout(x, dropout_p), a)
    # the update is added by the product itself: no (M, N) tensor for s x A^T B^T alone
    rows, xa = y.reshape(-1, y.size(-1)), xa.reshape(-1, xa.size(-1))
    return torch.addmm(rows, xa, b.T, alpha=scaling).view(y.shape)
