"""Norm, clip and update of all trainable tensors in two Triton launches.

    launch 1   part[p] = sum of squares of the chunks p, p + P, p + 2 P, ... of the gradients
    launch 2   |g|^2 = sum_p part[p], in the same order in every program;
               theta, m, v of one chunk <- the update of kernels/update.py

A chunk is a piece of one tensor.  `chunks` (n, 2) says which tensor it is of and where it begins;
`table` (tensors, 7) has the tensors' sizes, groups and addresses.  So any number of tensors of any
size in any groups takes two launches, nothing is flattened or copied, and AdamW moves 32 bytes a
parameter (g twice; theta, m and v each way).  P is at most PARTS, so that what every program of
launch 2 reads before it starts is 4 KB, however many the chunks are.  No atomics: two runs give the
same bits.

A thread moves four numbers at once where a chunk's addresses and length allow it.

Launch 1 counts a step, t <- t + 1, in the tensor's first chunk.  Launch 2 reads t in every chunk,
and the first takes the count back where the norm is not finite: no other reads t then.

Settings are float64: in float32, 1 - beta and 1 - beta^t lose half of their digits near beta = 1.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .backend import refuse_in_capture

if TYPE_CHECKING:
    from .update import Entry

CHUNK = tl.constexpr(4096)  # elements of a chunk
BLOCK = tl.constexpr(512)  # elements that a program works on at a time, four for each thread
PARTS = tl.constexpr(1024)  # programs of launch 1, at most
WARPS = 4

# columns of `table`
SIZE, GROUP, THETA, GRAD, M, V, STEP = map(tl.constexpr, range(7))
COLUMNS = tl.constexpr(7)


@triton.jit
def locate(table, chunks, chunk):
    """A chunk's tensor, as its row of `table`, and its first element."""
    return table + COLUMNS * tl.load(chunks + 2 * chunk), tl.load(chunks + 2 * chunk + 1)


@triton.jit
def length_of(row, first, VECTOR: tl.constexpr):
    """The chunk's length, a multiple of VECTOR."""
    return tl.multiple_of(tl.minimum(tl.load(row + SIZE) - first, CHUNK), VECTOR)


@triton.jit
def pointer(row, column, first, VECTOR: tl.constexpr):
    """To the chunk's first number in the tensor of that column."""
    address = tl.load(row + column) + 4 * first
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 4 * VECTOR)  # bytes


@triton.jit
def count_pointer(row):
    """To t."""
    return tl.load(row + STEP).to(tl.pointer_type(tl.float32))


@triton.jit
def squares_of(row, first, VECTOR: tl.constexpr):
    """The squares of one chunk of g, in BLOCK sums."""
    g_ptr = pointer(row, GRAD, first, VECTOR)
    length = length_of(row, first, VECTOR)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + i, mask=i < length, other=0.0)
        s += g * g
    return s


@triton.jit(do_not_specialize=["n"])
def squares_kernel(table, chunks, parts, n, COUNTS: tl.constexpr):
    """`parts` (P,).  With COUNTS, t <- t + 1."""
    pid = tl.program_id(0)
    s = tl.zeros((BLOCK,), tl.float32)
    for chunk in range(pid, n, tl.num_programs(0)):
        row, first = locate(table, chunks, chunk)
        if (tl.load(row + GRAD) % 16 == 0) & (length_of(row, first, 1) % 4 == 0):
            s += squares_of(row, first, 4)
        else:
            s += squares_of(row, first, 1)
        if COUNTS and first == 0:
            t_ptr = count_pointer(row)
            tl.store(t_ptr, tl.load(t_ptr) + 1)
    tl.store(parts + pid, tl.sum(s))


@triton.jit
def norm_of(parts, n_parts):
    """|g| from its parts."""
    i = tl.arange(0, PARTS)
    return tl.sqrt(tl.sum(tl.load(parts + i, mask=i < n_parts, other=0.0)))


