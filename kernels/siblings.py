"""Several LoRA layers of one input, one after the other."""

from typing import NamedTuple

import torch
from torch import Tensor

from .lora import lora_linear


class Lora(NamedTuple):
    """The tensors and the scaling of one LoRA layer."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: float


def lora_linears(
    x: Tensor,
    loras: list[Lora],
    dropout_p: float = 0.0,
    seed: int | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """One (..., N_i) for each of `loras`; with dropout all of them drop the same inputs."""
    if dropout_p and seed is None:
        seed = int(torch.randint(2**31, ()))
    options = {} if backend == "auto" else {"backend": backend}
    return [lora_linear(x, *lora, dropout_p, seed, **options) for lora in loras]
