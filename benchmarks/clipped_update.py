"""Seconds of clip and update: ours against what one can write with torch.

Sides, interleaved in one process, all over the same parameters and gradients, each with its own
state: `clip_grad_norm_` and AdamW, foreach and fused; both of them under torch.compile; the norm,
then fused AdamW with the clip as its `grad_scale`; ours.  Before each measurement the gradients are
written anew.

Sets: GPT-Neo-125M's tensors, and those of LoRAs: 48 or 448 of 8K or 64K numbers each.

On the CPU: wall time, without torch.compile, which takes minutes there for the fused update of 48
tensors and refuses the other (torch 2.13).  On a GPU the compiled sides come last, after all sets,
so that their compilation delays no other row.  Wall time, and the device's own, for which
each side is captured in a CUDA graph and replayed; beside it the `floor`: 32 bytes a parameter (g
read twice; theta, m and v each way) at the bandwidth of a large copy in the same round.

    python -m benchmarks.clipped_update       -> results/clipped_update_cpu.csv, or .._gpu.csv
    columns: set, side, time (wall or device), round, seconds, parameters
"""

import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.common import fresh, options, write_each
from minigpt_kernels import ClippedAdamW

FOREACH, FUSED, SCALED, OURS = "clip + foreach", "clip + fused", "norm + scaled fused", "ours"
COMPILED = {f"{name}, compiled": name for name in (FOREACH, FUSED)}
SIDES = (FOREACH, FUSED, SCALED, OURS)
FLOOR = "floor"
WALL, DEVICE = "wall", "device"
BYTES = 32  # a parameter
COPIED = 2**30  # bytes
STEPS = {"cpu": 1, "cuda": 20}  # in one measurement

Shape = tuple[int, ...]
Step = Callable[[], object]


def gpt_neo_125m(D: int = 768, V: int = 50257, T: int = 2048, blocks: int = 12) -> list[Shape]:
    attention: list[Shape] = [*[(D, D)] * 4, (D,)]
    mlp: list[Shape] = [(4 * D, D), (4 * D,), (D, 4 * D), (D,)]
    norm: list[Shape] = [(D,), (D,)]
    return [(V, D), (T, D), *(norm + attention + norm + mlp) * blocks, *norm]


SETS: dict[str, list[Shape]] = {
    "48 x 8K": [(8, 1024)] * 48,
    "48 x 64K": [(64, 1024)] * 48,
    "448 x 8K": [(8, 1024)] * 448,
    "448 x 64K": [(64, 1024)] * 448,
    "GPT-Neo-125M": gpt_neo_125m(),
}


def step_of(side: str, params: list[nn.Parameter], max_norm: float = 1.0, lr: float = 1e-4) -> Step:
    """Clip and update by one side."""
    if side == OURS:
        return ClippedAdamW(params, lr, max_norm=max_norm).step
    capturable = params[0].is_cuda
    kind = COMPILED.get(side, side)
    foreach = kind == FOREACH
    optimizer = torch.optim.AdamW(
        params, lr, foreach=foreach, fused=not foreach, capturable=capturable
    )

    def clip_and_update() -> None:
        nn.utils.clip_grad_norm_(params, max_norm, foreach=True)
        optimizer.step()

    def scaled() -> None:
        norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], foreach=True)
        # what torch.amp.GradScaler sets: the gradient is divided by one, the other skips the step
        optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1)  # type: ignore[attr-defined]
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.step()

    if side in COMPILED:
        return torch.compile(clip_and_update)
    return scaled if side == SCALED else clip_and_update


def tensors(shapes: list[Shape], device: str) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Parameters with gradients, and what to fill these with."""
    random = torch.Generator(device).manual_seed(0)
    params, fresh_grads = [], []
    for shape in shapes:
        params.append(nn.Parameter(torch.randn(shape, generator=random, device=device)))
        fresh_grads.append(torch.randn(shape, generator=random, device=device))
        params[-1].grad = fresh_grads[-1].clone()
    return params, fresh_grads


def check(device: str) -> None:
    """All sides make the same steps.

    Raises:
        ValueError: one does not.
    """
    shapes: list[Shape] = [(8, 5), (3,), (9000,)]
    expected: list[nn.Parameter] = []
    for side in (FOREACH, FUSED, SCALED, OURS):
        params, grads = tensors(shapes, device)
        step = step_of(side, params)
        for _ in range(3):
            refill(params, grads)
            step()
        for p, q in zip(params, expected or params, strict=True):
            if not torch.allclose(p, q, rtol=1e-5, atol=1e-6):
                raise ValueError(f"{side} makes other steps than {FOREACH}")
        expected = expected or params


def refill(params: list[nn.Parameter], grads: list[Tensor]) -> None:
    torch._foreach_copy_([p.grad for p in params if p.grad is not None], grads)


def wall(step: Step, params: list[nn.Parameter], grads: list[Tensor]) -> float:
    """Seconds of a step on the clock."""
    device = params[0].device.type
    refill(params, grads)
    _wait(device)
    begin = time.perf_counter()
    for _ in range(STEPS[device]):
        step()
    _wait(device)
    return (time.perf_counter() - begin) / STEPS[device]


def replays(step: Step) -> Callable[[], float]:
    """Captures a step; the result says how many seconds the device takes for one."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        step()

    def seconds() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()
        begin.record()
        for _ in range(STEPS["cuda"]):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / STEPS["cuda"]

    return seconds


def copy_bandwidth() -> float:
    """Bytes a second that a large copy on the device moves, those read and those written."""
    source = torch.ones(COPIED // 4, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / replays(lambda: target.copy_(source))()


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(
    name: str, rounds: int, device: str, sides: Sequence[str] = SIDES
) -> list[dict[str, object]]:
    """The rows of one set."""
    check(device)
    shapes = SETS[name]
    params, grads = tensors(shapes, device)
    count = sum(p.numel() for p in params)
    steps = {side: step_of(side, params) for side in sides}
    for side, step in list(steps.items()):  # warm-up, which compiles
        try:
            for _ in range(3):
                wall(step, params, grads)
        except Exception:
            if side not in COMPILED:
                raise
            traceback.print_exc()
            print(f"{name}: {side} is left out, torch cannot compile it")
            del steps[side]
    graphs = {side: replays(step) for side, step in steps.items()} if device == "cuda" else {}
    rows: list[dict[str, object]] = []
    for i in range(rounds):

        def note(side: str, kind: str, seconds: float, number: int = i + 1) -> None:
            row = {"set": name, "side": side, "time": kind, "round": number}
            rows.append({**row, "seconds": seconds, "parameters": count})

        for side, step in steps.items():
            note(side, WALL, wall(step, params, grads))
        for side, replay in graphs.items():
            note(side, DEVICE, replay())
        if graphs and OURS in sides:
            note(FLOOR, DEVICE, BYTES * count / copy_bandwidth())
    return rows


def main() -> None:
    parser = options(__doc__ or "", rounds=15)
    parser.add_argument("--set", nargs="+", choices=SETS, default=list(SETS))
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measures = {
        name: partial(fresh, given.threads, measure, name, given.rounds, device)
        for name in given.set
    }
    if device == "cuda":
        measures |= {
            f"{name}, compiled": partial(
                fresh, given.threads, measure, name, given.rounds, device, list(COMPILED)
            )
            for name in given.set
        }
    name = "clipped_update_gpu.csv" if device == "cuda" else "clipped_update_cpu.csv"
    write_each(given.out / name, given.threads, measures)


if __name__ == "__main__":
    main()
