"""Norm, clip and update of all trainable tensors in two Triton launches.

    launch 1   part[p] = sum of squares of the chunks p, p + P, p + 2 P, ... of the gradients
    launch 2   |g|^2 = sum_p part[p], in the same order in every program;
               theta, m, v of one chunk <- the update, with g clipped by |g|

A chunk is a piece of one tensor.  One table holds the tensors' sizes and addresses, another says
which piece of which tensor a chunk is and which group's settings it takes.  So any number of
tensors of any size in any groups takes two launches, nothing is flattened or copied, and AdamW
moves 32 bytes a parameter (g twice; theta, m and v each way).  P is at most PARTS, so that what
every program of launch 2 reads before it starts is 4 KB, however many the chunks are.  No atomics:
two runs give the same bits.  Nothing returns to the host.

Each program of launch 2 counts the updates in a slot of its own; a count that all share would be
read by some while another writes it.

Settings are float64: in float32, 1 - beta and 1 - beta^t lose half of their digits near beta = 1.
"""

from array import array
from bisect import bisect
from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import chain
from operator import or_

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import capturing, outside_capture, upload

CHUNK = 4096  # elements of a chunk
BLOCK = 1024  # elements that launch 2 holds at a time
PARTS = 1024  # programs of launch 1, at most
WARPS = 4


@triton.jit
def locate(table, chunks, chunk, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """The tensor's place in a row of `table`, the chunk's first element, the tensor's size."""
    row = table + tl.load(chunks + 3 * chunk)
    first = tl.multiple_of(tl.load(chunks + 3 * chunk + 1), CHUNK)
    return row, first, tl.multiple_of(tl.load(row), VECTOR)


@triton.jit
def address(row, tensors, column: tl.constexpr, VECTOR: tl.constexpr):
    """An entry of `table`, whose rows are sizes, theta, g, m, v."""
    pointer = tl.load(row + column * tensors).to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 4 * VECTOR)  # bytes


