"""What the methods must compute, in float64 NumPy and without a line of the library.

Shapes:  M rows   K inputs   N outputs   R rank
"""

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray


def lora_scale(alpha: float, r: int, rslora: bool = False) -> float:
    return alpha / math.sqrt(r) if rslora else alpha / r


def lora_weight(w: ArrayLike, a: ArrayLike, b: ArrayLike, s: float) -> Array:
    """W' = W + s B A, (N, K)."""
    return _f64(w) + s * (_f64(b) @ _f64(a))


def lora_forward(
    x: ArrayLike, w: ArrayLike, bias: ArrayLike | None, a: ArrayLike, b: ArrayLike, s: float
) -> Array:
    """Y = X W'^T + bias, (M, N)."""
    y = _f64(x) @ lora_weight(w, a, b, s).T
    return y if bias is None else y + _f64(bias)


def lora_gradients(
    x: ArrayLike,
    dy: ArrayLike,
    w: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    s: float,
    kept: ArrayLike = 1.0,
) -> tuple[Array, Array, Array]:
    """(dX, dA, dB) of Y = X W^T + s (kept * X) A^T B^T; `kept` is the dropout mask over 1 - p.

    dA = s B^T dY^T X     dB = s dY^T X A^T     dX = dY W + kept * s dY B A
    """
    x, dy, a, b, kept = map(_f64, (x, dy, a, b, kept))
    da = s * b.T @ dy.T @ (kept * x)
    db = s * dy.T @ (kept * x) @ a.T
    return dy @ _f64(w) + kept * (s * dy @ b @ a), da, db


def lora_gradients_of_weight(
    dw: ArrayLike, a: ArrayLike, b: ArrayLike, s: float
) -> tuple[Array, Array]:
    """(dA, dB) by the chain rule from dW', the gradient of the dense weight."""
    return s * _f64(b).T @ _f64(dw), s * _f64(dw) @ _f64(a).T


def lora_count(r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Sum over layers (N, K) of R (N + K)."""
    return sum(r * (n + k) for n, k in shapes)


def _f64(x: ArrayLike) -> Array:
    return np.asarray(x, dtype=np.float64)
