"""How much memory the C library takes from the system for tensors that come and go.

A heap has holes: what was freed is not always where the next tensor fits.  glibc's, of which
tensors of up to 32 MB come, finds freed blocks of aligned tensors badly
(https://sourceware.org/bugzilla/show_bug.cgi?id=14581), so that a process can hold a third more
than its tensors.  No formula says how much: here the allocator itself is asked.  A small process
makes the allocations of some steps, in their order, and frees them, without ever writing to them:
such memory costs nothing, and mallinfo2 (https://man7.org/linux/man-pages/man3/mallinfo.3.html)
says how much of it there is.

With other C libraries, and on a GPU, whose allocator reports the tensors, it is the bytes of the
tensors.
"""

import json
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import cache

Event = tuple[int, int]  # number of a storage, and its bytes where it is made, 0 where it is freed
ALIGNMENT = 64  # of PyTorch's tensors on a CPU

# It holds as little as it can: the heap of a process that has imported torch has holes of its own.
PROGRAM = """
import ctypes, json, sys
libc = ctypes.CDLL(None)
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
        "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
libc.mallinfo2.restype = Info
libc.posix_memalign.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t
libc.free.argtypes = ctypes.c_void_p,
events, alignment, threshold = json.load(sys.stdin)
if threshold:
    libc.mallopt(-3, threshold)
held = lambda: (lambda info: info.arena + info.hblkhd)(libc.mallinfo2())
before = most = held()
live, address = {}, ctypes.c_void_p()
for number, size in events:
    if size:
        if libc.posix_memalign(ctypes.byref(address), alignment, size):
            sys.exit("no such room")
        live[number] = address.value
        most = max(most, held())
    elif number in live:
        libc.free(live.pop(number))
print(most - before)
"""


def held(events: Iterable[Event], mapped: int | None = None) -> int:
    """The most bytes that the allocator holds while these tensors are made and freed.

    Args:
        mapped: tensors from this size on get pages of their own, as `memory.map_large_blocks` sets.
    """
    events = [event for event in events if event[0] >= 0]
    if not _asks():
        return most_live(events)
    given = json.dumps([events, ALIGNMENT, mapped])
    command = [sys.executable, "-S", "-c", PROGRAM]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    return int(done.stdout) if done.returncode == 0 else most_live(events)


def steps(trace: Sequence[Event], state: Sequence[int], count: int = 3) -> list[Event]:
    """The allocations of some steps: what a trace has; then the optimizer's state, once; then the
    gradients, which the trace leaves alive, are freed.
    """
    size = 1 + max((number for number, _ in trace), default=0)
    events: list[Event] = []
    for i in range(count):
        events += [(number + i * size, n) for number, n in trace]
        if i == 0:
            events += [(count * size + j, n) for j, n in enumerate(state) if n]
        alive = dict.fromkeys(number for number, n in trace if n)
        for number, n in trace:
            if not n:
                alive.pop(number, None)
        events += [(number + i * size, 0) for number in alive]
    return events


def most_live(events: Iterable[Event]) -> int:
    """The most bytes that live at once."""
    live: dict[int, int] = {}
    now = most = 0
    for number, size in events:
        now += size - (0 if size else live.pop(number, 0))
        if size:
            live[number] = size
        most = max(most, now)
    return most


@cache
def _asks() -> bool:
    """Whether the C library here is a glibc that has mallinfo2."""
    library, version = platform.libc_ver()
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return sys.platform == "linux" and library == "glibc" and numbers >= (2, 33)
