"""Forward and backward of one LoRA layer, ours against what else computes it.

All sides of a shape live in one process, get the same inputs and take turns, so that whatever else
the machine does falls on all.  A side that fails is left out and named at the end.

On a GPU, bf16: the sides of benchmarks/paper.py at its shapes, without and with dropout; a decoding
step (at most 16 rows) forward only, without a graph of autograd.  Several sets of inputs and
weights, together larger than twice the L2 cache, are used in turn.  "launched" is one call after
the other, as eager training makes them; where launching takes longer than the work, "graph" is the
same in a CUDA graph.  `floor` is the least that the FLOPs and bytes of the layer take at the
throughput of a large matrix product and the bandwidth of a large copy, both measured in the same
round.  The errors without dropout are those against float64.

On a CPU, fp32: ours against HF PEFT's layer; query, key and value in one call against three of its
layers.  `kept_bytes` is what autograd keeps from forward to backward, parameters left out.

    python -m benchmarks.lora_linear        -> results/lora_linear_cpu.csv
                            or, on a GPU,      results/lora_linear_gpu.csv, lora_linear_errors.csv
    columns: M, K, N, R, siblings, dropout, side, phase, round, seconds, kept_bytes
    columns: capability, dtype, M, K, N, R, dropout, side, timing, phase, round, seconds
    columns: M, K, N, R, side, tensor, error
"""

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import device as on
from benchmarks import paper
from benchmarks.common import OURS, P, R, fresh, options, write, write_each
from benchmarks.device import Run
from benchmarks.lora_sides import Inputs, Layer, errors, inputs, layers, ours, peft_layer
from benchmarks.methods import PEFT, saved_bytes
from benchmarks.paper import Shape

Row = dict[str, object]

FORWARD, BOTH = "forward", "forward + backward"
LAUNCHED, GRAPH = "launched", "graph"
FEW = 16  # rows of a decoding step, at most
DROPOUTS = (0.0, 0.05)
GPU_SHAPES = [
    Shape(8192, 4096, 4096, 16),
    Shape(8192, 4096, 11008, 16),
    Shape(4096, 768, 768, 8),
    Shape(4096, 768, 3072, 8),
    Shape(1, 4096, 4096, 16),
    Shape(16, 4096, 14336, 64),
]
CPU_CASES = [
    (Shape(512, 768, 768, 8), 1),
    (Shape(512, 768, 3072, 8), 1),
    (Shape(2048, 768, 768, 16), 1),
    (Shape(512, 768, 768, 8), 3),  # query, key and value
]


def phases(shape: Shape) -> tuple[str, ...]:
    return (FORWARD,) if shape.M <= FEW else (FORWARD, BOTH)


def dropouts(shape: Shape) -> tuple[float, ...]:
    return (0.0,) if shape.M <= FEW else DROPOUTS


def timings(shape: Shape) -> tuple[str, ...]:
    """In a graph, too, where the work takes less time than some tens of launches."""
    return (LAUNCHED, GRAPH) if paper.seconds([paper.floor(shape)[0]]) < 5e-5 else (LAUNCHED,)


def one_pass(calls: Sequence[Layer], sets: Sequence[Inputs], phase: str, grad: bool = True) -> Run:
    """Every layer once, with its set of inputs."""

    def run() -> None:
        for layer, given in zip(calls, sets, strict=True):
            with torch.set_grad_enabled(grad):
                ys = layer.call(given.x)
            if phase == BOTH:
                torch.autograd.grad(ys, [given.x, *layer.factors], [given.dy] * len(ys))

    return run


# --- on a GPU -----------------------------------------------------------------------------------


