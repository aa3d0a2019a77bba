"""What the methods must compute, in float64 NumPy and without a line of the library.

Shapes:  M rows   K inputs   N outputs   R rank   V vocabulary   D width   L layers   P prefix
         H heads   T queries   S keys   n head width
"""

import math
from collections.abc import Callable, Iterable

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


# LoRA of an embedding table


def embedding_forward(ids: ArrayLike, e: ArrayLike, a: ArrayLike, b: ArrayLike, s: float) -> Array:
    """Y = E'[id],  E' = E + s (B A)^T, (..., D)."""
    return lora_weight(_f64(e).T, a, b, s).T[np.asarray(ids)]


def embedding_gradients(
    ids: ArrayLike, dy: ArrayLike, a: ArrayLike, b: ArrayLike, s: float
) -> tuple[Array, Array]:
    """(dA, dB): token i adds s B^T dy_i to column id_i of A, and s dy_i A[:, id_i]^T to B."""
    a, b, dy = map(_f64, (a, b, dy))
    da, db = np.zeros_like(a), np.zeros_like(b)
    for i, row in zip(np.ravel(ids), dy.reshape(-1, dy.shape[-1]), strict=True):
        da[:, i] += s * b.T @ row
        db += s * np.outer(row, a[:, i])
    return da, db


# DoRA


def dora_weight(w: ArrayLike, a: ArrayLike, b: ArrayLike, s: float, m: ArrayLike) -> Array:
    """W'_i = m_i V_i / |V_i|,  V = W + s B A, (N, K).  Of a table: of its transpose."""
    v = lora_weight(w, a, b, s)
    return (_f64(m) / _row_norms(v))[:, None] * v


def dora_forward(
    x: ArrayLike,
    w: ArrayLike,
    bias: ArrayLike | None,
    a: ArrayLike,
    b: ArrayLike,
    s: float,
    m: ArrayLike,
    kept: ArrayLike = 1.0,
) -> Array:
    """Y = g * (X W^T + s (kept * X) A^T B^T) + bias,  g = m / |V|, (M, N)."""
    x, a, b, kept = map(_f64, (x, a, b, kept))
    g = _f64(m) / _row_norms(lora_weight(w, a, b, s))
    y = g * (x @ _f64(w).T + s * (kept * x) @ a.T @ b.T)
    return y if bias is None else y + _f64(bias)


def dora_gradients(
    x: ArrayLike,
    dy: ArrayLike,
    w: ArrayLike,
    a: ArrayLike,
    b: ArrayLike,
    s: float,
    m: ArrayLike,
    detached: bool,
    kept: ArrayLike = 1.0,
) -> tuple[Array, Array, Array, Array]:
    """(dX, dA, dB, dm) of Y = g * Z + bias,  Z = X W^T + s (kept * X) A^T B^T,  g = m / |V|.

    dm = sum over rows of dY * Z / |V|;   dX, dA, dB are those of Z under dZ = g * dY
    and, where |V| is no constant, dV_i = (sum over rows of dY_i Z_i) (-m_i / |V_i|^2) V_i / |V_i|
    adds  dA += s B^T dV,  dB += s dV A^T
    """
    dy, m, v = _f64(dy), _f64(m), lora_weight(w, a, b, s)
    norm = _row_norms(v)
    z = dora_forward(x, w, None, a, b, s, norm, kept)
    dg = (dy * z).sum(0)
    dx, da, db = lora_gradients(x, dy * (m / norm), w, a, b, s, kept)
    if not detached:
        dv = (-dg * m / norm**3)[:, None] * v
        more_a, more_b = lora_gradients_of_weight(dv, a, b, s)
        da, db = da + more_a, db + more_b
    return dx, da, db, dg / norm


def dora_count(r: int, shapes: Iterable[tuple[int, int]]) -> int:
    """Sum over layers (N, K) of R (N + K) + N."""
    return sum(lora_count(r, [(n, k)]) + n for n, k in shapes)


# Bottleneck adapters


def _erf(z: Array) -> Array:
    return np.vectorize(math.erf, otypes=[float])(z)


