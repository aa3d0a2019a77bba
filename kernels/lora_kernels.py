"""The LoRA product in Triton: four kernels for the forward and the backward pass.

    keep     one bit for each element of x: Philox of the seed is at least p
    shrink   S = c (drop(x) A^T)             a program for some rows and ranks
    expand   Y = x W^T + b + c S B^T         one accumulator for both products
    outer    D = c S^T drop(x)               summed over the rows in pieces of a fixed order

    forward   xA = shrink(x, A)              y  = expand(x, W, b, xA, B)
    backward  dS = shrink(dy, B^T)           dx = expand(dy, W^T, dS, A^T), its update masked
              dA = outer(dS, x)              dB = outer(xA, dy)^T

A matrix comes with its strides, so its transpose is the same matrix with them swapped.  Every
edge is masked: sizes are what they are.  Sums are float32 without atomics, so two runs give the
same bits; float32 inputs are multiplied as such ("ieee"), not as tf32.

Drawing a random number costs more than a multiplication of the product, so it is drawn once: bit
k % 8 of byte (m, k // 8) says whether element (m, k) is kept.

Shapes:  M rows   K inputs   N outputs   R rank, padded to at least 16 for the product
"""

import triton
import triton.language as tl


@triton.jit
def keep_kernel(seed_ptr, bits_ptr, n, threshold, BLOCK: tl.constexpr):
    """Bits (n bytes): 0 with probability threshold / 2^32."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr)
    least = tl.cast(threshold, tl.uint32)
    byte = tl.zeros((BLOCK,), tl.int32)
    for half in tl.static_range(2):
        r0, r1, r2, r3 = tl.randint4x(seed, 2 * i + half)
        four = (r0 >= least).to(tl.int32) | (r1 >= least).to(tl.int32) << 1
        four |= (r2 >= least).to(tl.int32) << 2 | (r3 >= least).to(tl.int32) << 3
        byte |= four << (4 * half)
    tl.store(bits_ptr + i, byte.to(tl.uint8), mask=i < n)


@triton.jit
def kept(bits_ptr, m, column, M, bytes, BM: tl.constexpr, BK: tl.constexpr):
    """Tile (BM, BK) of the mask, from `column` on, out of bits (M, bytes)."""
    i = column // 8 + tl.arange(0, BK // 8)
    inside = (m[:, None] < M) & (i[None, :] < bytes)
    byte = tl.load(bits_ptr + m[:, None] * bytes + i[None, :], mask=inside, other=0)
    bits = byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (BM, BK)) != 0


@triton.jit
def shrink_kernel(
    x_ptr, a_ptr, s_ptr, bits_ptr, M, K, R, x_m, x_k, a_r, a_k, s_m, bytes, c,
    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """S (M, R) = c drop(x) A^T, x (M, K), A (R, K)."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    s = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside = (m[:, None] < M) & (k[None, :] < K)
        x = tl.load(x_ptr + m[:, None] * x_m + k[None, :] * x_k, mask=inside, other=0.0)
        if DROP:
            x = tl.where(kept(bits_ptr, m, start, M, bytes, BM, BK), x, 0.0)
        a = tl.load(
            a_ptr + r[None, :] * a_r + k[:, None] * a_k,
            mask=(r[None, :] < R) & (k[:, None] < K),
            other=0.0,
        )
        s = tl.dot(x, a, s, input_precision="ieee")
    s = (c * s).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + m[:, None] * s_m + r[None, :], s, mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit
def update(
    s_ptr, b_ptr, bits_ptr, m, n, column, M, N, R, s_m, b_n, b_r, bytes, c,
    DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Tile (BM, BN) of c S B^T, S (M, R), B (N, R), masked with DROP."""
    y = tl.zeros((BM, BN), tl.float32)
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
        y = tl.dot(s, b, y, input_precision="ieee")
    y *= c
    if DROP:
        y = tl.where(kept(bits_ptr, m, column, M, bytes, BM, BN), y, 0.0)
    return y


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
    x_ptr, w_ptr, bias_ptr, s_ptr, b_ptr, y_ptr, bits_ptr, M, N, K, R,
    x_m, x_k, w_n, w_k, s_m, b_n, b_r, y_m, bytes, c,
    BIAS: tl.constexpr, DROP: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Y (M, N) = x W^T + bias + c S B^T, x (M, K), W (N, K), S (M, R), B (N, R); added to what Y
    holds with ADD.

    With DROP the update counts where dropout kept element (m, n) of an (M, N) input: the gradient
    of a dropped input.
    """
    tile_m, tile_n = tile_at(tl.program_id(0), M, N, BM, BN, GROUP)
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    # the update first: xA and B wait for nothing
    y = update(
        s_ptr, b_ptr, bits_ptr, m, n, tile_n * BN, M, N, R, s_m, b_n, b_r, bytes, c,
        DROP, BM, BN, BR,
    )  # fmt: skip
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
    if ADD:
        y += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def outer_kernel(
    x_ptr, s_ptr, part_ptr, bits_ptr, M, K, R, rows, x_m, x_k, s_m, bytes, c,
    DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Parts (pieces, R, K) of c S^T drop(x), x (M, K), S (M, R): each sums over `rows` of the M."""
    column = tl.program_id(0) * BK
    k = column.to(tl.int64) + tl.arange(0, BK)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    piece = tl.program_id(2).to(tl.int64)
    d = tl.zeros((BR, BK), tl.float32)
    for start in range(0, rows, BM):
        m = piece * rows + start + tl.arange(0, BM)
        x = tl.load(
            x_ptr + m[:, None] * x_m + k[None, :] * x_k,
            mask=(m[:, None] < M) & (k[None, :] < K),
            other=0.0,
        )
        if DROP:
            x = tl.where(kept(bits_ptr, m, column, M, bytes, BM, BK), x, 0.0)
        s = tl.load(
            s_ptr + m[None, :] * s_m + r[:, None],
            mask=(m[None, :] < M) & (r[:, None] < R),
            other=0.0,
        )
        d = tl.dot(s, x, d, input_precision="ieee")
    inside = (r[:, None] < R) & (k[None, :] < K)
    tl.store(part_ptr + (piece * R + r[:, None]) * K + k[None, :], c * d, mask=inside)
