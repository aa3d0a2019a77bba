"""Triton kernels that no route uses until benchmarks/probe.py has shown them ahead on a GPU.

    expand       y = x W^T + b + S B^T by pointers, S = x A^T from a launch before
    expand_tma   the same for Hopper and Blackwell: x, W and y move by the tensor memory
                 accelerator; a program for each multiprocessor takes tile after tile; the
                 update stands before the loop over K (early) or after it (late)
    decode       parts of x [W; A]^T over pieces of K, for at most 16 rows
    decode_sum   y = sum of the parts + b + s (x A^T) B^T

Shapes:  M rows   K inputs   N outputs   R rank
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minigpt_kernels.lora_triton import Tile, kept, launch, multiprocessors

POINTERS = Tile(128, 128, 64, 8, 3)  # for 16-bit elements, as all of them
TMA = (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4))
DECODE, DECODE_SUM = Tile(16, 32, 128, 4, 4), Tile(16, 128, 0, 4, 2)
RANK = 16  # ranks at a time


@triton.jit
def update(
    y,
    s_ptr,
    b_ptr,
    bits_ptr,
    m,
    n,
    column,
    M,
    N,
    R,
    s_m,
    b_n,
    b_r,
    bytes,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Tile (BM, BN) of y + S B^T, S (M, R), B (N, R); with DROP, S B^T is masked.

    Without DROP the product adds to y's own accumulator: a second one would spill.
    """
    total = tl.zeros((BM, BN), tl.float32) if DROP else y
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
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
        total = tl.dot(s, b, total, input_precision="ieee")
    if DROP:
        total = y + tl.where(kept(bits_ptr, m, column, M, bytes, BM, BN), total, 0.0)
    return total


