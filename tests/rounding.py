"""Tolerances that come from the dtype."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def close(
    got: Tensor, want: ArrayLike, dtype: torch.dtype | None = None, roundings: float = 8
) -> None:
    """Of one shape, and apart by at most some roundings of the largest magnitude.

    Args:
        dtype: the precision of the computation; None: that of `got`.
    """
    actual, expected = got.detach().double().numpy(), np.asarray(want, dtype=np.float64)
    assert actual.shape == expected.shape
    limit = roundings * torch.finfo(dtype or got.dtype).eps * np.abs(expected).max(initial=0.0)
    error = np.abs(actual - expected).max(initial=0.0)
    assert error <= limit, f"{error:.3g} apart, {limit:.3g} allowed"


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers, the same in every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
