"""The codec of kernels/nf4.py and the product of kernels/nf4_linear.py in Triton.

    dequantize   W = a c, in one launch
    product      y = x W^T + b in one launch, for at most 64 rows of x: a program decodes a tile of
                 W into registers, and no dense W exists

With more rows W is dequantised, which is then a small part of the time, and multiplied by torch.

A group is 16 bytes, 32 numbers: the smallest block, so that it has one scale.  Where a row of W is
no whole number of groups, W is dequantised for few rows of x, too.  Double quantization is decoded
on the way, a = a2 d + offset.  The bits of W are those of kernels/nf4.py: the option
`enable_fp_fusion` keeps the compiler from rounding a product and the sum after it as one.

x comes with its strides.  Every edge is masked, offsets are int64, sums are float32 without
atomics.  float32 inputs are multiplied as such ("ieee"), not as tf32.

Shapes:  M rows   K inputs   N outputs   G groups
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lora_triton import Tile, launch, tile_of
from .nf4 import CODES, SCALE_BLOCK, SCALE_CODES, Quantized

# by bytes of an element; `python -m minigpt_kernels.compile_check` compiles all of them
PRODUCT = {2: Tile(0, 32, 128, 4, 5), 4: Tile(0, 32, 32, 8, 3)}
ROWS = (16, 32, 64)  # of a tile
DEQUANTIZE = 64  # groups of a program
WARPS = 4
ROUNDED = {"enable_fp_fusion": False}  # after each operation
GROUP = tl.constexpr(16)  # bytes
NUMBERS = tl.constexpr(32)  # of a group
SCALES = tl.constexpr(SCALE_BLOCK)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def decoded(packed_ptr, scales_ptr, a2_ptr, offset_ptr, codes_ptr, d_ptr, bytes, shift, g, DOUBLE):
    """The numbers of groups g (..., G) in float32, (..., G, 32).  2^shift groups share a scale."""
    inside = g * GROUP < bytes
    block = g >> shift
    if DOUBLE:
        p = tl.load(scales_ptr + block, mask=inside, other=0).to(tl.int32)
        a2 = tl.load(a2_ptr + block // SCALES, mask=inside, other=0.0)
        a = tl.load(d_ptr + p) * a2 + tl.load(offset_ptr)
    else:
        a = tl.load(scales_ptr + block, mask=inside, other=0.0)
    i = tl.expand_dims(g * GROUP, -1) + tl.arange(0, GROUP)
    byte = tl.load(packed_ptr + i, mask=i < bytes, other=0).to(tl.int32)
    q = tl.interleave(byte >> 4, byte & 15)
    codes = tl.load(codes_ptr + tl.arange(0, 16))
    c = tl.reshape(tl.gather(codes, tl.ravel(q), 0), q.shape)
    return tl.expand_dims(a, -1) * c


@triton.jit(do_not_specialize=["shift"])
def dequantize_kernel(
    packed_ptr,
    scales_ptr,
    a2_ptr,
    offset_ptr,
    codes_ptr,
    d_ptr,
    w_ptr,
    numbers,
    bytes,
    shift,
    DOUBLE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """W, as (numbers,)."""
    first = tl.program_id(0).to(tl.int64) * GROUPS
    g = first + tl.arange(0, GROUPS)
    w = decoded(
        packed_ptr, scales_ptr, a2_ptr, offset_ptr, codes_ptr, d_ptr, bytes, shift, g, DOUBLE
    )
    i = first * NUMBERS + tl.arange(0, GROUPS * NUMBERS)
    w = tl.reshape(w, (GROUPS * NUMBERS,)).to(w_ptr.dtype.element_ty)
    tl.store(w_ptr + i, w, mask=i < numbers)


@triton.jit(do_not_specialize=["shift"])
def product_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    a2_ptr,
    offset_ptr,
    codes_ptr,
    d_ptr,
    bias_ptr,
    y_ptr,
    M,
    N,
    K,
    x_m,
    x_k,
    bytes,
    shift,
    DOUBLE: tl.constexpr,
    BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y (M, N) = x W^T + bias; x (M, K), M at most BM, W (N, K)."""
    m = tl.arange(0, BM).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    y = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        x = tile_of(x_ptr, m[:, None], k[None, :], M, K, x_m, x_k)
        column = start // NUMBERS + tl.arange(0, BK // NUMBERS)
        # beyond a row's end these are numbers of the next one, times zeros of x
        g = n[:, None] * (K // NUMBERS) + column[None, :]
        w = decoded(
            packed_ptr, scales_ptr, a2_ptr, offset_ptr, codes_ptr, d_ptr, bytes, shift, g, DOUBLE
        )
        w = tl.reshape(w.to(x.dtype), (BN, BK))
        y = tl.dot(x, tl.trans(w), y, input_precision="ieee")
    if BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
    y_at = y_ptr + m[:, None] * N + n[None, :]
    tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


# --- launches -----------------------------------------------------------------------------------


def dequantize(it: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight, of its shape."""
    w = torch.empty(it.shape, dtype=dtype, device=it.packed.device)
    grid = (triton.cdiv(w.numel(), DEQUANTIZE * NUMBERS.value),)
    with torch.cuda.device_of(w):
        dequantize_kernel[grid](
            *(*stored(it), w, w.numel(), len(it.packed), shift(it)),
            **{"DOUBLE": doubled(it), "GROUPS": DEQUANTIZE, "num_warps": WARPS, **ROUNDED},
        )
    return w


def product(x: Tensor, it: Quantized, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, (M, K) -> (M, N), all in x's dtype."""
    (M, K), N = x.shape, it.shape[0]
    if ROWS[-1] < M or K % NUMBERS.value or x.element_size() not in PRODUCT:
        w = dequantize(it, x.dtype)
        return x @ w.T if bias is None else torch.addmm(bias, x, w.T)
    tile, y = PRODUCT[x.element_size()], x.new_empty(M, N)
    BM = next(rows for rows in ROWS if rows >= M)
    beta = None if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        product_kernel[(triton.cdiv(N, tile.BN),)](
            *(x, *stored(it), beta, y, M, N, K, *x.stride(), len(it.packed), shift(it)),
            **{"DOUBLE": doubled(it), "BIAS": bias is not None},
            **{"BM": BM, "BN": tile.BN, "BK": tile.BK, **launch(tile), **ROUNDED},
        )
    return y


def stored(it: Quantized) -> tuple[Tensor | None, ...]:
    """What `decoded` reads."""
    return it.packed, it.scales, it.scales_of_scales, it.offset, *tables(it.packed.device)


def doubled(it: Quantized) -> bool:
    return it.scales_of_scales is not None


def shift(it: Quantized) -> int:
    """The logarithm of the groups that share a scale."""
    return (it.block // NUMBERS.value).bit_length() - 1


@cache
def tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The codes of numbers, and those of scales."""
    return torch.tensor(CODES, device=device), torch.tensor(SCALE_CODES, device=device)
