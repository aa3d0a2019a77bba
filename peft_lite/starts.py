"""Starts of a LoRA at a part s B0 A0 of the weight itself, instead of at zero.

    PiSSA   W = U S V^T         B0 = U_R sqrt(S_R / s)    A0 = sqrt(S_R / s) V_R^T
            Meng et al. 2024, https://arxiv.org/abs/2404.02948
    OLoRA   W = Q T, T upper    B0 = Q_R                  A0 = T_R
            Buyukakyuz 2024, https://arxiv.org/abs/2406.01775

U_R, S_R, V_R are the R largest singular values and their vectors, so that PiSSA's s B0 A0 is the
best approximation of W of rank R; Q_R and T_R are the first R columns of Q and rows of T.  The
papers take this part out of the base, so that W' = W at first:

    W' = W - s B0 A0 + s B A

Here W stays as it is, and the same W' is a LoRA of rank 2 R, of which half is frozen:

    W' = W + s [B, B - B0] [A - A0; A0]        `LoraLayer.factors` in peft_lite/lora.py

So W serves several adapters at once and is there to be restored, and what a file holds fits the
model as it was published.  At first the factors hold zeros where they meet: the output does not
change by a bit, also in 16 bits, and later what was trained keeps its digits beside A0 and B0.
It costs the products of rank 2 R, and R (in + out) numbers that do not train.

Dropout drops inputs of all that is added to W.  HF PEFT drops those of s B A alone, after W lost
s B0 A0, so that the output changes with the first mask.

Shapes:  R rank   W (out, in)   A0 (R, in)   B0 (out, R)   s scaling of the LoRA
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Start = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


def pissa(weight: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A0 and B0, of which s B0 A0 is the best approximation of W of rank R."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    # B0 = U_R sqrt(S_R / s)    A0 = sqrt(S_R / s) V_R^T
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], (U[:, :r] * root).contiguous()


def olora(weight: Tensor, r: int, s: float) -> tuple[Tensor, Tensor]:
    """A0 and B0, the first rows and columns of W = Q T; s does not enter, as in HF PEFT."""
    Q, T = torch.linalg.qr(weight)
    return T[:r].contiguous(), Q[:, :r].contiguous()


STARTS: Mapping[str, Start] = {"pissa": pissa, "olora": olora}
