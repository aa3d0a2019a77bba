"""The memory of this process, now and at its peak, in bytes."""

import re
import sys
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")  # of Linux


def resident() -> int:
    """Bytes of main memory in use, or of the GPU's memory in use by tensors."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    return psutil.Process().memory_info().rss


def peak() -> int:
    """The largest value that `resident` has had."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else _peak()


def _peak() -> int:
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    # Linux's ru_maxrss survives exec: a small child of a large parent looks large
    if STATUS.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())):
        return int(peak[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
