"""What several processes need and send, of full fine-tuning of GPT-Neo-125M on 1, 2 and 4 processes
of this machine, connected by gloo; and what torchrun costs one process.

Each process builds the model of random weights, spreads it, and makes three steps of one
micro-batch a process, 1 x 128 tokens.  Memory is the system's own account (VmHWM) from the
moment that the model is spread; beside it stands what the tensors that stay take: weights,
gradients, m and v, 16 bytes for each parameter that the process has.  What is sent is counted at
the collectives' operators, and computed by docs/scale.md.

One process: `minigpt finetune` of the bundled model by itself and started by torchrun, in turn.

    python -m benchmarks.parallel            -> results/parallel.csv, results/parallel_alone.csv
    columns: way, processes, rank, kept_bytes, computed_bytes, peak_bytes, moved_bytes, theory_bytes
             side, round, seconds (of the median step)
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import options, write_each
from benchmarks.sides import batch, config
from minigpt import GPTNeo, GPTNeoConfig
from minigpt.objectives.causal import language_model_loss
from minigpt.training import memory, parallel
from minigpt.training.train import train

STEPS = 3
RUN = ("finetune", "--model", "bundled", "--text", "bundled-carroll", "--method", "lora")
WAYS = (("none", 1), *((way, size) for way in ("ddp", "fsdp") for size in (2, 4)))


class Moved(TorchDispatchMode):
    """Counts what this process sends by the ring algorithms: of a buffer of n bytes (W - 1) / W for
    an all-gather or a reduce-scatter, and twice that for an all-reduce.
    """

    def __init__(self, size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share, self.bytes = (size - 1) / size, 0.0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func.namespace == "c10d":
            buffers = [_bytes(a) for a in args]
            times = 2 if "allreduce" in func.name() else 1
            self.bytes += times * self.share * max(buffers, default=0)
        return func(*args, **(kwargs or {}))


def _bytes(value: Any) -> int:
    """Of a tensor, or of all tensors in lists of them."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0


def theory(way: str, size: int, whole: int, shared: int) -> float:
    """Bytes that a process sends in a step of one turn, of a model of so many bytes that all train;
    `shared` of them stand in no block and are gathered once.
    """
    ring = (size - 1) / size
    if way == "ddp":
        return 2 * whole * ring
    return (2 * (whole - shared) + shared + whole) * ring


def measure(way: str, size: int, rank: int, port: int, out: Path, shape: Mapping[str, Any]) -> None:
    """One process; it writes its row."""
    torch.set_num_threads(1)
    if size > 1:
        distributed.init_process_group(
            "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=size
        )
    torch.manual_seed(0)
    before = memory.resident()
    model = GPTNeo(GPTNeoConfig(**shape))
    model.requires_grad_(True)
    whole = sum(p.nbytes for p in model.parameters())
    shared = whole - sum(p.nbytes for p in model.blocks.parameters())
    spread = parallel.spread(model, way, torch.device("cpu"), bf16=False)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    moved = Moved(size)
    rows = {k: v[:1] % model.config.vocab_size for k, v in batch(0).items()}
    with moved:
        train(
            *(model, language_model_loss, lambda i: rows),
            replace(config(STEPS), accumulate=size),
            parallel=spread,
        )
    here = sum(p.nbytes for p in spread.parameters.values())
    row = {
        "way": way,
        "processes": size,
        "rank": rank,
        "kept_bytes": 4 * here,
        "computed_bytes": 4 * (whole if way != "fsdp" else -(-whole // size)),
        "peak_bytes": memory.peak() - before,
        "moved_bytes": round(moved.bytes / STEPS),
        "theory_bytes": round(theory(way, size, whole, shared)) if size > 1 else 0,
    }
    (out / f"{rank}.txt").write_text(json.dumps(row))
    if size > 1:
        distributed.barrier()
        distributed.destroy_process_group()


def measured(way: str, size: int, **shape: Any) -> list[dict[str, object]]:
    """The rows of all processes."""
    with TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        os.environ["OMP_NUM_THREADS"] = "1"
        started = [
            get_context("spawn").Process(
                target=measure, args=(way, size, rank, port, Path(folder), shape)
            )
            for rank in range(size)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise RuntimeError(f"{way} on {size}: {[p.exitcode for p in started]}")
        return [json.loads((Path(folder) / f"{r}.txt").read_text()) for r in range(size)]


def alone(threads: int, number: int, steps: int = 40) -> list[dict[str, object]]:
    """The median step of a run in one process, without torchrun and with it."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "1"]
    rows: list[dict[str, object]] = []
    for side, start, way in (("python", [], "none"), ("torchrun", torchrun, "ddp")):
        with TemporaryDirectory() as folder:
            run = [*RUN, "--steps", str(steps), "--parallel", way, "--out", folder + "/run"]
            command = [sys.executable, *start, "-m", "minigpt", *run]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            subprocess.run(command, check=True, capture_output=True, env=environment)
            summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
        rows.append({"side": side, "round": number, "seconds": summary["step_seconds"]})
    return rows


def main() -> None:
    given = options(__doc__ or "", rounds=7).parse_args()
    measures = {f"{way} {size}": partial(measured, way, size) for way, size in WAYS}
    write_each(given.out / "parallel.csv", 1, measures)
    turns = {f"alone {i}": partial(alone, given.threads, i) for i in range(1, given.rounds + 1)}
    write_each(given.out / "parallel_alone.csv", given.threads, turns)


if __name__ == "__main__":
    main()
