"""The LoRA product for the few rows of a decoding step, in Triton.

    y = x W^T + b + s (x A^T) B^T,  M <= 16

All the time goes into reading W once, so all multiprocessors have to read: K is split, too.

    decode       part[i] = x [W; A]^T over piece i of K      W and A as one matrix of N + R rows
    decode_sum   y = sum_i part[i][:N] + b + s (sum_i part[i][N:]) B^T

The pieces are summed in their order, so two runs give the same bits.

Shapes:  M rows   K inputs   N outputs   R rank
"""

import triton
import triton.language as tl


@triton.jit
def decode_kernel(
    x_ptr, w_ptr, a_ptr, part_ptr, M, N, K, R, piece, x_m, x_k, w_n, w_k, a_r, a_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
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
    part_ptr, bias_ptr, b_ptr, y_ptr, M, N, R, pieces, b_n, b_r, c,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = x W^T + bias + c (x A^T) B^T out of the parts (pieces, M, N + R), B (N, R)."""
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
