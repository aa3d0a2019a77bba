"""Norm, clip and update of all trainable tensors in two Triton launches.

    launch 1   part[i] = sum of squares of chunk i of the gradients
    launch 2   |g|^2 = sum_i part[i], in the same order in every program;
               theta, m, v of chunk i <- the update, with g clipped by |g|

A chunk is a piece of one tensor: one table holds the tensors' addresses and sizes, another says
which piece of which tensor a program works on.  So any number of tensors of any size takes two
launches, nothing is flattened or copied, and AdamW moves 32 bytes a parameter (g twice; theta, m
and v each way).  No atomics: two runs give the same bits.  The count of steps lives on the device,
and nothing returns to the host.

1 - beta is computed on the host and 1 - beta^t in float64: in float32 both would lose half of
their digits near beta = 1.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # elements of a program
BLOCK = 1024  # elements at a time
WARPS = 4


@triton.jit
def squares_kernel(table, chunks, parts, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """`table` (tensors, 2): address and size of g.  `chunks` (programs, 2): tensor and offset."""
    pid = tl.program_id(0)
    row = table + 2 * tl.load(chunks + 2 * pid)
    first = tl.load(chunks + 2 * pid + 1)
    g_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    size = tl.load(row + 1)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, CHUNK, BLOCK):
        i = first + start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + i, mask=i < size, other=0.0)
        s += g * g
    tl.store(parts + pid, tl.sum(s))


@triton.jit
def norm_of(parts, n, BLOCK: tl.constexpr):
    """|g| from its parts."""
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        s += tl.load(parts + i, mask=i < n, other=0.0)
    return tl.sqrt(tl.sum(s))


@triton.jit
def adamw_kernel(
    table, chunks, parts, n, norm_out, step, next_step, rates,
    beta1, rest1, log1, beta2, rest2, log2, eps, decay,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`table` (tensors, 5): addresses of theta, g, m, v, and their size.  `rates`: eta and c."""
    pid = tl.program_id(0)
    norm = norm_of(parts, n, BLOCK)
    finite = norm < float("inf")
    t = tl.load(step) + 1
    if pid == 0:
        tl.store(norm_out, norm)
        tl.store(next_step, tl.where(finite, t, t - 1))
    if finite:
        lr, max_norm = tl.load(rates), tl.load(rates + 1)
        clip = tl.minimum(max_norm / (norm + 1e-6), 1.0)
        t64 = t.to(tl.float64)
        correction1 = (1 - tl.exp(t64 * log1)).to(tl.float32)  # 1 - beta_1^t
        correction2 = (1 - tl.exp(t64 * log2)).to(tl.float32)
        row = table + 5 * tl.load(chunks + 2 * pid)
        first = tl.load(chunks + 2 * pid + 1)
        theta_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
        g_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        m_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
        v_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
        size = tl.load(row + 4)
        for start in range(0, CHUNK, BLOCK):
            i = first + start + tl.arange(0, BLOCK)
            inside = i < size
            g = clip * tl.load(g_ptr + i, mask=inside, other=0.0)
            theta = tl.load(theta_ptr + i, mask=inside, other=0.0)
            # m <- beta_1 m + (1 - beta_1) g,   v <- beta_2 v + (1 - beta_2) g^2
            m = beta1 * tl.load(m_ptr + i, mask=inside, other=0.0) + rest1 * g
            v = beta2 * tl.load(v_ptr + i, mask=inside, other=0.0) + rest2 * g * g
            # theta <- theta - eta lambda theta - eta m^ / (sqrt(v^) + eps)
            theta -= lr * decay * theta
            theta -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
            tl.store(theta_ptr + i, theta, mask=inside)
            tl.store(m_ptr + i, m, mask=inside)
            tl.store(v_ptr + i, v, mask=inside)


