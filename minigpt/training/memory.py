"""The memory of this process, now and at its peak, in bytes."""

import re
from pathlib import Path

import torch


def resident() -> int:
    """Bytes of main memory in use, or of the GPU's memory in use by tensors."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else _status("VmRSS")


def peak() -> int:
    """The largest value that `resident` has had."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _status("VmHWM")


def _status(field: str) -> int:
    # not getrusage: its maximum survives exec, so a small child of a large parent looks large
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 if match else 0