def _sigmoid(z: Array) -> Array:
    return 1 / (1 + np.exp(-z))


# sigma and sigma'
NON_LINEARITIES: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0).astype(float)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "silu": (
        lambda z: z * _sigmoid(z),
        lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z))),
    ),
    "gelu": (
        lambda z: z * (1 + _erf(z / math.sqrt(2))) / 2,
        lambda z: (
            (1 + _erf(z / math.sqrt(2))) / 2 + z * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
        ),
    ),
}


def adapter_forward(
    h: ArrayLike, down: ArrayLike, c: ArrayLike, up: ArrayLike, d: ArrayLike, sigma: str
) -> Array:
    """W_up sigma(W_down h + c) + d for every row h, (M, D)."""
    inner = NON_LINEARITIES[sigma][0](_f64(h) @ _f64(down).T + _f64(c))
    return inner @ _f64(up).T + _f64(d)


def adapter_jacobian(
    h: ArrayLike, down: ArrayLike, c: ArrayLike, up: ArrayLike, sigma: str
) -> Array:
    """W_up diag(sigma'(W_down h + c)) W_down for one row h, (D, D)."""
    slope = NON_LINEARITIES[sigma][1](_f64(down) @ _f64(h) + _f64(c))
    return _f64(up) @ np.diag(slope) @ _f64(down)


def adapter_gradients(
    h: ArrayLike, dy: ArrayLike, down: ArrayLike, c: ArrayLike, up: ArrayLike, sigma: str
) -> tuple[Array, Array, Array, Array, Array]:
    """(dh, dW_down, dc, dW_up, dd) of Y = sigma(Z) W_up^T + d,  Z = H W_down^T + c.

    dZ = dY W_up * sigma'(Z)    dh = dZ W_down    dW_down = dZ^T H    dc = sum over rows of dZ
    dW_up = dY^T sigma(Z)       dd = sum over rows of dY
    """
    h, dy, down, up = map(_f64, (h, dy, down, up))
    value, slope = NON_LINEARITIES[sigma]
    z = h @ down.T + _f64(c)
    dz = dy @ up * slope(z)
    return dz @ down, dz.T @ h, dz.sum(0), dy.T @ value(z), dy.sum(0)


def adapter_count(width: int, r: int) -> int:
    """2 D R + R + D."""
    return 2 * width * r + r + width


# IA3


def ia3_weight(
    w: ArrayLike, bias: ArrayLike | None, scale: ArrayLike, before: bool
) -> tuple[Array, Array | None]:
    """W' and b': W diag(l) and b where l scales the input, diag(l) W and l * b the output."""
    w, scale = _f64(w), _f64(scale)
    if before:
        return w @ np.diag(scale), None if bias is None else _f64(bias)
    return np.diag(scale) @ w, None if bias is None else scale * _f64(bias)


def ia3_forward(
    x: ArrayLike, w: ArrayLike, bias: ArrayLike | None, scale: ArrayLike, before: bool
) -> Array:
    """Y = (l * X) W^T + b  or  l * (X W^T + b), (M, N)."""
    c = 0.0 if bias is None else _f64(bias)
    x, w, scale = map(_f64, (x, w, scale))
    return (scale * x) @ w.T + c if before else scale * (x @ w.T + c)


def ia3_gradients(
    x: ArrayLike,
    dy: ArrayLike,
    w: ArrayLike,
    bias: ArrayLike | None,
    scale: ArrayLike,
    before: bool,
) -> tuple[Array, Array]:
    """(dX, dl).

    l before:  dX = l * (dY W)    dl = sum over rows of X * (dY W)
    l after:   dX = (l * dY) W    dl = sum over rows of dY * (X W^T + b)
    """
    x, dy, w, scale = map(_f64, (x, dy, w, scale))
    if before:
        return scale * (dy @ w), (x * (dy @ w)).sum(0)
    c = 0.0 if bias is None else _f64(bias)
    return (scale * dy) @ w, (dy * (x @ w.T + c)).sum(0)


# Prefix and prompt


