"""The LoRA product in Triton: the equations and letters of kernels/lora.py.

    keep      one bit for each element of x: 16 bits of Philox are at least 2^16 p
    shrink    xA = c (m x) A^T
    fused     y = x W^T + b + xA B^T and xA in one launch; dx and dS by the same kernel
    dy_pass   one pass over dy: parts of dS = c dy B and of dB = dy^T xA
    outer     parts of dA = dS^T (m x), or of dB
    sum       adds the parts of two tensors in their order, and casts them

    route "triton"   shrink, torch's products to y; dy_pass, sum, torch's products to dx, outer, sum
    route "fused"    fused; fused, outer twice, sum

A matrix comes with its strides, so its transpose is the same matrix with them swapped.  Every edge
is masked, offsets are int64, sums are float32 without atomics.  float32 inputs are multiplied as
such ("ieee"), not as tf32.  The rank is padded to at least 16.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import threshold, unpack


class Tile(NamedTuple):
    """(BM, BN) of the output in steps of BK, by `warps` warps with `stages` steps under way."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


# by bytes of an element; `python -m minigpt_kernels.compile_check` compiles all of them
FUSED = {
    2: (Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 8, 3)),
    4: (Tile(64, 64, 32, 8, 3), Tile(32, 64, 32, 4, 3)),
}
ODD = {2: Tile(64, 64, 32, 8, 3), 4: Tile(64, 64, 16, 8, 3)}  # addresses element by element
SHRINK = {2: Tile(32, 0, 64, 4, 3), 4: Tile(32, 0, 32, 4, 3)}
DY_PASS = {2: Tile(64, 64, 0, 8, 3), 4: Tile(64, 32, 0, 8, 3)}
OUTER = {2: Tile(64, 0, 64, 4, 3), 4: Tile(32, 0, 32, 4, 3)}
RANKS = {2: (16, 32, 64), 4: (16, 32)}  # ranks at a time
MOST = 32  # ranks in a program of `dy_pass` and `fused`: more would take too many registers
KEEP, SUM = 1024, 1024  # elements of a program


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def keep_kernel(seed_ptr, bits_ptr, n, least, BLOCK: tl.constexpr):
    """Bits (n bytes): 0 with probability least / 2^16.  One Philox gives the eight of a byte."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    r0, r1, r2, r3 = tl.randint4x(tl.load(seed_ptr), i)
    byte = two(r0, least) | two(r1, least) << 2 | two(r2, least) << 4 | two(r3, least) << 6
    tl.store(bits_ptr + i, byte.to(tl.uint8), mask=i < n)


@triton.jit
def two(word, least):
    """The two bits of the halves of a word."""
    low, high = (word & 0xFFFF).to(tl.int32), (word >> 16 & 0xFFFF).to(tl.int32)
    return (low >= least).to(tl.int32) | (high >= least).to(tl.int32) << 1


@triton.jit
def kept(bits_ptr, m, column, M, bytes, BM: tl.constexpr, BK: tl.constexpr):
    """Tile (BM, BK) of the mask, from `column` on, out of bits (M, bytes)."""
    i = column // 8 + tl.arange(0, BK // 8)
    inside = (m[:, None] < M) & (i[None, :] < bytes)
    byte = tl.load(bits_ptr + m[:, None] * bytes + i[None, :], mask=inside, other=0)
    bits = byte.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]
    return tl.reshape(bits & 1, (BM, BK)) != 0


@triton.jit
def tile_of(t_ptr, row, column, rows, columns, t_row, t_column):
    """T[row, column], zero outside of (rows, columns)."""
    return tl.load(
        t_ptr + row * t_row + column * t_column, mask=(row < rows) & (column < columns), other=0.0
    )


@triton.jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    s_ptr,
    bits_ptr,
    M,
    K,
    R,
    x_m,
    x_k,
    a_r,
    a_k,
    bytes,
    c,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """S (M, R) = c (m x) A^T, x (M, K), A (R, K)."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    r = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    s = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        x = tile_of(x_ptr, m[:, None], k[None, :], M, K, x_m, x_k)
        if DROP:
            x = tl.where(kept(bits_ptr, m, start, M, bytes, BM, BK), x, 0.0)
        a = tile_of(a_ptr, r[None, :], k[:, None], R, K, a_r, a_k)
        s = tl.dot(x, a.to(x.dtype), s, input_precision="ieee")
    s = (c * s).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + m[:, None] * R + r[None, :], s, mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit
def fused_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    a_ptr,
    b_ptr,
    y_ptr,
    s_ptr,
    bits_ptr,
    M,
    N,
    K,
    R,
    x_m,
    x_k,
    w_n,
    w_k,
    a_r,
    a_k,
    b_n,
    b_r,
    bytes,
    c,
    BIAS: tl.constexpr,
    DROP_IN: tl.constexpr,
    DROP_OUT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    GROUP: tl.constexpr,
):
    """y (M, N) = x W^T + bias + S B^T and S (M, R) = c x A^T; x (M, K), W (N, K), A (R, K),
    B (N, R).

    DROP_IN (forward): A sees only what dropout keeps of x.  DROP_OUT (the gradient of a dropped
    input): the update S B^T counts only where element (m, n) was kept.
    """
    # programs in groups of rows, so that neighbours share tiles of x and W in the cache
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - first, GROUP)
    tile_m = first + pid % (GROUP * tiles_n) % height
    tile_n = pid % (GROUP * tiles_n) // height
    m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
    n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR).to(tl.int64)
    y = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, BR), tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        x = tile_of(x_ptr, m[:, None], k[None, :], M, K, x_m, x_k)
        w = tile_of(w_ptr, n[None, :], k[:, None], N, K, w_n, w_k)
        y = tl.dot(x, w, y, input_precision="ieee")
        a = tile_of(a_ptr, r[None, :], k[:, None], R, K, a_r, a_k)
        if DROP_IN:
            x = tl.where(kept(bits_ptr, m, start, M, bytes, BM, BK), x, 0.0)
        s = tl.dot(x, a, s, input_precision="ieee")
    s = (c * s).to(s_ptr.dtype.element_ty)
    b = tile_of(b_ptr, n[None, :], r[:, None], N, R, b_n, b_r)
    if DROP_OUT:
        update = tl.dot(s, b, input_precision="ieee")
        y += tl.where(kept(bits_ptr, m, tile_n * BN, M, bytes, BM, BN), update, 0.0)
    else:
        y = tl.dot(s, b, y, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
    y_at = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
    if tile_n == 0:
        s_at = s_ptr + m[:, None] * R + r[None, :]
        tl.store(s_at, s, mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit
def dy_pass_kernel(
    dy_ptr,
    b_ptr,
    xa_ptr,
    ds_ptr,
    db_ptr,
    M,
    N,
    R,
    columns,
    dy_m,
    dy_n,
    b_n,
    b_r,
    c,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """Parts of dS = c dy B, (pieces, M, R) over `columns` of dy each, and of dB = dy^T xA,
    (M / BM, N, R) over BM rows each; dy (M, N), B (N, R), xA (M, R).
    """
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    piece = tl.program_id(1).to(tl.int64)
    r = tl.program_id(2).to(tl.int64) * BR + tl.arange(0, BR)
    xa = tile_of(xa_ptr, m[:, None], r[None, :], M, R, R, 1)
    ds = tl.zeros((BM, BR), tl.float32)
    for start in range(0, columns, BN):
        n = piece * columns + start + tl.arange(0, BN)
        dy = tile_of(dy_ptr, m[:, None], n[None, :], M, N, dy_m, dy_n)
        b = tile_of(b_ptr, n[:, None], r[None, :], N, R, b_n, b_r)
        ds = tl.dot(dy, b, ds, input_precision="ieee")
        db = tl.dot(tl.trans(dy), xa, input_precision="ieee")
        at = db_ptr + (tl.program_id(0).to(tl.int64) * N + n[:, None]) * R + r[None, :]
        tl.store(at, db, mask=(n[:, None] < N) & (r[None, :] < R))
    at = ds_ptr + (piece * M + m[:, None]) * R + r[None, :]
    tl.store(at, c * ds, mask=(m[:, None] < M) & (r[None, :] < R))


@triton.jit
def outer_kernel(
    x_ptr,
    s_ptr,
    part_ptr,
    bits_ptr,
    M,
    K,
    R,
    rows,
    x_m,
    x_k,
    p_r,
    p_k,
    bytes,
    DROP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
):
    """Parts (pieces, R, K) of S^T (m x), each over `rows` of the M; x (M, K), S (M, R)."""
    column = tl.program_id(0) * BK
    k = column.to(tl.int64) + tl.arange(0, BK)
    r = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    piece = tl.program_id(2).to(tl.int64)
    d = tl.zeros((BR, BK), tl.float32)
    for start in range(0, rows, BM):
        m = piece * rows + start + tl.arange(0, BM)
        x = tile_of(x_ptr, m[:, None], k[None, :], M, K, x_m, x_k)
        if DROP:
            x = tl.where(kept(bits_ptr, m, column, M, bytes, BM, BK), x, 0.0)
        s = tile_of(s_ptr, m[None, :], r[:, None], M, R, R, 1)
        d = tl.dot(s, x, d, input_precision="ieee")
    at = part_ptr + piece * R * K + r[:, None] * p_r + k[None, :] * p_k
    tl.store(at, d, mask=(r[:, None] < R) & (k[None, :] < K))


@triton.jit
def sum_kernel(
    p_ptr, p_out_ptr, p_n, p_pieces, q_ptr, q_out_ptr, q_n, q_pieces, BLOCK: tl.constexpr
):
    """The sums of parts P (p_pieces, p_n) and Q (q_pieces, q_n), in the order of the pieces."""
    pid, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(p_n, BLOCK)
    if pid < blocks:
        sum_block(p_ptr, p_out_ptr, p_n, p_pieces, pid, BLOCK)
    else:
        sum_block(q_ptr, q_out_ptr, q_n, q_pieces, pid - blocks, BLOCK)


@triton.jit
def sum_block(part_ptr, out_ptr, n, pieces, block, BLOCK: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(0, pieces):
        total += tl.load(part_ptr + i, mask=i < n, other=0.0)
        part_ptr += n
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < n)


# --- launches -----------------------------------------------------------------------------------


def forward(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    bits: Tensor | None,
    c: float,
    route: str,
) -> tuple[Tensor, Tensor]:
    """y (M, N) and xA (M, R), all in x's dtype."""
    with torch.cuda.device_of(x):
        if route == "fused" and len(a) <= MOST:
            return fused(x, w, bias, a, b, c, drop_in=bits)
        xa = shrink(x, a, c, bits)
        y = xa @ b.T if bias is None else torch.addmm(bias, xa, b.T)
        return y.addmm_(x, w.T), xa


def backward(
    dy: Tensor,
    x: Tensor | None,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    xa: Tensor,
    bits: Tensor | None,
    c: float,
    route: str,
    needs: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dA and dB, of those that `needs` (x, W, b, A, B) names."""
    needs_x, _, _, needs_a, needs_b = needs
    if not (needs_x or needs_a or needs_b):
        return None, None, None
    dx, sums = None, []
    da, db = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, b))
    with torch.cuda.device_of(dy):
        if route == "fused" and needs_x and len(a) <= MOST:
            dx, ds = fused(dy, w.T, None, b.T, a.T, c, drop_out=bits)
            if needs_b:
                sums.append((outer(xa, dy, None, transposed=True), db))
        else:
            ds, db_parts = dy_pass(dy, b, xa, c)
            if needs_b:
                sums.append((db_parts, db))
            if needs_x:
                dx = ds @ a
                dx = dx if bits is None else dx.mul_(unpack(bits, dx.size(1)))
                dx.addmm_(dy, w)
        if needs_a and x is not None:
            sums.append((outer(ds, x, bits), da))
        if sums:
            add(sums)
    return dx, da if needs_a else None, db if needs_b else None


def keep(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Bits (M, ceil(K / 8)) of what dropout keeps of x (M, K); the seed is a tensor."""
    M, K = x.shape
    bits = torch.empty(M, triton.cdiv(K, 8), dtype=torch.uint8, device=x.device)
    with torch.cuda.device_of(x):
        n = bits.numel()
        keep_kernel[(triton.cdiv(n, KEEP),)](seed, bits, n, threshold(p), KEEP, num_warps=4)
    return bits


def shrink(x: Tensor, a: Tensor, c: float, bits: Tensor | None) -> Tensor:
    """S (M, R) = c (m x) A^T, x (M, K), A (R, K)."""
    (M, K), R, size = x.shape, len(a), x.element_size()
    s, tile, BR = x.new_empty(M, R), SHRINK[size], rank_tile(R, size)
    shrink_kernel[(triton.cdiv(M, tile.BM), triton.cdiv(R, BR))](
        *(x, a, s, bits, M, K, R, *x.stride(), *a.stride(), row_bytes(bits), c),
        **{"DROP": bits is not None, "BM": tile.BM, "BK": tile.BK, "BR": BR},
        **launch(tile),
    )
    return s


def fused(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: float,
    drop_in: Tensor | None = None,
    drop_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (M, N) = x W^T + bias + S B^T and S (M, R) = c x A^T, masked as `fused_kernel` says."""
    (M, K), (N, R), size = x.shape, b.shape, x.element_size()
    y, s, bits = x.new_empty(M, N), x.new_empty(M, R), drop_out if drop_in is None else drop_in
    odd = any(n % 16 for n in (K, N, *x.stride(), *w.stride()) if n != 1)
    tile = ODD[size] if odd else fill(fused_tiles(x.device, size), M, N, multiprocessors(x.device))
    flags = {"BIAS": bias is not None, "DROP_IN": drop_in is not None}
    sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "BR": rank_tile(R, size), "GROUP": 8}
    strides = (*x.stride(), *w.stride(), *a.stride(), *b.stride())
    fused_kernel[(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN),)](
        *(x, w, bias, a, b, y, s, bits, M, N, K, R, *strides, row_bytes(bits), c),
        **{**flags, "DROP_OUT": drop_out is not None, **sizes, **launch(tile)},
    )
    return y, s


def dy_pass(dy: Tensor, b: Tensor, xa: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """DS (M, R), and the parts (pieces, N, R) of dB."""
    (M, N), R, size = dy.shape, b.size(1), dy.element_size()
    tile, BR = DY_PASS[size], min(rank_tile(R, size), MOST)
    blocks = triton.cdiv(M, tile.BM)
    # as many pieces of dy's columns as give each multiprocessor two programs
    wanted = triton.cdiv(2 * multiprocessors(dy.device), max(1, blocks))
    columns = triton.cdiv(triton.cdiv(N, wanted), tile.BN) * tile.BN
    pieces = triton.cdiv(N, columns)
    ds_parts = dy.new_empty(pieces, M, R, dtype=torch.float32)
    db_parts = dy.new_empty(blocks, N, R, dtype=torch.float32)
    if blocks:
        dy_pass_kernel[(blocks, pieces, triton.cdiv(R, BR))](
            *(dy, b, xa, ds_parts, db_parts, M, N, R, columns, *dy.stride(), *b.stride(), c),
            **{"BM": tile.BM, "BN": tile.BN, "BR": BR, **launch(tile)},
        )
    ds = dy.new_empty(M, R)
    add([(ds_parts, ds)])
    return ds, db_parts


def outer(s: Tensor, x: Tensor, bits: Tensor | None, transposed: bool = False) -> Tensor:
    """Parts (pieces, R, K) of S^T (m x), or (pieces, K, R); x (M, K), S (M, R)."""
    (M, K), R, size = x.shape, s.size(1), x.element_size()
    tile, BR = OUTER[size], rank_tile(R, size)
    pieces = max(1, min(16, triton.cdiv(M, 512)))
    rows = triton.cdiv(triton.cdiv(M, pieces), tile.BM) * tile.BM
    parts = x.new_empty(pieces, *((K, R) if transposed else (R, K)), dtype=torch.float32)
    across = (1, R) if transposed else (K, 1)
    outer_kernel[(triton.cdiv(K, tile.BK), triton.cdiv(R, BR), pieces)](
        *(x, s, parts, bits, M, K, R, rows, *x.stride(), *across, row_bytes(bits)),
        **{"DROP": bits is not None, "BM": tile.BM, "BK": tile.BK, "BR": BR, **launch(tile)},
    )
    return parts


def add(sums: list[tuple[Tensor, Tensor]]) -> None:
    """Fills one output or two, in one launch, with the sum of its parts over their dimension 0."""
    arguments = [(parts, out, out.numel(), len(parts)) for parts, out in sums]
    blocks = sum(triton.cdiv(n, SUM) for *_, n, _ in arguments)
    if len(arguments) == 1:
        arguments.append((*sums[0], 0, 0))
    if blocks:
        sum_kernel[(blocks,)](*arguments[0], *arguments[1], SUM, num_warps=4)


def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at least."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def fused_tiles(device: torch.device, size: int) -> tuple[Tile, ...]:
    """Those of `FUSED` for the device: before Hopper the large one takes too many registers."""
    large = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return FUSED[size] if large else FUSED[size][1:]


def fill(tiles: tuple[Tile, ...], M: int, N: int, programs: int) -> Tile:
    """The tile with the least idle multiprocessors in its last wave; of equals the first."""

    def busy(tile: Tile) -> float:
        count = max(1, triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN))
        return count / (programs * triton.cdiv(count, programs))

    return max(tiles, key=busy)


def rank_tile(R: int, size: int) -> int:
    """Ranks at a time, for elements of `size` bytes."""
    return next((tile for tile in RANKS[size] if tile >= R), RANKS[size][-1])


def row_bytes(bits: Tensor | None) -> int:
    return 0 if bits is None else bits.size(1)


def launch(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}
