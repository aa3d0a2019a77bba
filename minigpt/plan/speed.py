"""What a step takes, in seconds, from the operations that it runs.

    calibrated   each operation of the trace runs here, on tensors of its shapes, the costliest
                 first, for some seconds in all; what is not reached takes its FLOPs, or the bytes
                 that it moves, at the rate of what was.
    published    from a GPU's data sheet: an operation takes the longest of
                     its FLOPs / (U_f peak)    its bytes / (U_b bandwidth)    one launch
                 (Williams et al. 2009, the roofline, https://doi.org/10.1145/1498765.1498785).
                 U_f, U_b and the launch are assumptions.

Beside the trace stand the update of what trains, 36 bytes a float32 parameter (|g|^2 reads g; the
update reads g, theta, m and v and writes them), the dequantisation of weights in 4 bits, and what
several processes send each other (minigpt/plan/formulas.py), which is taken to pass while they
compute: the longer of the two counts.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from minigpt.plan import formulas
from minigpt.plan.trace import Operation, Spec
from minigpt_kernels import ClippedAdamW, nf4
from minigpt_kernels.nf4_linear import TILE

PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "baddbmm": (1, 2)}
ROWS = ("embedding", "index_select", "gather", "index")  # read some rows of a table
PRODUCT, ATTENTION, OTHER = "products", "attention", "other operations"
DEQUANTIZATION, UPDATE, HOST = "dequantisation", "update", "host"
COMMUNICATION = "communication"
SAMPLE = 2**22  # numbers of which an update, and a dequantisation, are timed
UPDATE_BYTES = 9  # times those of a trained parameter
DEQUANTIZED_BYTES = 4.5  # a number: half a byte read, four written


@dataclass(frozen=True)
class Gpu:
    """Published figures: FLOP/s of dense products, bytes/s of memory and of the link to others, one
    way, and bytes of memory.
    """

    bf16: float
    fp32: float
    bandwidth: float
    link: float
    memory: int
    source: str


# NVIDIA's data sheets; figures there with sparsity are halved
GPUS = {
    "a100": Gpu(312e12, 19.5e12, 2039e9, 300e9, 80 * 10**9, "A100 80GB SXM, NVLink 3"),
    "h100": Gpu(989e12, 67e12, 3350e9, 450e9, 80 * 10**9, "H100 SXM, NVLink 4"),
    "h200": Gpu(989e12, 67e12, 4800e9, 450e9, 141 * 10**9, "H200 SXM, NVLink 4"),
    "l4": Gpu(121e12, 30.3e12, 300e9, 32e9, 24 * 10**9, "L4, PCIe 4 x16"),
    "rtx4090": Gpu(165e12, 82.6e12, 1008e9, 32e9, 24 * 10**9, "RTX 4090, PCIe 4 x16"),
}
U_FLOPS, U_BYTES, LAUNCH = 0.6, 0.8, 5e-6  # assumptions


@dataclass(frozen=True)
class Work:
    """What a step has to do.

    Attributes:
        operations: of the trace, with how often each runs.
        calls: all of them, views included.
        trained: shapes and dtypes of the parameters that train.
        dequantized: numbers that are dequantised, each as often as it is.
        sent: bytes that a process sends.
    """

    operations: Counter[Operation]
    calls: int
    trained: Sequence[Spec]
    dequantized: int = 0
    sent: int = 0


def flops(op: Operation) -> int:
    """Of a product, or of attention; 0 for any other operation."""
    if op.name in PRODUCTS:
        a, b = (op.leaves[i] for i in PRODUCTS[op.name])
        count = 2 * b.shape[-1]
        for size in a.shape:
            count *= size
        return count
    if op.name.startswith("_scaled_dot_product"):
        backward = "backward" in op.name
        q, k = op.tensors[backward : backward + 2]
        (B, H, T, N), S = q.shape, k.shape[2]
        return formulas.attention_flops(B, H, T, S, N)[backward]
    return 0


def moved(op: Operation) -> int:
    """Bytes that it reads and writes."""
    made = sum(s.nbytes for s in op.outputs)
    if op.name in ROWS:
        return 2 * made
    return made + sum(s.nbytes for s in op.tensors)


def kind(op: Operation) -> str:
    """Which part of the time it belongs to."""
    if op.name in PRODUCTS:
        return PRODUCT
    return ATTENTION if op.name.startswith("_scaled_dot_product") else OTHER


def published(work: Work, gpu: Gpu) -> dict[str, float]:
    """Seconds by part, from a GPU's data sheet."""
    parts = dict.fromkeys((PRODUCT, ATTENTION, OTHER), 0.0)
    for op, count in work.operations.items():
        narrow = all(s.dtype.itemsize < 4 for s in op.tensors if s.dtype.is_floating_point)
        compute = flops(op) / (U_FLOPS * (gpu.bf16 if narrow else gpu.fp32))
        parts[kind(op)] += count * max(compute, moved(op) / (U_BYTES * gpu.bandwidth), LAUNCH)
    trained = sum(s.nbytes for s in work.trained)
    parts[DEQUANTIZATION] = work.dequantized * DEQUANTIZED_BYTES / (U_BYTES * gpu.bandwidth)
    parts[UPDATE] = UPDATE_BYTES * trained / (U_BYTES * gpu.bandwidth)
    computing = sum(parts.values()) - parts[UPDATE]
    parts[COMMUNICATION] = max(0.0, work.sent / (U_BYTES * gpu.link) - computing)
    return parts


