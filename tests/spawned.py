"""Processes that torch.distributed connects, as torchrun would start them, but forked from a server
that has imported PyTorch.
"""

import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import distributed

PRELOADED = ["torch", "torch.distributed.fsdp", "minigpt.commands.finetune", "tests.tiny"]


def spawn(
    size: int, folder: Path, function: Callable[..., None], *inputs: Any, seconds: float = 120
) -> list[int | None]:
    """Calls function(*inputs) in each of `size` processes; their exit codes."""
    served = get_context("forkserver")
    served.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    started = [
        served.Process(target=connected, args=(rank, size, store, function, *inputs))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(seconds)
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


def connected(
    rank: int, size: int, store: Path, function: Callable[..., None], *inputs: Any
) -> None:
    """In one of the processes."""
    torch.set_num_threads(1)
    if size == 1:
        function(*inputs)
        return
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size
    )
    try:
        function(*inputs)
        distributed.barrier()
        distributed.destroy_process_group()
    except BaseException:
        (store.parent / f"error-{rank}.txt").write_text(traceback.format_exc())
        sys.stderr.flush()
        os._exit(1)  # the others' connections close at once