def attention_forward(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, sees: ArrayLike, scale: float
) -> tuple[Array, Array]:
    """(softmax(scale Q K^T) V over the keys that `sees` (T, S) tells, log Z), for every head.

    Z (..., T, 1) is the sum of exp of the scores that are seen.
    """
    e, largest = _exp_scores(q, k, sees, scale)
    z = e.sum(-1, keepdims=True)
    return e @ _f64(v) / z, np.log(z) + largest


def attention_gradients(
    q: ArrayLike, k: ArrayLike, v: ArrayLike, sees: ArrayLike, scale: float, dy: ArrayLike
) -> tuple[Array, Array]:
    """(dK, dV).   dV = W^T dY,   dK = scale dS^T Q,   dS = W * (dY V^T - sum_s W * dY V^T)."""
    e, _ = _exp_scores(q, k, sees, scale)
    w, dy = e / e.sum(-1, keepdims=True), _f64(dy)
    dw = dy @ _f64(v).swapaxes(-1, -2)
    ds = w * (dw - (w * dw).sum(-1, keepdims=True))
    return scale * ds.swapaxes(-1, -2) @ _f64(q), w.swapaxes(-1, -2) @ dy


def prefix_attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    sees: ArrayLike,
    prefix_k: ArrayLike,
    prefix_v: ArrayLike,
    sees_prefix: ArrayLike,
    scale: float,
) -> Array:
    """Mixed: c attention(q, P_k, P_v) + (1 - c) attention(q, K, V),  c = Z_P / (Z_P + Z)."""
    real, log_z = attention_forward(q, k, v, sees, scale)
    blind = ~np.any(sees_prefix, axis=-1, keepdims=True)  # c = 0; any value but 0 / 0 will do
    prefixed, prefixed_log_z = attention_forward(q, prefix_k, prefix_v, sees_prefix | blind, scale)
    c = np.where(blind, 0.0, 1 / (1 + np.exp(log_z - prefixed_log_z)))
    return c * prefixed + (1 - c) * real


def visible_slots(
    queries: int, slots: int, prefix: int, window: int | None, counted: bool
) -> Array:
    """(T, P + S): whether query t sees slot j, one by one.  Prefix slots come first.

    A query sees itself and what stands before it, `window` slots at most; the prefix is among
    those where it is `counted`, and otherwise seen by all.
    """
    sees = np.zeros((queries, prefix + slots), dtype=bool)
    for t in range(queries):
        place = prefix + slots - queries + t
        for j in range(place + 1):
            near = window is None or place - j < window
            sees[t, j] = near or (j < prefix and not counted)
    return sees


def prefix_of_mlp(
    e: ArrayLike, w1: ArrayLike, b1: ArrayLike, w2: ArrayLike, b2: ArrayLike
) -> Array:
    """tanh(E W_1^T + b_1) W_2^T + b_2, (P, 2 L D)."""
    return np.tanh(_f64(e) @ _f64(w1).T + _f64(b1)) @ _f64(w2).T + _f64(b2)


def prefix_count(length: int, layers: int, width: int) -> int:
    """2 L P D."""
    return 2 * layers * length * width


def prefix_mlp_count(length: int, layers: int, width: int, inner: int) -> int:
    """E, W_1, b_1, W_2, b_2:  P D + I D + I + 2 L D I + 2 L D."""
    return length * width + inner * width + inner + 2 * layers * width * (inner + 1)


def prompt_count(length: int, width: int) -> int:
    """P D."""
    return length * width


def _exp_scores(q: ArrayLike, k: ArrayLike, sees: ArrayLike, scale: float) -> tuple[Array, Array]:
    """Exp of the scores less their largest, 0 where nothing is seen, and that largest."""
    scores = scale * _f64(q) @ _f64(k).swapaxes(-1, -2)
    scores = np.where(sees, scores, -np.inf)
    largest = scores.max(-1, keepdims=True)
    return np.exp(scores - largest), largest


def _row_norms(v: Array) -> Array:
    return np.sqrt((v**2).sum(1))


def _f64(x: ArrayLike) -> Array:
    return np.asarray(x, dtype=np.float64)