def calibrated(work: Work, seconds: float = 5.0, device: str = "cpu") -> dict[str, float]:
    """Seconds by part, as operations run here now.

    Args:
        seconds: how long they run, about.
    """
    deadline = time.perf_counter() + seconds
    update = update_seconds(work.trained, device)
    dequantization = dequantize_seconds(work.dequantized, device)
    taken = replayed(work.operations, deadline, device)
    parts = dict.fromkeys((PRODUCT, ATTENTION, OTHER), 0.0)
    for op, count in work.operations.items():
        parts[kind(op)] += count * taken(op)
    parts[DEQUANTIZATION], parts[UPDATE] = dequantization, update
    if device == "cpu":  # a GPU computes while its host goes on
        views = work.calls - sum(work.operations.values())
        parts[HOST] = views * host_seconds()
    return parts


def replayed(
    operations: Counter[Operation], deadline: float, device: str
) -> Callable[[Operation], float]:
    """Runs the operations, the costliest first; returns the seconds of any of them."""
    room = psutil.virtual_memory().available // 4
    measured: dict[Operation, float] = {}
    rates = {PRODUCT: 5e10, ATTENTION: 2e10, OTHER: 5e9}  # where none of a kind is reached
    order = sorted(
        operations, key=lambda op: operations[op] * (flops(op) / 1e11 + moved(op) / 1e10)
    )
    for op in reversed(order):
        if time.perf_counter() > deadline:
            break
        if moved(op) < room:
            measured[op] = operation_seconds(op, device)
    for part in rates:
        some = [op for op in measured if kind(op) == part]
        if total := sum(measured[op] for op in some):
            rates[part] = sum(_amount(op) for op in some) / total
    return lambda op: measured.get(op) or _amount(op) / rates[kind(op)]


def _amount(op: Operation) -> int:
    return flops(op) or moved(op)


def operation_seconds(op: Operation, device: str) -> float:
    """Of one operation on tensors of its shapes."""
    leaves = [_real(x, device) if isinstance(x, Spec) else x for x in op.leaves]
    leaves = [torch.device(device) if isinstance(x, torch.device) else x for x in leaves]
    args, kwargs = tree_unflatten(leaves, op.structure)
    return timed(lambda: op.function(*args, **kwargs), device)


def timed(run: Callable[[], Any], device: str = "cpu", repeats: int = 5) -> float:
    """The median of some runs after a first one, fewer where they take long."""
    taken: list[float] = []
    while len(taken) <= repeats and (len(taken) < 2 or sum(taken) < 0.2):
        begin = time.perf_counter()
        run()
        if device != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def _real(s: Spec, device: str) -> Tensor:
    """A tensor of these strides; integers are 0, so that they are an index everywhere."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(s.shape, s.stride, strict=True))
    flat = torch.empty(max(extent, 1), dtype=s.dtype, device=device)
    flat.fill_(0.5 if s.dtype.is_floating_point else 0)
    return flat.as_strided(s.shape, s.stride)


def update_seconds(trained: Sequence[Spec], device: str = "cpu") -> float:
    """Of clip and update of parameters of these shapes."""
    sample: list[Spec] = []
    for s in trained:
        if not sample or sum(x.nbytes for x in sample) + s.nbytes <= 4 * SAMPLE:
            sample.append(s)
    if not sample:
        return 0.0
    parameters = [nn.Parameter(_real(s, device)) for s in sample]
    optimizer = ClippedAdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    share = sum(s.nbytes for s in trained) / sum(s.nbytes for s in sample)
    return share * timed(optimizer.step, device)


def dequantize_seconds(numbers: int, device: str = "cpu") -> float:
    """Of so many numbers of weights in 4 bits."""
    if not numbers:
        return 0.0
    weight = nf4.quantize(torch.full((SAMPLE // 4096, 4096), 0.5, device=device))

    def run() -> None:
        for _ in nf4.tiles(weight, torch.float32, TILE):
            pass

    return numbers / SAMPLE * timed(run, device)


def host_seconds() -> float:
    """Of Python and autograd around one call that computes nothing."""
    x = torch.zeros(1, requires_grad=True)
    calls = 100

    def run() -> None:
        y = x
        for _ in range(calls):
            y = y.view(1)
        y.backward()

    return timed(run) / (2 * calls)
