"""Rotary positions.  Su et al. 2021, https://arxiv.org/abs/2104.09864

A head's numbers i and i + N/2 are a point in the plane, which position m turns by the angle m f_i:

    x_i       <- x_i cos(m f_i) - x_{i+N/2} sin(m f_i)
    x_{i+N/2} <- x_{i+N/2} cos(m f_i) + x_i sin(m f_i)        f_i = theta^(-2 i / N), i < N/2

so that the product of a query at m and a key at n depends on m - n alone.

A model trained on C positions reads more of them where the angles grow slower (`rope_scaling`):

    linear    f / s                                  Chen et al. 2023, https://arxiv.org/abs/2306.15595
    llama3    f       where a turn takes less than C / h positions      Llama 3.1,
              f / s   where it takes more than C / l                    https://arxiv.org/abs/2407.21783
              between the two (1 - u) f / s + u f,   u = (C f / 2 pi - l) / (h - l)

s is `factor`, l `low_freq_factor`, h `high_freq_factor`, C `original_max_position_embeddings`.

Shapes:  B batch   H heads   T time   N width of a head
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Scaling = Mapping[str, float | str]
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def check_scaling(scaling: Scaling) -> None:
    """Raises ValueError for a `rope_scaling` that is unknown or lacks a number."""
    kind = scaling.get("rope_type", "default")
    if kind not in SCALINGS:
        raise ValueError(f"rope_type is {kind!r}, must be one of {', '.join(SCALINGS)}")
    for name in SCALINGS[str(kind)]:
        value = scaling.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"rope_scaling: {name} is {value!r}, must be a positive number")


def frequencies(N: int, theta: float, scaling: Scaling, device: torch.device) -> Tensor:
    """f (N/2,), in float32."""
    f = theta ** -(torch.arange(0, N, 2, dtype=torch.float32, device=device) / N)
    kind = scaling.get("rope_type", "default")
    if kind == "default":
        return f
    s = float(scaling["factor"])
    if kind == "linear":
        return f / s
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = float(scaling["original_max_position_embeddings"]) * f / (2 * math.pi)  # C f / 2 pi
    u = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - u) * f / s + u * f


def rotation(position_ids: Tensor, f: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Positions (B or 1, T) -> cosines and sines of the angles, (B or 1, 1, T, N)."""
    angles = position_ids[:, None, :, None] * f  # in float32: bfloat16 cannot count to 300
    angles = torch.cat([angles, angles], -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, N), each head's pairs turned by the angles of their positions."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
