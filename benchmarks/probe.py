"""What a machine does at most, and the candidates for each product of a LoRA layer.

    ceiling    x W^T alone; y += x W^T (beta = 1: is the read of y hidden?); a copy of y
    y          x W^T + xA B^T, given xA: the update first or last, one product over the width K + R,
               and Triton by pointers or by the tensor memory accelerator, its update early or late
    dx         dy W + dS A, given dS, likewise
    expand     xA B^T alone
    x to y     all of it from x: shrink and update first, one product over N + R outputs, the fused
               kernel, and for at most 16 rows the decoding kernel
    shrink     xA = c x A^T
    dS, dB     two products, or one pass over dy
    dA         dS^T x

Each group's first candidate is torch's plain form; the others compute the same.  On a GPU the
launches are captured in a graph, so a time is the device's own.  Each candidate is checked against
float64 on the same inputs: `error` is the largest error over the largest value.  Rounds alternate
between the candidates.  The file is written after each shape; no shape is begun after `--seconds`.

Without a GPU a small shape shows that the program runs; Triton's kernels take part with
TRITON_INTERPRET=1.

    python -m benchmarks.probe

Shapes:  M rows   K inputs   N outputs   R rank
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import options, write
from benchmarks.device import graphed, repeats, seconds, synchronize
from benchmarks.lora_sides import SCALING, Inputs, inputs
from benchmarks.paper import Shape
from minigpt_kernels.backend import INSTALLED

if TYPE_CHECKING:
    from minigpt_kernels.lora_triton import Tile

GPU_SHAPES = (
    Shape(8192, 4096, 4096, 16),
    Shape(4096, 768, 768, 8),
    Shape(8192, 4096, 11008, 16),
    Shape(4096, 768, 3072, 8),
    Shape(16, 4096, 14336, 16),
    Shape(1, 4096, 4096, 16),
)
CPU_SHAPES = (Shape(16, 64, 48, 8),)
FEW = 16  # rows of the decoding kernel
LARGEST = 5e-2  # error of bf16, relative to the largest value

Candidate = Callable[[], tuple[Tensor, ...]]


class Group(NamedTuple):
    """Candidates for one product, and its value in float64; None: there is none to check."""

    want: tuple[Tensor, ...] | None
    candidates: Mapping[str, Candidate]


def groups(given: Inputs, triton: bool) -> dict[str, Group]:
    """The groups of one shape; `triton`: with Triton's candidates."""
    x, w, a, b, dy = (t.detach() for t in given)
    M, N, c = len(x), len(w), SCALING
    X, W, A, B, DY = (t.double() for t in (x, w, a, b, dy))
    xa, ds = (c * X @ A.T).to(x.dtype), (c * DY @ B).to(x.dtype)
    XA, DS = xa.double(), ds.double()
    y = x.new_zeros(M, N)
    wide_x, wide_w = torch.cat([x, xa], 1), torch.cat([w, b], 1)  # over K + R
    tall_w = torch.cat([w, a])  # N + R outputs

    def outputs() -> Tensor:
        both = x @ tall_w.T
        return both[:, :N].addmm_(both[:, N:], b.T, alpha=c)

    figures = {
        "ceiling": Group(
            None,
            {
                "x W^T": lambda: (torch.mm(x, w.T, out=y),),
                "y += x W^T": lambda: (y.addmm_(x, w.T),),
                "copy of y": lambda: (y.clone(),),
            },
        ),
        "y": Group(
            (X @ W.T + XA @ B.T,),
            {
                "update last": lambda: ((x @ w.T).addmm_(xa, b.T),),
                "update first": lambda: ((xa @ b.T).addmm_(x, w.T),),
                "over K + R": lambda: (wide_x @ wide_w.T,),
            },
        ),
        "dx": Group(
            (DY @ W + DS @ A,),
            {
                "update last": lambda: ((dy @ w).addmm_(ds, a),),
                "update first": lambda: ((ds @ a).addmm_(dy, w),),
            },
        ),
        "expand": Group((XA @ B.T,), {"torch": lambda: (xa @ b.T,)}),
        "x to y": Group(
            (X @ W.T + c * X @ A.T @ B.T,),
            {
                "update first": lambda: ((c * (x @ a.T) @ b.T).addmm_(x, w.T),),
                "over N + R": lambda: (outputs(),),
            },
        ),
        "shrink": Group((c * X @ A.T,), {"torch": lambda: (c * (x @ a.T),)}),
        "dS, dB": Group((c * DY @ B, DY.T @ XA), {"torch": lambda: (c * (dy @ b), dy.T @ xa)}),
        "dA": Group((DS.T @ X,), {"torch": lambda: (ds.T @ x,)}),
    }
    if not triton:
        return figures
    more = triton_candidates(x, w, a, b, dy, xa, ds)
    return {
        name: Group(group.want, {**group.candidates, **more.get(name, {})})
        for name, group in figures.items()
    }