@triton.jit
def tile_at(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of Y a program computes: in groups of rows, so that neighbours share tiles of x
    and W in the cache.
    """
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    return first + pid % (GROUP * tiles_n) % height, pid % (GROUP * tiles_n) // height


@triton.jit
def expand_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    s_ptr,
    b_ptr,
    y_ptr,
    bits_ptr,
    M,
    N,
    K,
    R,
    x_m,
    x_k,
    w_n,
    w_k,
    s_m,
    b_n,
    b_r,
    y_m,
    bytes,
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y (M, N) = x W^T + bias + S B^T, x (M, K), W (N, K), S (M, R), B (N, R).

    With DROP the update counts where dropout kept element (m, n) of an (M, N) input: the gradient
    of a dropped input.
    """
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BM, BN, GROUP)
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    # the update first: xA and B wait for nothing
    y = tl.zeros((BM, BN), tl.float32)
    y = update(
        y,
        s_ptr,
        b_ptr,
        bits_ptr,
        m,
        n,
        tile_n * BN,
        M,
        N,
        R,
        s_m,
        b_n,
        b_r,
        bytes,
        DROP,
        BM,
        BN,
        BR,
    )
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
    out = y_ptr + m[:, None] * y_m + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_tma_kernel(
    x_desc,
    w_desc,
    y_desc,
    bias_ptr,
    s_ptr,
    b_ptr,
    bits_ptr,
    M,
    N,
    K,
    R,
    s_m,
    b_n,
    b_r,
    bytes,
    BIAS: tl.constexpr,
    DROP: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    LATE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As `expand_kernel`; with TRANSPOSED the descriptor is of W^T (K, N)."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_at(tile, M, N, BM, BN, GROUP)
        first_m, first_n = tile_m * BM, tile_n * BN
        m = first_m.to(tl.int64) + tl.arange(0, BM)
        n = first_n.to(tl.int64) + tl.arange(0, BN)
        y = tl.zeros((BM, BN), tl.float32)
        if not LATE:
            y = update(
                y,
                s_ptr,
                b_ptr,
                bits_ptr,
                m,
                n,
                first_n,
                M,
                N,
                R,
                s_m,
                b_n,
                b_r,
                bytes,
                DROP,
                BM,
                BN,
                BR,
            )
        for k in range(0, K, BK):
            x = x_desc.load([first_m, k])
            w = w_desc.load([k, first_n]) if TRANSPOSED else w_desc.load([first_n, k]).T
            y = tl.dot(x, w, y)
        if LATE:
            y = update(
                y,
                s_ptr,
                b_ptr,
                bits_ptr,
                m,
                n,
                first_n,
                M,
                N,
                R,
                s_m,
                b_n,
                b_r,
                bytes,
                DROP,
                BM,
                BN,
                BR,
            )
        if BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
        y_desc.store([first_m, first_n], y.to(y_desc.dtype))


@triton.jit
def decode_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    part_ptr,
    M,
    N,
    K,
    R,
    piece,
    x_m,
    x_k,
    w_n,
    w_k,
    a_r,
    a_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Parts (pieces, M, N + R), x (M, K), W (N, K), A (R, K)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_n = tl.cdiv(N, BN)
    if tile < tiles_n:
        matrix, rows, row, step, first, column = w_ptr, N, w_n, w_k, tile * BN, 0
    else:
        matrix, rows, row, step, first, column = a_ptr, R, a_r, a_k, (tile - tiles_n) * BN, N
    m = tl.arange(0, BM)
    n = first.to(tl.int64) + tl.arange(0, BN)
    y = tl.zeros((BN, BM), tl.float32)  # transposed: the rows of W fill the tensor cores
    for start in range(0, piece, BK):
        k = split * piece + start + tl.arange(0, BK)
        w = tl.load(
            matrix + n[:, None] * row + k[None, :] * step,
            mask=(n[:, None] < rows) & (k[None, :] < K),
            other=0.0,
        )
        x = tl.load(
            x_ptr + m[None, :] * x_m + k[:, None] * x_k,
            mask=(m[None, :] < M) & (k[:, None] < K),
            other=0.0,
        )
        y = tl.dot(w, x, y, input_precision="ieee")
    part = part_ptr + (split.to(tl.int64) * M + m[None, :]) * (N + R) + column + n[:, None]
    tl.store(part, y, mask=(n[:, None] < rows) & (m[None, :] < M))


@triton.jit
def decode_sum_kernel(
    part_ptr,
    bias_ptr,
    b_ptr,
    y_ptr,
    M,
    N,
    R,
    pieces,
    b_n,
    b_r,
    c,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """y (M, N) = x W^T + bias + c (x A^T) B^T out of the parts (pieces, M, N + R), B (N, R)."""
    m = tl.arange(0, BM)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    row = part_ptr + m[:, None] * (N + R)
    y = tl.zeros((BM, BN), tl.float32)
    for start in range(0, R, BR):
        r = start + tl.arange(0, BR)
        xa = tl.zeros((BM, BR), tl.float32)
        for i in range(0, pieces):
            xa += tl.load(
                row + i * M * (N + R) + N + r[None, :],
                mask=(m[:, None] < M) & (r[None, :] < R),
                other=0.0,
            )
        b = tl.load(
            b_ptr + n[None, :] * b_n + r[:, None] * b_r,
            mask=(n[None, :] < N) & (r[:, None] < R),
            other=0.0,
        )
        y = tl.dot(xa, b.to(tl.float32), y, input_precision="ieee")
    y *= c
    inside = (m[:, None] < M) & (n[None, :] < N)
    for i in range(0, pieces):
        y += tl.load(row + i * M * (N + R) + n[None, :], mask=inside, other=0.0)
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


# --- launches -----------------------------------------------------------------------------------


def expand(x: Tensor, w: Tensor, s: Tensor, b: Tensor, tile: Tile) -> Tensor:
    """y (M, N) = x W^T + S B^T by pointers, x (M, K), W (N, K), S (M, R), B (N, R)."""
    (M, K), (N, R) = x.shape, b.shape
    y = x.new_empty(M, N)
    strides = (*x.stride(), *w.stride(), s.stride(0), *b.stride(), N)
    expand_kernel[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
        *(x, w, None, s, b, y, None, M, N, K, R, *strides, 0),
        **{"BIAS": False, "DROP": False, **sizes(tile), **launch(tile)},
    )
    return y


def expand_tma(x: Tensor, w: Tensor, s: Tensor, b: Tensor, tile: Tile, late: bool) -> Tensor:
    """As `expand`, by descriptors: rows of x, of W or W^T, and of y start at multiples of 16
    bytes.
    """
    (M, K), (N, R) = x.shape, b.shape
    y = x.new_empty(M, N)
    transposed = w.stride(1) != 1
    box = [tile.BK, tile.BN] if transposed else [tile.BN, tile.BK]
    tiles = triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN)
    expand_tma_kernel[(min(multiprocessors(x.device), tiles),)](
        TensorDescriptor.from_tensor(x, [tile.BM, tile.BK]),
        TensorDescriptor.from_tensor(w.T if transposed else w, box),
        TensorDescriptor.from_tensor(y, [tile.BM, tile.BN]),
        *(None, s, b, None, M, N, K, R, s.stride(0), *b.stride(), 0),
        **{"BIAS": False, "DROP": False, "TRANSPOSED": transposed, "LATE": late},
        **{**sizes(tile), **launch(tile)},
    )
    return y


def decode(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: float) -> Tensor:
    """y (M, N) = x W^T + c (x A^T) B^T for at most 16 rows."""
    (M, K), (N, R) = x.shape, b.shape
    tile = DECODE
    columns = triton.cdiv(N, tile.BN) + triton.cdiv(R, tile.BN)
    wanted = triton.cdiv(2 * multiprocessors(x.device), columns)
    piece = triton.cdiv(triton.cdiv(K, wanted), tile.BK) * tile.BK
    pieces = triton.cdiv(K, piece)
    parts = x.new_empty(pieces, M, N + R, dtype=torch.float32)
    decode_kernel[(columns, pieces)](
        *(x, w, a, parts, M, N, K, R, piece, *x.stride(), *w.stride(), *a.stride()),
        **{"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, **launch(tile)},
    )
    y = x.new_empty(M, N)
    decode_sum_kernel[(triton.cdiv(N, DECODE_SUM.BN),)](
        *(parts, None, b, y, M, N, R, pieces, *b.stride(), c),
        **{"BIAS": False, "BM": tile.BM, "BN": DECODE_SUM.BN, "BR": RANK, **launch(DECODE_SUM)},
    )
    return y


def sizes(tile: Tile) -> dict[str, int]:
    return {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "BR": RANK, "GROUP": 8}
