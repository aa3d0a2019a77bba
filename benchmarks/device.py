"""Seconds of work on a device, and what the device can do at most.

On a GPU two events stand around the work and nothing waits in between, so this is the device's own
time, or that of launching where launching takes longer.  A captured graph needs no launching.
On a CPU it is the time on the clock.
"""

import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
LEAST = 5e-3  # seconds between two events, at least
SQUARE = {"cuda": 8192, "cpu": 256}  # of the matrix product that shows the throughput
COPIED = {"cuda": 2**30, "cpu": 2**22}  # bytes


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run, device: str, repeats: int = 1) -> float:
    """Of one call out of `repeats`."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def repeats(run: Run, device: str) -> int:
    """How many calls take long enough to be timed, after three for warm-up."""
    seconds(run, device, 3)
    if device == "cpu":
        return 1
    return max(1, round(LEAST / seconds(run, device, 3)))


def graphed(run: Run) -> Run:
    """The launches of `run` as a CUDA graph; the result replays them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def peaks(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs a second of a large matrix product of random numbers, and bytes a second that a large
    copy moves, those read and those written.
    """
    n = SQUARE[device]
    left, right = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(left)
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(run: Run) -> float:
        return seconds(run, device, repeats(run, device))

    product = best(lambda: torch.mm(left, right, out=out))
    copy = best(lambda: target.copy_(source))
    return 2 * n**3 / product, 2 * COPIED[device] / copy