@triton.jit
def adamw_chunk(row, first, settings, norm, VECTOR: tl.constexpr):
    """One chunk of theta, m and v; `settings` (6,): eta, c, epsilon, lambda, beta_1, beta_2."""
    lr, max_norm = tl.load(settings).to(tl.float32), tl.load(settings + 1).to(tl.float32)
    eps, decay = tl.load(settings + 2).to(tl.float32), tl.load(settings + 3).to(tl.float32)
    beta1, beta2 = tl.load(settings + 4), tl.load(settings + 5)
    keep1, take1 = beta1.to(tl.float32), (1 - beta1).to(tl.float32)
    keep2, take2 = beta2.to(tl.float32), (1 - beta2).to(tl.float32)
    t = tl.load(count_pointer(row)).to(tl.float64)
    # 1 - beta^t; the logarithm of 0 is left out
    correction1 = (1 - tl.exp(t * tl.log(tl.maximum(beta1, 1e-300)))).to(tl.float32)
    correction2 = (1 - tl.exp(t * tl.log(tl.maximum(beta2, 1e-300)))).to(tl.float32)
    clip = tl.minimum(max_norm / (norm + 1e-6), 1.0)
    theta_ptr, g_ptr = pointer(row, THETA, first, VECTOR), pointer(row, GRAD, first, VECTOR)
    m_ptr, v_ptr = pointer(row, M, first, VECTOR), pointer(row, V, first, VECTOR)
    length = length_of(row, first, VECTOR)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
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


@triton.jit(do_not_specialize=["n_parts"])
def adamw_kernel(table, chunks, settings, parts, norm_out, n_parts):
    """`settings` (groups, 6)."""
    pid = tl.program_id(0)
    row, first = locate(table, chunks, pid)
    group = settings + 6 * tl.load(row + GROUP)
    addresses = tl.load(row + THETA) | tl.load(row + GRAD) | tl.load(row + M) | tl.load(row + V)
    by_four = (addresses % 16 == 0) & (length_of(row, first, 1) % 4 == 0)
    norm = norm_of(parts, n_parts)
    if pid == 0:
        tl.store(norm_out, norm)
    if norm < float("inf"):
        if by_four:
            adamw_chunk(row, first, group, norm, 4)
        else:
            adamw_chunk(row, first, group, norm, 1)
    elif first == 0:
        t_ptr = count_pointer(row)
        tl.store(t_ptr, tl.load(t_ptr) - 1)


