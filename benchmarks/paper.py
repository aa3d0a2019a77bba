"""Times of a LoRA layer on paper: arithmetic from what each side's kernels move and multiply.

    time = sum over its kernels of max(launch, FLOPs / throughput, bytes / bandwidth)

with what one H200 reaches: 790 TFLOP/s of cuBLAS in bf16, 4.3 TB/s of a device copy, and
2 microseconds a launch.  Nothing here is measured.

The floor is one pass over x, W and y (and over dy, W, x and dx) without a launch.

Shapes:  M rows   K inputs   N outputs   R rank
"""

from typing import NamedTuple

FLOPS = 790e12  # a second
BANDWIDTH = 4.3e12  # bytes a second
LAUNCH = 2e-6  # seconds

BASE, FLOOR = "base linear alone", "floor"
OURS_TORCH, OURS_TRITON = "ours, torch route", "ours, triton route"
OURS_FUSED = "ours, fused route"
EAGER, COMPILED = "torch eager", "torch.compile"
PEFT, PEFT_FP32 = "HF PEFT, bf16 adapters", "HF PEFT, fp32 adapters"
UNSLOTH, FUSION = "unsloth's sequence of calls", "LoRAFusion's sequence of calls"
SIDES = (
    OURS_TRITON,
    OURS_TORCH,
    EAGER,
    COMPILED,
    PEFT,
    PEFT_FP32,
    UNSLOTH,
    FUSION,
    OURS_FUSED,
    BASE,
)


class Shape(NamedTuple):
    """One layer and the rows it gets."""

    M: int
    K: int
    N: int
    R: int


class Kernel(NamedTuple):
    """What one launch multiplies and moves."""

    flops: float
    bytes: float


def seconds(
    kernels: list[Kernel],
    flops: float = FLOPS,
    bandwidth: float = BANDWIDTH,
    launch: float = LAUNCH,
) -> float:
    """The kernels one after the other."""
    return sum(max(launch, k.flops / flops, k.bytes / bandwidth) for k in kernels)


def floor(shape: Shape) -> tuple[Kernel, Kernel]:
    """Forward, and backward without dW: every operand read once, every result written once."""
    M, K, N, R = shape
    factors = R * (K + N)
    return (
        Kernel(2 * M * (K * N + factors), 2 * (M * K + K * N + M * N + factors)),
        Kernel(2 * M * (K * N + 2 * factors), 2 * (M * N + K * N + 2 * M * K + 2 * factors)),
    )


def gemm(m: int, k: int, n: int, size: int = 2, also: float = 0) -> Kernel:
    """(m, k) by (k, n), of `size` bytes an element; `also` bytes are moved beside them."""
    return Kernel(2 * m * k * n, size * (m * k + k * n + m * n) + also)


def move(bytes_: float) -> Kernel:
    """An operation element by element."""
    return Kernel(0, bytes_)


def side_kernels(
    side: str, shape: Shape, dropout: bool
) -> tuple[list[Kernel], list[Kernel]] | None:
    """The launches of a side, forward and backward (dx, dA, dB); None: it has no such case."""
    M, K, N, R = shape
    x, y = M * K, M * N
    base, d_base = gemm(M, K, N), gemm(M, N, K)
    shrink, d_shrink = gemm(M, K, R), gemm(M, N, R)  # x A^T and dy B
    d_a, d_b = gemm(R, M, K), gemm(R, M, N)
    add, d_add = gemm(M, R, N, also=2 * y), gemm(M, R, K, also=2 * x)  # into y, into dx
    # dropout of x, by torch: read, write, and a mask of one byte an element
    drop = [move(5 * x)] if dropout else []
    small = [move(4 * M * R)]
    if side == BASE:
        return [base], [d_base]
    if side == PEFT:
        forward = [base, *drop, shrink, gemm(M, R, N), move(4 * y), move(6 * y)]
        back = [d_base, move(4 * y), d_b, d_shrink, d_a, gemm(M, R, K), *drop, move(6 * x)]
        return forward, back
    if side == PEFT_FP32:
        drop = [move(9 * x)] if dropout else []
        forward = [base, move(6 * x), *drop, gemm(M, K, R, 4), gemm(M, R, N, 4)]
        forward += [move(8 * y), move(10 * y), move(6 * y)]
        back = [d_base, move(6 * y), move(6 * y), move(8 * y), gemm(R, M, N, 4), gemm(M, N, R, 4)]
        back += [gemm(R, M, K, 4), gemm(M, R, K, 4), *drop, move(6 * x), move(6 * x)]
        return forward, back
    if side == EAGER:  # addmm copies y first
        forward = [base, *drop, shrink, move(4 * y), add]
        back = [d_base, d_shrink, *small, d_b, *small, d_a, gemm(M, R, K), *drop, move(6 * x)]
        return forward, back
    if side == COMPILED:  # the sums in one kernel
        forward = [base, *drop, shrink, gemm(M, R, N), move(6 * y)]
        return forward, [d_base, d_shrink, d_b, d_a, gemm(M, R, K), move((7 if dropout else 6) * x)]
    if side == UNSLOTH:
        if dropout:
            return None
        return [base, shrink, add], [d_base, d_shrink, d_shrink, shrink, d_b, d_a, d_add]
    if side == FUSION:
        forward = [*drop, shrink, gemm(M, R, N), gemm(M, K, N, also=2 * y)]
        back = [d_shrink, d_b, d_a, gemm(M, R, K), *drop, gemm(M, N, K, also=2 * x)]
        return forward, back
    bits = x / 8 if dropout else 0
    mask = [move(8), move(bits)] if dropout else []  # the seed, the bits
    # the update first: the large product reads what its output holds
    onto_y, onto_dx = gemm(M, K, N, also=2 * y), gemm(M, N, K, also=2 * x)
    if side == OURS_TORCH:
        drop = [move(bits + x), move(5 * x)] if dropout else []  # unpack, multiply
        forward = [*mask, *drop, shrink, gemm(M, R, N), onto_y]
        return forward, [d_shrink, gemm(M, R, K), *drop, onto_dx, *drop, d_a, d_b]
    a_parts = 4 * R * K * -(-M // 512)
    b_parts = 4 * R * N * -(-M // 128)
    sums = move(a_parts + b_parts + 2 * R * (K + N))
    if side == OURS_TRITON:
        drop = [move(bits + x), move(5 * x)] if dropout else []
        forward = [*mask, shrink._replace(bytes=shrink.bytes + bits), gemm(M, R, N), onto_y]
        dy_pass = Kernel(d_shrink.flops + d_b.flops, d_shrink.bytes + 2 * M * R + b_parts)
        d_a = d_a._replace(bytes=d_a.bytes + bits + a_parts)
        return forward, [dy_pass, move(6 * M * R), gemm(M, R, K), *drop, onto_dx, d_a, sums]
    if side == OURS_FUSED:
        forward = [*mask, Kernel(base.flops + 4 * y * R, base.bytes + 2 * R * (M + N + K) + bits)]
        d_x = Kernel(d_base.flops + 4 * x * R, d_base.bytes + 2 * R * (M + N + K) + bits)
        d_a = d_a._replace(bytes=d_a.bytes + bits + a_parts)
        return forward, [d_x, d_a, d_b._replace(bytes=d_b.bytes + b_parts), sums]
    raise ValueError(f"side is {side!r}, must be one of {', '.join(SIDES)}")