@triton.jit(do_not_specialize=["tensors", "n"])
def squares_kernel(table, chunks, parts, tensors, n, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """`table` (3 or 5, tensors), `chunks` (n, 3): tensor, first element, group; `parts` (P,)."""
    pid = tl.program_id(0)
    s = tl.zeros((CHUNK,), tl.float32)
    for chunk in range(pid, n, tl.num_programs(0)):
        row, first, size = locate(table, chunks, chunk, CHUNK, VECTOR)
        g_ptr = address(row, tensors, 2, VECTOR)
        i = first + tl.arange(0, CHUNK)
        g = tl.load(g_ptr + i, mask=i < size, other=0.0)
        s += g * g
    tl.store(parts + pid, tl.sum(s))


@triton.jit
def norm_of(parts, n_parts, PARTS: tl.constexpr):
    """|g| from its parts."""
    i = tl.arange(0, PARTS)
    return tl.sqrt(tl.sum(tl.load(parts + i, mask=i < n_parts, other=0.0)))


@triton.jit(do_not_specialize=["tensors", "n_parts"])
def adamw_kernel(
    table, chunks, settings, counts, parts, norm_out, tensors, n_parts,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`settings` (groups, 8): eta, c, beta_1 and its log, beta_2 and its log, epsilon, lambda;
    `counts` (n,): the updates made so far.
    """
    pid = tl.program_id(0)
    row, first, size = locate(table, chunks, pid, CHUNK, VECTOR)
    theta_ptr = address(row, tensors, 1, VECTOR)
    g_ptr = address(row, tensors, 2, VECTOR)
    m_ptr = address(row, tensors, 3, VECTOR)
    v_ptr = address(row, tensors, 4, VECTOR)
    own = settings + 8 * tl.load(chunks + 3 * pid + 2)
    t = tl.load(counts + pid) + 1
    norm = norm_of(parts, n_parts, PARTS)
    finite = norm < float("inf")
    if pid == 0:
        tl.store(norm_out, norm)
    tl.store(counts + pid, tl.where(finite, t, t - 1))
    if finite:
        lr, max_norm = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.float32)
        beta1, log1, beta2, log2 = (
            tl.load(own + 2), tl.load(own + 3), tl.load(own + 4), tl.load(own + 5)
        )  # fmt: skip
        eps, decay = tl.load(own + 6).to(tl.float32), tl.load(own + 7).to(tl.float32)
        keep1, take1 = beta1.to(tl.float32), (1 - beta1).to(tl.float32)
        keep2, take2 = beta2.to(tl.float32), (1 - beta2).to(tl.float32)
        t64 = t.to(tl.float64)
        correction1 = (1 - tl.exp(t64 * log1)).to(tl.float32)  # 1 - beta_1^t
        correction2 = (1 - tl.exp(t64 * log2)).to(tl.float32)
        clip = tl.minimum(max_norm / (norm + 1e-6), 1.0)
        for start in range(0, CHUNK, BLOCK):
            i = first + start + tl.arange(0, BLOCK)
            inside = i < size
            g = clip * tl.load(g_ptr + i, mask=inside, other=0.0)
            theta = tl.load(theta_ptr + i, mask=inside, other=0.0)
            # m <- beta_1 m + (1 - beta_1) g,   v <- beta_2 v + (1 - beta_2) g^2
            m = keep1 * tl.load(m_ptr + i, mask=inside, other=0.0) + take1 * g
            v = keep2 * tl.load(v_ptr + i, mask=inside, other=0.0) + take2 * g * g
            # theta <- theta - eta lambda theta - eta m^ / (sqrt(v^) + eps)
            theta -= lr * decay * theta
            theta -= lr * (m / correction1) / (tl.sqrt(v / correction2) + eps)
            tl.store(theta_ptr + i, theta, mask=inside)
            tl.store(m_ptr + i, m, mask=inside)
            tl.store(v_ptr + i, v, mask=inside)


@triton.jit(do_not_specialize=["tensors", "n_parts"])
def sgd_kernel(
    table, chunks, settings, parts, norm_out, tensors, n_parts,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`settings` (groups, 2): eta and c."""
    pid = tl.program_id(0)
    row, first, size = locate(table, chunks, pid, CHUNK, VECTOR)
    theta_ptr = address(row, tensors, 1, VECTOR)
    g_ptr = address(row, tensors, 2, VECTOR)
    own = settings + 2 * tl.load(chunks + 3 * pid + 2)
    norm = norm_of(parts, n_parts, PARTS)
    if pid == 0:
        tl.store(norm_out, norm)
    if norm < float("inf"):
        lr, max_norm = tl.load(own).to(tl.float32), tl.load(own + 1).to(tl.float32)
        clip = 1 / tl.maximum(norm / max_norm, 1.0)  # c / max(|g|, c), for c = inf too
        for start in range(0, CHUNK, BLOCK):
            i = first + start + tl.arange(0, BLOCK)
            inside = i < size
            g = tl.load(g_ptr + i, mask=inside, other=0.0)
            theta = tl.load(theta_ptr + i, mask=inside, other=0.0)
            # theta <- theta - eta c / max(|g|, c) g
            tl.store(theta_ptr + i, theta - lr * clip * g, mask=inside)


class Tables:
    """What the two launches read: addresses, chunks and settings, on the device.

    Every step reads the tensors' addresses and sizes anew: with a stale one a kernel would write
    where it must not.  What differs from the step before is checked, built and copied again; the
    settings in place, so that a captured CUDA graph reads new ones.  Whatever a capture has used is
    kept as long as the tables are.
    """

    device: torch.device
    table: Tensor  # (1 + columns, tensors): sizes and addresses
    chunks: Tensor  # (n, 3): tensor, first element, group
    settings: Tensor  # (groups, 8 or 2)

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.layout: tuple[torch.device, list[int], list[int]] | None = None
        self.written: tuple[torch.device | None, list[tuple[float, ...]]] = (None, [])
        self.captured: list[object] = []

    def take(
        self,
        columns: Sequence[Sequence[Tensor]],
        ends: list[int],
        settings: list[tuple[float, ...]],
    ) -> None:
        """Columns theta, g, ... of tensors; group k ends before tensor `ends[k]`.

        Raises:
            Unfit: the kernels do not work on such tensors.
        """
        self.device = columns[0][0].device
        capture = capturing(self.device)  # only its replays fill what is built in it
        sizes = [*map(Tensor.numel, columns[0])]
        n = len(sizes)
        numbers = [*sizes, *map(Tensor.data_ptr, chain.from_iterable(columns))]
        if numbers != self.numbers or not all(map(Tensor.is_contiguous, columns[1])):
            for k, column in enumerate(columns, 1):
                own = slice(n * k, n * (k + 1))
                if k == 2 or sizes != self.numbers[:n] or numbers[own] != self.numbers[own]:
                    _check(column, columns[0], self.device)
            aligned = all(size % 4 == 0 for size in sizes) and reduce(or_, numbers[n:]) % 16 == 0
            self.vector = 4 if aligned else 1  # elements that a thread moves at once
            self.table = self._upload(numbers)
            self.numbers = [] if capture else numbers
        layout = (self.device, sizes, ends)
        if layout != self.layout:
            # a tensor without elements has a chunk, too, which counts its updates
            self.slots = [max(1, -(-size // CHUNK)) for size in sizes]
            group = [bisect(ends, i) for i in range(n)]
            pieces = (
                (i, CHUNK * k, group[i]) for i, own in enumerate(self.slots) for k in range(own)
            )
            self.chunks = self._upload(chain.from_iterable(pieces)).view(-1, 3)
            self.layout = None if capture else layout
        self.write(settings)
        if capture:
            self.captured.append((self.table, self.chunks, self.settings))

    def write(self, settings: list[tuple[float, ...]]) -> None:
        """The groups' settings, in place where their number is as before."""
        key = (self.device, settings)
        if key == self.written:
            return
        outside_capture(self.device)
        there = upload(torch.tensor(settings, dtype=torch.float64), self.device)
        if self.written[0] == self.device and len(settings) == len(self.written[1]):
            self.settings.copy_(there)
        else:
            self.settings = there
        self.written = key

    def _upload(self, numbers: Iterable[int]) -> Tensor:
        host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
        if not capturing(self.device):
            return upload(host, self.device)
        self.captured.append(host := host.pin_memory())  # every replay reads it
        return host.to(self.device, non_blocking=True)


class Unfit(ValueError):
    """The kernels do not work on such tensors."""


def _check(column: Sequence[Tensor], like: Sequence[Tensor], device: torch.device) -> None:
    for tensor, first in zip(column, like, strict=True):
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise Unfit(
                f"the update takes contiguous float32 tensors, not {tensor.dtype} "
                f"of strides {tensor.stride()}"
            )
        if tensor.shape != first.shape or tensor.device != device:
            raise Unfit(
                f"{list(tensor.shape)} on {tensor.device} beside {list(first.shape)} on {device}"
            )


def squares(tables: Tables) -> Tensor:
    """The parts of |g|^2, (P,)."""
    n, P = len(tables.chunks), min(len(tables.chunks), PARTS)
    parts = torch.empty(P, device=tables.device)
    with torch.cuda.device_of(parts):
        squares_kernel[(P,)](
            tables.table, tables.chunks, parts, len(tables.slots), n,
            CHUNK, tables.vector, num_warps=WARPS,
        )  # fmt: skip
    return parts


def adamw(tables: Tables, counts: Tensor, parts: Tensor) -> Tensor:
    """Updates theta, m, v and the counts.  Returns |g|."""
    norm = torch.empty((), device=tables.device)
    if capturing(tables.device):
        tables.captured.append(counts)
    with torch.cuda.device_of(norm):
        adamw_kernel[(len(tables.chunks),)](
            tables.table, tables.chunks, tables.settings, counts, parts, norm, len(tables.slots),
            len(parts), CHUNK, BLOCK, PARTS, tables.vector, num_warps=WARPS,
        )  # fmt: skip
    return norm


def sgd(tables: Tables, parts: Tensor) -> Tensor:
    """Updates theta.  Returns |g|."""
    norm = torch.empty((), device=tables.device)
    with torch.cuda.device_of(norm):
        sgd_kernel[(len(tables.chunks),)](
            tables.table, tables.chunks, tables.settings, parts, norm, len(tables.slots),
            len(parts), CHUNK, BLOCK, PARTS, tables.vector, num_warps=WARPS,
        )  # fmt: skip
    return norm