def sets_of(shape: Shape, dtype: torch.dtype, device: str) -> list[Inputs]:
    """At least two, and more than the cache holds twice."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    first = inputs(shape, dtype, device, 0)
    count = max(2, -(-2 * cache // sum(t.nbytes for t in first)))
    return [first, *(inputs(shape, dtype, device, i) for i in range(1, count))]


def measure(
    shape: Shape, sides: Sequence[str], rounds: int, device: str, dtype: torch.dtype
) -> tuple[list[Row], list[Row]]:
    """The rows of one shape: times, errors.  `device` "cpu" is for tests: nothing is captured."""
    times: list[Row] = []
    wrong: list[Row] = []
    sets = sets_of(shape, dtype, device)
    sizes = shape._asdict()
    for p in dropouts(shape):
        torch._dynamo.reset()
        can = [side for side in sides if paper.side_kernels(side, shape, p > 0) is not None]
        built = {side: calls for side in can if (calls := _tried(side, layers, side, sets, p))}
        if p == 0 and shape.M > FEW:
            for side in [side for side in built if side != paper.BASE]:
                for name, error in (_tried(side, errors, built[side][0], sets[0]) or {}).items():
                    wrong.append({**sizes, "side": side, "tensor": name, "error": error})
        for timing in timings(shape):
            row: Row = {"capability": _capability(device), "dtype": str(dtype).split(".")[1]}
            row |= {**sizes, "dropout": p, "timing": timing}
            runs = _runs(built, sets, shape, timing, device)
            times += [{**row, **more} for more in _in_turn(runs, shape, len(sets), rounds, device)]
    return times, wrong


def _runs(
    built: dict[str, list[Layer]], sets: list[Inputs], shape: Shape, timing: str, device: str
) -> dict[tuple[str, str], tuple[Run, int]]:
    """(side, phase) -> a pass over all sets, and how often to repeat it; all warm."""
    runs = {}
    for side, calls in built.items():
        for phase in phases(shape):
            run = one_pass(calls, sets, phase, grad=shape.M > FEW)
            if timing == GRAPH and device == "cuda":
                captured = _tried(side, on.graphed, run)
                if captured is None:
                    break
                run = captured
            count = _tried(side, on.repeats, run, device)
            if count is None:
                break
            runs[side, phase] = run, count
    return runs


def _in_turn(
    runs: dict[tuple[str, str], tuple[Run, int]],
    shape: Shape,
    sets: int,
    rounds: int,
    device: str,
) -> list[Row]:
    rows: list[Row] = []
    for i in range(1, rounds + 1):
        for (side, phase), (run, count) in runs.items():
            seconds = on.seconds(run, device, count) / sets
            rows.append({"side": side, "phase": phase, "round": i, "seconds": seconds})
        flops, bandwidth = on.peaks(device, torch.bfloat16)
        least = [paper.seconds([k], flops, bandwidth, 0) for k in paper.floor(shape)]
        for phase in phases(shape):
            seconds = least[0] if phase == FORWARD else sum(least)
            rows.append({"side": paper.FLOOR, "phase": phase, "round": i, "seconds": seconds})
    return rows


def _tried(side: str, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
    """The result; None, and the reason on stderr, where the side fails."""
    try:
        return call(*args, **kwargs)
    except Exception:
        traceback.print_exc()
        print(f"{side} failed, it is left out", file=sys.stderr)
        return None


def _capability(device: str) -> str:
    return ".".join(map(str, torch.cuda.get_device_capability())) if device == "cuda" else ""


def measure_gpu(folder: Path, threads: int, rounds: int, sides: Sequence[str]) -> None:
    """Both files, after each shape."""
    wrong: list[Row] = []
    missing: list[str] = []

    def measured(shape: Shape) -> list[Row]:
        times, more = fresh(threads, measure, shape, sides, rounds, "cuda", torch.bfloat16)
        complete = {row["side"] for row in times}
        missing.extend(f"{side} at {tuple(shape)}" for side in sides if side not in complete)
        wrong.extend(more)
        if wrong:
            write(folder / "lora_linear_errors.csv", threads, wrong)
        return times

    measures = {str(tuple(shape)): partial(measured, shape) for shape in GPU_SHAPES}
    write_each(folder / "lora_linear_gpu.csv", threads, measures)
    if missing:
        sys.exit(f"failed: {', '.join(missing)}")


# --- on a CPU -----------------------------------------------------------------------------------


def measure_cpu(shape: Shape, siblings: int, p: float, rounds: int) -> list[Row]:
    """The rows of one case."""
    given = [inputs(shape, torch.float32, "cpu", i) for i in range(siblings)]
    built = {OURS: ours(given, p), PEFT: peft_layer(given, p)}
    if p == 0:
        _check(built, given[0])
    kept = {side: _kept(layer, given) for side, layer in built.items()}
    runs = {
        (side, phase): one_pass([layer], given[:1], phase)
        for phase in (FORWARD, BOTH)
        for side, layer in built.items()
    }
    for run in runs.values():
        on.repeats(run, "cpu")
    row: Row = {**shape._asdict(), "siblings": siblings, "dropout": p}
    return [
        {**row, "side": side, "phase": phase, "round": i, "seconds": on.seconds(run, "cpu")}
        | {"kept_bytes": kept[side]}
        for i in range(1, rounds + 1)
        for (side, phase), run in runs.items()
    ]


def _check(built: dict[str, Layer], given: Inputs) -> None:
    """Both sides compute the same.

    Raises:
        ValueError: they do not.
    """
    results = []
    for layer in built.values():
        ys = layer.call(given.x)
        dys = [given.dy] * len(ys)
        results.append([*ys, *torch.autograd.grad(ys, [given.x, *layer.factors], dys)])
    for got, other in zip(*results, strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-4 * other.abs().max().item())


def _kept(layer: Layer, given: Sequence[Inputs]) -> int:
    parameters = nn.ParameterList([*layer.factors, *(inputs.weight for inputs in given)])
    with saved_bytes(parameters) as count:
        ys = layer.call(given[0].x)
        kept = count()
    del ys
    return kept


def main() -> None:
    parser = options(__doc__ or "", rounds=15)
    parser.add_argument("--side", nargs="+", choices=paper.SIDES, default=list(paper.SIDES))
    given = parser.parse_args()
    if torch.cuda.is_available():
        measure_gpu(given.out, given.threads, given.rounds, given.side)
        return
    measures = {
        f"{tuple(shape)} x {siblings}, dropout {p}": partial(
            fresh, given.threads, measure_cpu, shape, siblings, p, given.rounds
        )
        for shape, siblings in CPU_CASES
        for p in DROPOUTS
    }
    write_each(given.out / "lora_linear_cpu.csv", given.threads, measures)


if __name__ == "__main__":
    main()
