"""The LoRA product in Triton: three kernels for the forward and the backward pass.

    shrink   S = c (drop(x) A^T)             a program for some rows, all of R at once
    expand   y = x W^T + b + c S B^T         one accumulator for both products
    outer    D = X^T Y, summed over the rows in pieces of a fixed order (no atomics)

    forward   xA = shrink(x, A)              y  = expand(x, W, b, xA, B)
    backward  dS = shrink(dy, B^T)           dx = expand(dy, W^T, dS, A^T), its update masked
              dA = outer(dS, drop(x))        dB = outer(dy, xA)

A matrix comes with its strides, so its transpose is the same matrix with them swapped.  Every
edge is masked: sizes are what they are.  Sums are float32; float32 inputs are multiplied as such
("ieee"), not as tf32.

Dropout keeps element (m, k) where Philox of (seed, m K + k) is at least p; its bits are not stored,
each kernel that needs them computes them again.

Shapes:  M rows   K inputs   N outputs   R rank, padded to at least 16 for the product
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kept(seed, m, k, K, p):
    """Which of the elements (m, k) of x (M, K) dropout keeps."""
    return tl.rand(seed, m.to(tl.int64) * K + k) >= p


@triton.jit
def shrink_kernel(
    x_ptr, a_ptr, s_ptr, M, K, R, x_m, x_k, a_r, a_k, s_m, c, p, seed,
    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """S (M, R) = c drop(x) A^T, x (M, K), A (R, K).  One program for BM rows, all of R."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.arange(0, BR)
    s = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (m[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_ptr + m[:, None] * x_m + k[None, :] * x_k, mask=inside, other=0.0)
        if DROP:
            x = tl.where(_kept(seed, m[:, None], k[None, :], K, p), x, 0.0)
        a = tl.load(
            a_ptr + r[None, :] * a_r + k[:, None] * a_k,
            mask=(r[None, :] < R) & (k[:, None] < K),
            other=0.0,
        )
        s = tl.dot(x, a, s, input_precision="ieee")
    s = (c * s).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + m[:, None] * s_m + r[None, :], s, mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit
def expand_kernel(
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, y_ptr, M, N, K, R,
    x_m, x_k, w_n, w_k, s_m, b_n, b_r, y_m, c, p, seed,
    BIAS: tl.constexpr, DROP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = x W^T + bias + c S B^T, x (M, K), W (N, K), S (M, R), B (N, R).

    With DROP the update counts where dropout kept element (m, n) of an (M, N) input: the gradient
    of a dropped input.
    """
    # programs in groups of rows, so that neighbours share tiles of x and W in the cache
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % height
    tile_n = pid % (GROUP * tiles_n) // height
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)

    # the update first: xA and B wait for nothing
    s = tl.load(
        s_ptr + m[:, None] * s_m + r[None, :],
        mask=(m[:, None] < M) & (r[None, :] < R),
        other=0.0,
    )
    b = tl.load(
        b_ptr + n[None, :] * b_n + r[:, None] * b_r,
        mask=(n[None, :] < N) & (r[:, None] < R),
        other=0.0,
    )
    y = c * tl.dot(s, b, input_precision="ieee")
    if DROP:
        y = tl.where(_kept(seed, m[:, None], n[None, :], N, p), y / (1 - p), 0.0)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(
            x_ptr + m[:, None] * x_m + k[None, :] * x_k,
            mask=(m[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        w = tl.load(
            w_ptr + n[None, :] * w_n + k[:, None] * w_k,
            mask=(n[None, :] < N) & (k[:, None] < K),
            other=0.0,
        )
        y = tl.dot(x, w, y, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y_ptr + m[:, None] * y_m + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    x_ptr, s_ptr, part_ptr, M, K, R, rows, x_m, x_k, s_m, c, p, seed,
    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Parts (pieces, R, K) of c S^T drop(x), x (M, K), S (M, R): each sums over `rows` of the M."""
    k = tl.program_id(0).to(tl.int64) * BK + tl.arange(0, BK)
    piece = tl.program_id(1).to(tl.int64)
    r = tl.arange(0, BR)
    d = tl.zeros((BR, BK), tl.float32)
    for start in range(0, rows, BM):
        m = piece * rows + start + tl.arange(0, BM)
        x = tl.load(
            x_ptr + m[:, None] * x_m + k[None, :] * x_k,
            mask=(m[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        if DROP:
            x = tl.where(_kept(seed, m[:, None], k[None, :], K, p), x, 0.0)
        s = tl.load(
            s_ptr + m[None, :] * s_m + r[:, None],
            mask=(m[None, :] < M) & (r[:, None] < R),
            other=0.0,
        )
        d = tl.dot(s, x, d, input_precision="ieee")
    inside = (r[:, None] < R) & (k[None, :] < K)
    tl.store(part_ptr + (piece * R + r[:, None]) * K + k[None, :], c * d, mask=inside)


def shrink(x: Tensor, a: Tensor, c: float, p: float = 0.0, seed: int = 0) -> Tensor:
    """S (M, R) = c drop(x) A^T / (1 - p), x (M, K), A (R, K)."""
    (M, K), R = x.shape, len(a)
    s = x.new_empty(M, R)
    tile = skinny_tile(R)
    shrink_kernel[(triton.cdiv(M, tile["BM"]),)](
        x, a, s, M, K, R, *x.stride(), *a.stride(), s.stride(0), c / (1 - p), p, seed,
        DROP=p > 0, BR=rank_tile(R), **tile,
    )  # fmt: skip
    return s


def expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: float,
    p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """Y (M, N) = x W^T + bias + c S B^T, the update masked by the dropout of an (M, N) input."""
    (M, K), (N, R) = x.shape, b.shape
    y = x.new_empty(M, N)
    tile = tile_of(M, x.dtype)
    programs = triton.cdiv(M, tile["BM"]) * triton.cdiv(N, tile["BN"])
    expand_kernel[(programs,)](
        x, w, bias, s, b, y, M, N, K, R,
        *x.stride(), *w.stride(), s.stride(0), *b.stride(), y.stride(0), c, p, seed,
        BIAS=bias is not None, DROP=p > 0, BR=rank_tile(R), **tile,
    )  # fmt: skip
    return y


def outer(s: Tensor, x: Tensor, c: float, p: float = 0.0, seed: int = 0) -> Tensor:
    """D (R, K) = c S^T drop(x) / (1 - p), in float32, x (M, K), S (M, R)."""
    (M, K), R = x.shape, s.size(1)
    tile = skinny_tile(R)
    pieces = max(1, min(16, triton.cdiv(M, 512)))
    rows = triton.cdiv(triton.cdiv(M, pieces), tile["BM"]) * tile["BM"]
    parts = x.new_empty(pieces, R, K, dtype=torch.float32)
    outer_kernel[(triton.cdiv(K, tile["BK"]), pieces)](
        x, s, parts, M, K, R, rows, *x.stride(), s.stride(0), c / (1 - p), p, seed,
        DROP=p > 0, BR=rank_tile(R), **tile,
    )  # fmt: skip
    return parts.sum(0)


def rank_tile(R: int) -> int:
    """The rank as a power of two that a product takes."""
    return max(16, triton.next_power_of_2(R))


def skinny_tile(R: int) -> dict[str, int]:
    """Tile sizes and launch options of `shrink` and `outer`."""
    return {"BM": 32, "BK": 64, "num_warps": 4 if R <= 64 else 8, "num_stages": 2}


def tile_of(M: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and launch options of `expand`."""
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    if M <= 32:
        return {"BM": 16, "BN": 64, "BK": 128, "GROUP": 8, "num_warps": 4, "num_stages": 4}
    return {"BM": 128, "BN": 128, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