@triton.jit
def sgd_kernel(table, chunks, parts, n, norm_out, rates, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """`table` (tensors, 3): addresses of theta and g, and their size.  `rates`: eta and c."""
    pid = tl.program_id(0)
    norm = norm_of(parts, n, BLOCK)
    if pid == 0:
        tl.store(norm_out, norm)
    if norm < float("inf"):
        lr, max_norm = tl.load(rates), tl.load(rates + 1)
        clip = 1 / tl.maximum(norm / max_norm, 1.0)  # c / max(|g|, c), for c = inf too
        row = table + 3 * tl.load(chunks + 2 * pid)
        first = tl.load(chunks + 2 * pid + 1)
        theta_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
        g_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
        size = tl.load(row + 2)
        for start in range(0, CHUNK, BLOCK):
            i = first + start + tl.arange(0, BLOCK)
            inside = i < size
            g = tl.load(g_ptr + i, mask=inside, other=0.0)
            theta = tl.load(theta_ptr + i, mask=inside, other=0.0)
            # theta <- theta - eta c / max(|g|, c) g
            tl.store(theta_ptr + i, theta - lr * clip * g, mask=inside)


class Launch:
    """The tables of one list of tensors.  They are built again only when an address changes."""

    def __init__(self) -> None:
        self.sizes: tuple[int, ...] = ()
        self.addresses: list[int] = []
        self.values: tuple[float, float] | None = None

    def prepare(self, columns: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
        """Columns of tensors of equal sizes -> (addresses and sizes, chunks)."""
        first = columns[0]
        for column in columns:
            for tensor, like in zip(column, first, strict=True):
                if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                    raise ValueError(
                        f"the update takes contiguous float32 tensors, not {tensor.dtype} "
                        f"of strides {tensor.stride()}"
                    )
                if tensor.shape != like.shape:
                    raise ValueError(f"{list(tensor.shape)} beside {list(like.shape)}")
        device = first[0].device
        sizes = tuple(tensor.numel() for tensor in first)
        if sizes != self.sizes:
            pieces = [(i, k) for i, size in enumerate(sizes) for k in range(0, size, CHUNK)]
            self.chunks = torch.tensor(pieces, dtype=torch.int64).view(-1, 2).to(device)
            self.sizes = sizes
        addresses = [
            number
            for row in zip(*columns, strict=True)
            for number in (*(tensor.data_ptr() for tensor in row), row[0].numel())
        ]
        if addresses != self.addresses:
            self.table = torch.tensor(addresses, dtype=torch.int64).to(device, non_blocking=True)
            self.addresses = addresses
        return self.table, self.chunks

    def rates(self, lr: float, max_norm: float, device: torch.device) -> Tensor:
        """Eta and c on the device, written when they change."""
        if self.values != (lr, max_norm):
            self.on_device = torch.tensor([lr, max_norm], dtype=torch.float32).to(device)
            self.values = (lr, max_norm)
        return self.on_device


def squares(launch: Launch, grads: Sequence[Tensor]) -> Tensor:
    """The parts of |g|^2, (programs,)."""
    table, chunks = launch.prepare([grads])
    if not len(chunks):
        return torch.zeros(1, device=grads[0].device)
    parts = torch.empty(len(chunks), device=grads[0].device)
    squares_kernel[(len(chunks),)](table, chunks, parts, CHUNK, BLOCK, num_warps=WARPS)
    return parts


def adamw(
    launch: Launch,
    columns: Sequence[Sequence[Tensor]],
    parts: Tensor,
    steps: tuple[Tensor, Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    max_norm: float,
) -> Tensor:
    """Updates theta, m and v, given the columns theta, g, m, v.  Returns |g|."""
    table, chunks = launch.prepare(columns)
    norm = torch.empty((), device=parts.device)
    constants = [
        number for beta in betas for number in (beta, 1 - beta, math.log(beta) if beta else -1e30)
    ]
    step, next_step = steps
    adamw_kernel[(max(1, len(chunks)),)](
        table, chunks, parts, len(parts), norm, step, next_step,
        launch.rates(lr, max_norm, parts.device), *constants, eps, weight_decay,
        CHUNK, BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return norm


def sgd(
    launch: Launch,
    columns: Sequence[Sequence[Tensor]],
    parts: Tensor,
    lr: float,
    max_norm: float,
) -> Tensor:
    """Updates theta, given the columns theta and g.  Returns |g|."""
    table, chunks = launch.prepare(columns)
    norm = torch.empty((), device=parts.device)
    rates = launch.rates(lr, max_norm, parts.device)
    sgd_kernel[(max(1, len(chunks)),)](
        table, chunks, parts, len(parts), norm, rates, CHUNK, BLOCK, num_warps=WARPS
    )
    return norm
