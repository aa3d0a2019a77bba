"""NF4: a weight in 4 bits.  Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314

Each block of 64 numbers of W, in the order of memory, has a scale, the largest magnitude in it, and
each number the nearest of 16 codes:

    a = max |w_i|      q_i = argmin_k |w_i / a - c_k|      w_i ~ a c_{q_i}

so that |w_i - a c_{q_i}| is at most a times half of the widest gap between codes, 0.152.

The codes are quantiles of a normal distribution, where weights are expected.  Phi^-1 maps evenly
spaced probabilities to numbers: 8 from 1/2 up to p give the positive codes, 7 from 1/2 down to
1 - p the negative ones, divided by the largest, with zero between them.

    p = (1 - 1/32 + 1 - 1/30) / 2      what 16 and 15 equal shares would leave beyond their ends

Double quantization stores the scales in 8 bits.  Their mean is taken off; each block of 256
differences has a scale of its own, and each difference the nearest of 256 codes d, which lie
closer together near zero:

    a_j ~ a2 d_{p_j} + offset

    bits a weight:  4 + 32/64 = 4.5;  with double quantization  4 + 8/64 + 32/(64 * 256) = 4.127

Digits, rounding and the order of halves in a byte are those of bitsandbytes: from the same state it
dequantises the same bits.  Its 8-bit codes on a CPU are not always the nearest ones; these are.

Shapes:  n numbers of W   B blocks, n / 64 rounded up
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

CODES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
BLOCKS = tuple(2**i for i in range(5, 13))  # numbers that can share a scale
SCALE_BLOCK = 256  # scales that share a scale
LEAST = 1e-38  # a block of zeros is not divided by zero
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PIECE = 2**18  # numbers at a time, so that they stay in the cache; a multiple of every block


@dataclass(frozen=True, eq=False)
class Quantized:
    """A weight in 4 bits.

    Attributes:
        packed: uint8 (n / 2 rounded up,), two codes a byte, the first in the high half.
        scales: a of each block, float32 (B,); with double quantization its code, uint8 (B,).
        scales_of_scales: a2, float32 (B / 256 rounded up,), or None.
        offset: float32 (), or None.
        shape, dtype: of the weight.
        block: numbers that share a scale.
    """

    packed: Tensor
    scales: Tensor
    scales_of_scales: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block: int = 64

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored."""
        stored = (self.packed, self.scales, self.scales_of_scales, self.offset)
        return sum(tensor.nbytes for tensor in stored if tensor is not None)

    def to(self, device: str | torch.device, dtype: torch.dtype) -> "Quantized":
        """The same on another device, of a weight of another dtype."""
        nested = (self.scales_of_scales, self.offset)
        a2, offset = (tensor if tensor is None else tensor.to(device) for tensor in nested)
        packed, scales = self.packed.to(device), self.scales.to(device)
        return Quantized(packed, scales, a2, offset, self.shape, dtype, self.block)


