"""How much memory this process holds and has held at most, in bytes."""

import re
from pathlib import Path

import torch


def resident() -> int:
    """Bytes of main memory held now, or of the GPU's by tensors."""
    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else _status("VmRSS")


def peak() -> int:
    """The most that `resident` has been."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _status("VmHWM")


def _status(field: str) -> int:
    # not getrusage: its maximum survives exec, so a small child of a large parent looks large
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
