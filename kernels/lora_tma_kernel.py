"""`expand` for Hopper and Blackwell: x, W and Y move by the tensor memory accelerator (TMA), and as
many programs as there are multiprocessors stay and take tile after tile.

    Y = x W^T + bias + c S B^T        the equation and the letters of kernels/lora_kernels.py

A load by pointers keeps every thread busy with addresses and masks; a descriptor says once where a
matrix lies, and one instruction fetches a tile of it, edges included.  It asks for 16-byte
alignment of every row.  The update's factors are small and come by pointers.
"""

import triton
import triton.language as tl

from .lora_kernels import tile_at, update


@triton.jit
def expand_tma_kernel(
    x_desc, w_desc, y_desc, bias_ptr, s_ptr, b_ptr, bits_ptr, M, N, K, R,
    s_m, b_n, b_r, bytes, c,
    BIAS: tl.constexpr, DROP: tl.constexpr, ADD: tl.constexpr, TRANSPOSED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """As `expand_kernel`; with TRANSPOSED the descriptor is of W^T (K, N)."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        tile_m, tile_n = tile_at(tile, M, N, BM, BN, GROUP)
        first_m, first_n = tile_m * BM, tile_n * BN
        m = first_m.to(tl.int64) + tl.arange(0, BM)
        n = first_n.to(tl.int64) + tl.arange(0, BN)
        y = update(
            s_ptr, b_ptr, bits_ptr, m, n, first_n, M, N, R, s_m, b_n, b_r, bytes, c,
            DROP, BM, BN, BR,
        )  # fmt: skip
        for k in range(0, K, BK):
            x = x_desc.load([first_m, k])
            w = w_desc.load([k, first_n]) if TRANSPOSED else w_desc.load([first_n, k]).T
            y = tl.dot(x, w, y)
        if BIAS:
            y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
        if ADD:
            y += y_desc.load([first_m, first_n]).to(tl.float32)
        y_desc.store([first_m, first_n], y.to(y_desc.dtype))