def quantize(weight: Tensor, block: int = 64, double: bool = True) -> Quantized:
    """A weight of any shape in 4 bits.

    Args:
        block: numbers that share a scale, a power of two from 32 to 4096.
        double: whether the scales are stored in 8 bits.

    Raises:
        ValueError: another block, or a weight that is empty, of another dtype, or holds NaN or an
            infinite number.
    """
    if weight.dtype not in DTYPES:
        raise ValueError(f"weight is {weight.dtype}, must be one of {', '.join(map(str, DTYPES))}")
    if block not in BLOCKS:
        raise ValueError(f"block is {block}, must be one of {', '.join(map(str, BLOCKS))}")
    if weight.numel() == 0:
        raise ValueError("there is no number in the weight")
    w = weight.detach().reshape(-1)
    n, midpoints = len(w), _midpoints(CODES, w.device)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=w.device)
    scales = torch.empty(math.ceil(n / block), device=w.device)
    for start in range(0, n, PIECE):
        piece = w[start : start + PIECE].float()
        codes, a = _nearest(piece, block, midpoints)
        codes = F.pad(codes, (0, len(codes) % 2), value=CODES.index(0.0))
        packed[start // 2 :][: len(codes) // 2] = codes[::2] << 4 | codes[1::2]
        scales[start // block :][: len(a)] = a
    if not bool(scales.isfinite().all()):
        raise ValueError("the weight holds NaN or an infinite number")
    plain = Quantized(packed, scales, None, None, weight.shape, weight.dtype, block)
    return _quantize_scales(plain) if double else plain


def outline(
    shape: torch.Size, dtype: torch.dtype, block: int = 64, double: bool = True
) -> Quantized:
    """A weight of this shape without values, on the meta device."""
    count = math.ceil(shape.numel() / block)
    with torch.device("meta"):
        packed = torch.empty((shape.numel() + 1) // 2, dtype=torch.uint8)
        scales = torch.empty(count, dtype=torch.uint8 if double else torch.float32)
        a2 = torch.empty(math.ceil(count / SCALE_BLOCK)) if double else None
        offset = torch.empty(()) if double else None
    return Quantized(packed, scales, a2, offset, shape, dtype, block)


def dequantize(it: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """The weight: a c_q in float32, rounded to `dtype`, which None says is that of the weight."""
    w = torch.empty(it.shape, dtype=dtype or it.dtype, device=it.scales.device)
    _fill(w.view(-1), it, scales_of(it), 0)
    return w


def tiles(it: Quantized, dtype: torch.dtype, most: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix W (N, K) in turn, dequantised into one tile of memory.

    Args:
        most: numbers in a tile, about.
    """
    N, K = it.shape
    height = min(N, max(1, most // (K * it.block)) * it.block)  # whole blocks
    tile = torch.empty(height, K, dtype=dtype, device=it.scales.device)
    scales = scales_of(it)
    for row in range(0, N, height):
        rows = tile[: N - row]
        _fill(rows.view(-1), it, scales, row * K)
        yield slice(row, row + len(rows)), rows


def scales_of(it: Quantized) -> Tensor:
    """a of each block, float32 (B,)."""
    if it.scales_of_scales is None or it.offset is None:
        return it.scales
    d = _table(SCALE_CODES, it.scales.device)[it.scales.int()]
    a2 = it.scales_of_scales.repeat_interleave(SCALE_BLOCK)[: len(d)]
    return d * a2 + it.offset


def _nearest(w: Tensor, block: int, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of w (n,), uint8, and the scales of its blocks.  As in bitsandbytes a full block is
    multiplied by 1 / a, and a last one that is not full is divided by a.
    """
    full = len(w) // block * block
    rows, rest = w[:full].view(-1, block), w[full:]
    a = rows.abs().amax(1)
    scaled = (rows * (1 / a.clamp(min=LEAST))[:, None]).view(-1)
    if len(rest):
        last = rest.abs().amax()
        a = torch.cat([a, last[None]])
        scaled = torch.cat([scaled, rest / last.clamp(min=LEAST)])
    return torch.bucketize(scaled.clamp_(-1, 1), midpoints, out_int32=True).to(torch.uint8), a


def _quantize_scales(it: Quantized) -> Quantized:
    """The same with its scales in 8 bits."""
    offset = it.scales.mean()
    midpoints = _midpoints(SCALE_CODES, offset.device)
    codes, a2 = _nearest(it.scales - offset, SCALE_BLOCK, midpoints)
    return replace(it, scales=codes, scales_of_scales=a2, offset=offset)


def _fill(w: Tensor, it: Quantized, scales: Tensor, begin: int) -> None:
    """Writes the numbers from `begin` on, the first of a block, into w (m,); there are none where
    either lies on the meta device.

    One look at a table gives the four codes of two bytes.  Memory for a piece is taken once: to
    take it anew for each would cost more than to fill it.
    """
    size = min(PIECE, -(-len(w) // it.block) * it.block)
    index = torch.empty(size // 4, dtype=torch.int32, device=w.device)
    codes = torch.empty(size // 4, 4, device=w.device)
    if w.is_meta or it.packed.is_meta:
        return
    quads, end = _quads(w.device), begin + len(w)
    for start in range(begin, end, PIECE):
        m = min(PIECE, end - start)
        packed = it.packed[start // 2 : (start + m + 1) // 2]
        if len(packed) % 2:
            packed = F.pad(packed, (0, 1))
        i, c = index[: len(packed) // 2], codes[: len(packed) // 2]
        torch.index_select(quads, 0, i.copy_(packed.view(torch.uint16)), out=c)
        full, a = m // it.block, scales[start // it.block :]
        part, c = w[start - begin : start - begin + m], c.view(-1)
        whole = full * it.block
        shape = (full, it.block)
        torch.mul(c[:whole].view(shape), a[:full, None], out=part[:whole].view(shape))
        if whole < m:
            part[whole:] = c[whole:m] * a[full]


@cache
def _quads(device: torch.device) -> Tensor:
    """(65536, 4): the four codes of each two bytes, in the order of memory."""
    both = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.uint16)
    pairs = both.view(torch.uint8).int()
    halves = torch.stack([pairs >> 4, pairs & 15], 1).view(-1, 4)
    return torch.tensor(CODES, device="cpu")[halves].to(device)


def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device)


def _midpoints(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    table = _table(numbers, device)
    return (table[:-1] + table[1:]) / 2


def _scale_codes() -> tuple[float, ...]:
    """256 numbers from -0.993 to 1: 0, 1, and with each sign for i = 0 to 6 the 2^i midpoints of
    2^i equal steps from 0.1 to 1, times 10^(i - 6).
    """
    positive: list[float] = []
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1, device="cpu")
        positive += (10.0 ** (i - 6) * (ends[:-1] + ends[1:]) / 2).tolist()
    return tuple(sorted([*positive, *(-x for x in positive), 0.0, 1.0]))


SCALE_CODES = _scale_codes()