@triton.jit
def sgd_chunk(row, first, settings, norm, VECTOR: tl.constexpr):
    """One chunk of theta; `settings` (2,): eta, c."""
    lr, max_norm = tl.load(settings).to(tl.float32), tl.load(settings + 1).to(tl.float32)
    clip = 1 / tl.maximum(norm / max_norm, 1.0)  # c / max(|g|, c), for c = inf, too
    theta_ptr, g_ptr = pointer(row, THETA, first, VECTOR), pointer(row, GRAD, first, VECTOR)
    length = length_of(row, first, VECTOR)
    for start in range(0, CHUNK, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < length
        g = tl.load(g_ptr + i, mask=inside, other=0.0)
        theta = tl.load(theta_ptr + i, mask=inside, other=0.0)
        # theta <- theta - eta c / max(|g|, c) g
        tl.store(theta_ptr + i, theta - lr * clip * g, mask=inside)


@triton.jit(do_not_specialize=["n_parts"])
def sgd_kernel(table, chunks, settings, parts, norm_out, n_parts):
    """`settings` (groups, 2)."""
    pid = tl.program_id(0)
    row, first = locate(table, chunks, pid)
    group = settings + 2 * tl.load(row + GROUP)
    addresses = tl.load(row + THETA) | tl.load(row + GRAD)
    by_four = (addresses % 16 == 0) & (length_of(row, first, 1) % 4 == 0)
    norm = norm_of(parts, n_parts)
    if pid == 0:
        tl.store(norm_out, norm)
    if norm < float("inf"):
        if by_four:
            sgd_chunk(row, first, group, norm, 4)
        else:
            sgd_chunk(row, first, group, norm, 1)


class Launches:
    """The two launches, and what they read on the device: addresses, chunks and settings.

    Every step reads the tensors' sizes and addresses anew: with a stale one a kernel would write
    where it must not.  What differs from the step before is built and copied again; the settings in
    place, so that a captured CUDA graph reads new ones.  Whatever a capture has used is kept.
    """

    device: torch.device
    table: Tensor  # (tensors, 7), int64
    chunks: Tensor  # (n, 2), int64: tensor, first element
    settings: Tensor  # (groups, 6 or 2), float64

    def __init__(self) -> None:
        self.rows: list[int] = []  # what is in `table`, and on its device
        self.sizes: list[int] = []  # what `chunks` was built from
        self.written: tuple[torch.device | None, list[list[float]]] = (None, [])
        self.captured: list[object] = []

    def take(self, entries: "Sequence[Entry]", settings: list[list[float]]) -> None:
        """The tensors and settings of the next launches."""
        device = entries[0].theta.device
        if self.written[0] != device:
            self.rows, self.sizes, self.device = [], [], device
        self.adamw = entries[0].step is not None
        rows: list[int] = []
        for e in entries:
            tensors = (e.theta, e.grad, *e.moments, *([e.step] if e.step is not None else []))
            addresses = [t.data_ptr() for t in tensors]
            rows += [e.theta.numel(), e.group, *addresses, *[0] * (5 - len(addresses))]
        capture = self._capturing()  # only its replays fill what is built in it
        if rows != self.rows:
            self.table = self._upload(rows)
            self.rows = [] if capture else rows
        sizes = rows[:: COLUMNS.value]
        if sizes != self.sizes:
            # a tensor without elements has a chunk, too, which counts its updates
            self.chunks = self._upload(
                number
                for i, size in enumerate(sizes)
                for first in range(0, max(1, size), CHUNK.value)
                for number in (i, first)
            )
            self.sizes = [] if capture else sizes
        self.write(settings)
        if capture:
            self.captured.append((self.table, self.chunks, self.settings))

    def write(self, settings: list[list[float]]) -> None:
        """The groups' settings, in place where their number is as before."""
        if (self.device, settings) == self.written:
            return
        refuse_in_capture(self.device)
        host = torch.tensor(settings, dtype=torch.float64)
        if self.device.type == "cuda":
            host = host.pin_memory()  # the host does not wait for the copy
        if self.written[0] == self.device and host.shape == self.settings.shape:
            self.settings.copy_(host, non_blocking=True)
        else:
            self.settings = host.to(self.device, non_blocking=True)
        self.written = self.device, settings

    def squares(self, counts: bool = False) -> Tensor:
        """Launch 1: the parts of |g|^2, (P,).  `counts`: with AdamW's t <- t + 1."""
        n = len(self.chunks) // 2
        parts = torch.empty(min(n, PARTS.value), device=self.device)
        with torch.cuda.device_of(parts):
            squares_kernel[(len(parts),)](
                self.table, self.chunks, parts, n, COUNTS=counts and self.adamw, num_warps=WARPS
            )
        return parts

    def update(self, parts: Tensor) -> Tensor:
        """Launch 2: clips and updates.  Returns |g|."""
        norm = torch.empty((), device=self.device)
        kernel = adamw_kernel if self.adamw else sgd_kernel
        with torch.cuda.device_of(norm):
            kernel[(len(self.chunks) // 2,)](
                self.table,
                self.chunks,
                self.settings,
                parts,
                norm,
                len(parts),
                num_warps=WARPS,
            )
        return norm

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _upload(self, numbers: Iterable[int]) -> Tensor:
        host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
        if self.device.type == "cuda":
            host = host.pin_memory()  # the host does not wait for the copy
            if self._capturing():
                self.captured.append(host)  # every replay reads it
        return host.to(self.device, non_blocking=True)