def triton_candidates(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor, xa: Tensor, ds: Tensor
) -> dict[str, dict[str, Candidate]]:
    """Group -> Triton's candidates; those by the tensor memory accelerator from Hopper on."""
    from benchmarks import probe_kernels
    from minigpt_kernels import lora_triton

    c, few = SCALING, len(x) <= FEW
    tile = probe_kernels.POINTERS
    y: dict[str, Candidate] = {"pointers": lambda: (probe_kernels.expand(x, w, xa, b, tile),)}
    dx: dict[str, Candidate] = {"pointers": lambda: (probe_kernels.expand(dy, w.T, ds, a.T, tile),)}
    if x.device.type == "cpu" or torch.cuda.get_device_capability(x.device)[0] >= 9:
        for box in probe_kernels.TMA:
            for late in (False, True):
                name = f"TMA {box.BM}x{box.BN} {'late' if late else 'early'}"
                y[name] = tma(x, w, xa, b, box, late)
                dx[name] = tma(dy, w.T, ds, a.T, box, late)
    whole: dict[str, Candidate] = {
        "fused": lambda: (lora_triton.fused(x, w, None, a, b, c)[0],),
    }
    if few:
        whole["decode"] = lambda: (probe_kernels.decode(x, w, a, b, c),)
    return {
        "y": y,
        "dx": dx,
        "x to y": whole,
        "shrink": {"triton": lambda: (lora_triton.shrink(x, a, c, None),)},
        "dS, dB": {"triton": lambda: one_pass(dy, b, xa)},
        "dA": {"triton": lambda: (summed(lora_triton.outer(ds, x, None), a),)},
    }


def tma(x: Tensor, w: Tensor, s: Tensor, b: Tensor, box: "Tile", late: bool) -> Candidate:
    from benchmarks import probe_kernels

    return lambda: (probe_kernels.expand_tma(x, w, s, b, box, late),)


def one_pass(dy: Tensor, b: Tensor, xa: Tensor) -> tuple[Tensor, Tensor]:
    """dS and dB by one pass over dy and the sums of its parts."""
    from minigpt_kernels import lora_triton

    ds, parts = lora_triton.dy_pass(dy, b, xa, SCALING)
    return ds, summed(parts, b)


def summed(parts: Tensor, like: Tensor) -> Tensor:
    from minigpt_kernels import lora_triton

    out = torch.empty_like(like)
    lora_triton.add([(parts, out)])
    return out


def error(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest error, over the largest value of its tensor."""
    return max(
        float((g.double() - w).abs().max() / w.abs().max()) for g, w in zip(got, want, strict=True)
    )


def measure(
    shape: Shape, dtype: torch.dtype, device: str, rounds: int, failed: list[str]
) -> list[dict[str, object]]:
    """A row for each group, candidate and round; `failed` gets the candidates that do not run or
    are wrong.
    """
    triton = INSTALLED and (device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
    rows: list[dict[str, object]] = []
    for name, group in groups(inputs(shape, dtype, device, 0), triton).items():
        ready: dict[str, tuple[Callable[[], object], int, float]] = {}
        for candidate, run in group.candidates.items():
            try:
                off = error(run(), group.want) if group.want is not None else 0.0
                if not off <= LARGEST:
                    raise ValueError(f"error {off:.3g}, at most {LARGEST} allowed")
                call = graphed(run) if device == "cuda" else run
                ready[candidate] = call, repeats(call, device), off
            except Exception:
                traceback.print_exc()
                failed.append(f"{name}: {candidate} at {tuple(shape)}")
        times: dict[str, list[float]] = {candidate: [] for candidate in ready}
        for number in range(rounds):
            for candidate, (call, count, off) in ready.items():
                taken = seconds(call, device, count)
                times[candidate].append(taken)
                facts = {"group": name, "candidate": candidate, **shape._asdict()}
                facts |= {"dtype": str(dtype).removeprefix("torch."), "round": number}
                rows.append({**facts, "seconds": taken, "error": off})
        synchronize(device)
        first = median(next(iter(times.values()))) if times else 0.0
        for candidate, values in times.items():
            middle = median(values)
            print(
                f"{name:8} {candidate:22} {tuple(shape)!s:24} "
                f"{1e6 * middle:10.1f} us {middle / first:6.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = options(__doc__ or "", rounds=7)
    parser.add_argument("--seconds", type=float, default=360, help="no shape is begun after them")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes, dtype = (
        (GPU_SHAPES, torch.bfloat16) if device == "cuda" else (CPU_SHAPES, torch.float16)
    )
    begin, rows, failed = time.monotonic(), list[dict[str, object]](), list[str]()
    for shape in shapes:
        if time.monotonic() - begin > given.seconds:
            failed.append(f"no time for {tuple(shape)}")
            continue
        rows += measure(shape, dtype, device, given.rounds, failed)
        write(given.out / "probe.csv", given.threads, rows)
    if failed:
        sys.exit("probe.csv lacks " + "; ".join(failed))


if __name__ == "__main__":
    main()
