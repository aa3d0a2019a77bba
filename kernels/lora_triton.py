"""The four products of LoRA by Triton's kernels, and the route for decoding.

kernels/lora_torch.py has the same functions over torch's products.
"""

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import decode_kernels, lora_kernels, tiles
from .lora_tma_kernel import expand_tma_kernel


def keep(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """Bits (M, ceil(K / 8)) of the elements of x (M, K) that dropout keeps.

    `seed` is a whole number on the device: nothing of it passes through the host.
    """
    M, K = x.shape
    bits = torch.empty(M, triton.cdiv(K, 8), dtype=torch.uint8, device=x.device)
    n = bits.numel()
    lora_kernels.keep_kernel[(triton.cdiv(n, tiles.KEEP),)](
        seed, bits, n, min(round(p * 2**32), 2**32 - 1), tiles.KEEP, num_warps=4
    )
    return bits


def unpack(bits: Tensor, K: int) -> Tensor:
    """The mask (M, K) that the bits stand for."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, :, None] >> places & 1).flatten(1)[:, :K].bool()


def shrink(x: Tensor, a: Tensor, c: float, bits: Tensor | None, out: Tensor) -> None:
    """S (M, R) = c drop(x) A^T, x (M, K), A (R, K), into `out`, whose rows may lie apart."""
    (M, K), R = x.shape, len(a)
    size = x.element_size()
    tile, BR = tiles.SHRINK[size], tiles.rank_tile(R, size)
    lora_kernels.shrink_kernel[(triton.cdiv(M, tile.BM), triton.cdiv(R, BR))](
        x, a, out, bits, M, K, R, *x.stride(), *a.stride(), out.stride(0), _bytes(bits), c,
        DROP=bits is not None, BM=tile.BM, BK=tile.BK, BR=BR, **_launch(tile),
    )  # fmt: skip


def expand(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: float,
    bits: Tensor | None = None,
) -> Tensor:
    """Y (M, N) = x W^T + bias + c S B^T, the update masked by the dropout of an (M, N) input."""
    y = x.new_empty(len(x), len(w))
    _expand(y, x, w, bias, s, b, c, bits, add=False)
    return y


def add_product(y: Tensor, x: Tensor, w: Tensor) -> None:
    """Y (M, N) += x W^T"""
    _expand(y, x, w, None, x[:, :0], w[:, :0], 1.0, None, add=True)


def _expand(
    y: Tensor,
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    s: Tensor,
    b: Tensor,
    c: float,
    bits: Tensor | None,
    add: bool,
) -> None:
    (M, K), N = x.shape, len(w)
    family, programs = tiles.family(x.device), tiles.multiprocessors(x.device)
    flags = {"BIAS": bias is not None, "DROP": bits is not None, "ADD": add}
    if family in tiles.EXPAND_TMA and _by_descriptor(x, w, y):
        tile = tiles.fill(tiles.EXPAND_TMA[family][bits is not None], M, N, programs)
        transposed = w.stride(1) != 1
        tile_w = [tile.BK, tile.BN] if transposed else [tile.BN, tile.BK]
        expand_tma_kernel[(min(programs, _tiles(tile, M, N)),)](
            TensorDescriptor.from_tensor(x, [tile.BM, tile.BK]),
            TensorDescriptor.from_tensor(w.T if transposed else w, tile_w),
            TensorDescriptor.from_tensor(y, [tile.BM, tile.BN]),
            bias, s, b, bits, M, N, K, s.size(1), s.stride(0), *b.stride(), _bytes(bits), c,
            TRANSPOSED=transposed, BM=tile.BM, BN=tile.BN, BK=tile.BK, BR=tiles.RANK, GROUP=8,
            **flags, **_launch(tile),
        )  # fmt: skip
        return
    size = x.element_size()
    odd = any(n % 16 for n in (K, N, *x.stride(), *w.stride()) if n != 1)
    tile = tiles.ODD[size] if odd else tiles.fill(tiles.EXPAND[family][size], M, N, programs)
    lora_kernels.expand_kernel[(_tiles(tile, M, N),)](
        x, w, bias, s, b, y, bits, M, N, K, s.size(1), *x.stride(), *w.stride(),
        s.stride(0), *b.stride(), y.stride(0), _bytes(bits), c,
        BM=tile.BM, BN=tile.BN, BK=tile.BK, BR=tiles.RANK, GROUP=8, **flags, **_launch(tile),
    )  # fmt: skip


def outer(s: Tensor, x: Tensor, c: float, bits: Tensor | None = None) -> Tensor:
    """D (R, K) = c S^T drop(x), in float32, x (M, K), S (M, R)."""
    (M, K), R = x.shape, s.size(1)
    size = x.element_size()
    tile, BR = tiles.OUTER[size], tiles.rank_tile(R, size)
    pieces = max(1, min(16, triton.cdiv(M, 512)))
    rows = triton.cdiv(triton.cdiv(M, pieces), tile.BM) * tile.BM
    parts = x.new_empty(pieces, R, K, dtype=torch.float32)
    lora_kernels.outer_kernel[(triton.cdiv(K, tile.BK), triton.cdiv(R, BR), pieces)](
        x, s, parts, bits, M, K, R, rows, *x.stride(), s.stride(0), _bytes(bits), c,
        DROP=bits is not None, BM=tile.BM, BK=tile.BK, BR=BR, **_launch(tile),
    )  # fmt: skip
    return parts.sum(0)


def few_rows(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: float) -> Tensor:
    """Y (M, N) = x W^T + bias + c (x A^T) B^T for at most 16 rows."""
    (M, K), (N, R) = x.shape, b.shape
    tile = tiles.DECODE
    columns = triton.cdiv(N, tile.BN) + triton.cdiv(R, tile.BN)
    pieces = triton.cdiv(2 * tiles.multiprocessors(x.device), columns)
    piece = triton.cdiv(triton.cdiv(K, pieces), tile.BK) * tile.BK
    pieces = max(1, triton.cdiv(K, piece) if piece else 1)
    parts = x.new_empty(pieces, M, N + R, dtype=torch.float32)
    decode_kernels.decode_kernel[(columns, pieces)](
        x, w, a, parts, M, N, K, R, piece, *x.stride(), *w.stride(), *a.stride(),
        BM=tile.BM, BN=tile.BN, BK=tile.BK, **_launch(tile),
    )  # fmt: skip
    y = x.new_empty(M, N)
    tile = tiles.DECODE_SUM
    decode_kernels.decode_sum_kernel[(triton.cdiv(N, tile.BN),)](
        parts, bias, b, y, M, N, R, pieces, *b.stride(), c,
        BIAS=bias is not None, BM=tile.BM, BN=tile.BN, BR=tiles.RANK, **_launch(tile),
    )  # fmt: skip
    return y


def _by_descriptor(x: Tensor, w: Tensor, y: Tensor) -> bool:
    """Whether a descriptor can say where these lie: 16-bit elements, rows 16 bytes aligned."""
    matrices = (x, w if w.stride(1) == 1 else w.T, y)
    return x.element_size() == 2 and all(
        t.numel() > 0
        and t.stride(1) == 1
        and t.stride(0) >= t.size(1)  # not one row many times over
        and t.stride(0) * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        for t in matrices
    )


def _tiles(tile: tiles.Tile, M: int, N: int) -> int:
    return int(triton.cdiv(M, tile.BM) * triton.cdiv(N, tile.BN))


def _bytes(bits: Tensor | None) -> int:
    """Bytes of a row of the mask."""
    return 0 if bits is None else bits.size(1)


def _launch(tile: tiles.Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
