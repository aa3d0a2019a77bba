"""Paged optimizer state: AdamW's m and v outside the memory that training is short of.
Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314, section 3.

QLoRA takes NVIDIA's unified memory: its driver moves pages between GPU and CPU when a kernel
touches them.  Here every move is written down.  What pages is m and v, 8 bytes a float32
parameter, and they are needed in the update alone:

    GPU  They live in pinned memory of the host.  An update fetches them parameter by parameter:

             copies      fetch 0 | fetch 1 | store 0 | fetch 2 | store 1 | fetch 3 | ...
             updates               update 0  update 1            update 2

         A step moves 8 bytes a parameter to the GPU and 8 back: 0.7 s for 10^9 parameters over a
         link of 24 GB/s, and the updates pass beside that.  The GPU has room for two turns, four
         times the largest m.
    CPU  They live in a mapped file.  The operating system writes changed pages to the disk from
         time to time, drops them when memory is short and reads them when an update touches them:
         at worst a step reads 8 bytes a parameter and writes 8.  While memory is to spare they
         stay, and the resident memory (RSS) counts them.  Nothing drops them by hand: the next
         step would read them all again.

Each tensor's operations are those of the unpaged optimizer: the result is the same to the bit.  An
update ends when all is stored, so a snapshot reads m and v as any others.  It cannot be captured in
a CUDA graph.
"""

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .update import Entry


class DeviceMemory:
    """m and v beside their parameter: nothing is paged."""

    def device(self, p: Tensor) -> torch.device:
        """Where m and v of p are."""
        return p.device

    def zeros(self, p: Tensor) -> Tensor:
        """A contiguous tensor of p's shape and dtype."""
        return torch.zeros(p.shape, dtype=p.dtype, device=p.device)

    def turns(self, entries: "Sequence[Entry]") -> "Iterator[Sequence[Entry]]":
        """The entries in groups, with m and v where p is, while each group is updated."""
        yield entries


class MappedMemory(DeviceMemory):
    """m and v in a mapped file without a name, so that nothing is left of it after a crash.

    Where files need names, as on Windows, it is deleted when the tensors are gone.  A copy or a
    pickle of an optimizer has ordinary tensors.

    Args:
        folder: of the file.
        parameters: whose m and v get their room at once.

    Raises:
        ValueError: the disk or the folder does not take them.
    """

    def __init__(self, folder: Path, parameters: Iterable[Tensor]) -> None:
        self.folder = folder
        self.used, self.size = 0, 0
        if size := sum(2 * _room(p) for p in parameters):
            self._map(size)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedMemory, (self.folder, ())

    def zeros(self, p: Tensor) -> Tensor:
        if self.used + _room(p) > self.size:  # a parameter that was added, or that begins again
            self._map(_room(p))
        flat = torch.frombuffer(self.file, dtype=p.dtype, count=max(1, p.numel()), offset=self.used)
        self.used += _room(p)
        return flat[: p.numel()].view(p.shape)

    def _map(self, size: int) -> None:
        """A file of zeros.  Its blocks are allocated: a store to a page that the disk has no block
        for would end the process (SIGBUS).
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder, suffix=".partial") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
                self.file = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ValueError(
                f"no room for {size:,} bytes of optimizer state in {self.folder}: {error.strerror}"
            ) from None
        self.used, self.size = 0, size


def _room(p: Tensor) -> int:
    """Bytes of m, whole pages."""
    return -(-max(1, p.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE


class PinnedMemory(DeviceMemory):
    """m and v in pinned memory of the host; the device has those of two parameters at a time."""

    def device(self, p: Tensor) -> torch.device:
        return torch.device("cpu")

    def zeros(self, p: Tensor) -> Tensor:
        return torch.zeros(p.shape, dtype=p.dtype, pin_memory=p.device.type == "cuda")

    def turns(self, entries: "Sequence[Entry]") -> "Iterator[Sequence[Entry]]":
        device = entries[0].theta.device
        backend: Any = torch.get_device_module(device)  # torch.cpu's streams do nothing
        copies, updates = backend.Stream(device), backend.current_stream(device)
        most = max(_room(m) for e in entries for m in e.moments)
        rooms = torch.empty(2, 2, most, dtype=torch.uint8, device=device)  # turn, m and v, bytes
        copies.wait_stream(updates)  # which may still use that memory for something else

        def fetch(i: int) -> "tuple[Entry, Any]":
            fetched = [
                _like(m, room) for m, room in zip(entries[i].moments, rooms[i % 2], strict=True)
            ]
            with backend.stream(copies):
                for m, host in zip(fetched, entries[i].moments, strict=True):
                    m.copy_(host, non_blocking=True)
                return replace(entries[i], moments=tuple(fetched)), copies.record_event()

        try:
            ahead = fetch(0)
            for i, entry in enumerate(entries):
                fetched, there = ahead
                if i + 1 < len(entries):
                    ahead = fetch(i + 1)  # behind the store that empties its room
                updates.wait_event(there)
                yield [fetched]
                copies.wait_event(updates.record_event())
                with backend.stream(copies):
                    for host, m in zip(entry.moments, fetched.moments, strict=True):
                        host.copy_(m, non_blocking=True)
        finally:
            backend.synchronize(device)  # the host may read m and v, others may have the rooms


def _like(m: Tensor, room: Tensor) -> Tensor:
    """The room's first bytes as a tensor of m's shape and dtype."""
    return room[: m.nbytes].view(m.dtype).view(m.shape)


def paged_memory(parameters: Sequence[Tensor], folder: Path | None) -> DeviceMemory:
    """Memory for the paged state of these parameters.

    Args:
        folder: of the file, on a CPU.

    Raises:
        ValueError: their device has no paged state, or there is no room for it.
    """
    device = parameters[0].device
    if device.type == "cuda":
        return PinnedMemory()
    if device.type != "cpu":
        raise ValueError(f"paged: the parameters are on {device}, must be on cpu or cuda")
    if folder is None:
        raise ValueError("paged: on a CPU the state is a file in the run's folder: give one")
    return MappedMemory(folder, parameters)
