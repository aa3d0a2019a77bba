"""The memory of this process, now and at its peak, in bytes."""

import ctypes
import re
import sys
from pathlib import Path

import psutil
import torch

STATUS = Path("/proc/self/status")  # of Linux
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LARGE = 2**20


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


def map_large_blocks() -> None:
    """From now on tensors of 1 MB and more get pages of their own, which are given back at once
    when a tensor is freed.  It takes less memory and more time.

    glibc takes memory for tensors of up to 32 MB from its heap, and does not find all that was
    freed there again, because they are aligned (https://sourceware.org/bugzilla/show_bug.cgi?id=14581).
    With other C libraries this does nothing.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, LARGE)
