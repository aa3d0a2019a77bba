"""The processes that share a run, and what they tell each other.

    torchrun --nproc-per-node 4 -m minigpt finetune --parallel ddp ...

torchrun starts W processes of the same command and tells each its rank w, 0 to W - 1; what connects
them is torch.distributed (https://docs.pytorch.org/docs/stable/distributed.html).  Data goes by
number, so that its sequence does not depend on W:

    process w takes the micro-batches i with i mod W = w

All processes take equally many turns in a step, because each turn has collectives, which wait for
all of them: who has no micro-batch left takes an idle turn.  Process 0 alone writes and prints.

Where a process fails, the collectives of the others fail, too.  The first of all to fail says why,
and the others end without a word.
"""

import json
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from minigpt.training.interrupt import Interrupted

PATIENCE = 2.0  # seconds within which a process whose connection is closed has ended


@dataclass(frozen=True)
class Processes:
    """Which process this is among all; alone by default.

    Attributes:
        rank: its number w.
        size: how many there are, W.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, first: int, count: int) -> list[int | None]:
        """Of the micro-batches first, first + 1, ..., first + count - 1, the places j of those that
        this process takes, (first + j) mod W = w.  None is an idle turn.
        """
        places = range((self.rank - first) % self.size, count, self.size)
        return [*places, *[None] * (-(-count // self.size) - len(places))]

    def sum(self, *numbers: float) -> list[float]:
        """Their sums over all processes, in float64; who calls it has waited for all."""
        if self.size == 1:
            return [*numbers]
        total = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def told(self, text: str, source: int = 0) -> str:
        """The text that process `source` gives, at all processes."""
        if self.size == 1:
            return text
        data = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor(len(text.encode()))
        torch.distributed.broadcast(length, source)
        if self.rank != source:
            data = torch.zeros(max(1, int(length)), dtype=torch.uint8)
        torch.distributed.broadcast(data, source)
        return data[: int(length)].numpy().tobytes().decode()

    def texts(self, text: str) -> list[str]:
        """The texts of all processes, by rank."""
        return [self.told(text, source) for source in range(self.size)]

    def check_same(self, what: str, text: str) -> None:
        """Raises ValueError at every process where one of them has another text than process 0."""
        theirs = self.texts(text)
        if other := [str(w) for w, their in enumerate(theirs) if their != theirs[0]]:
            raise ValueError(f"{what} of process {', '.join(other)} differs from that of process 0")


def group() -> Processes:
    """The processes that torch.distributed has connected; without it this one alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return Processes()
    return Processes(torch.distributed.get_rank(), torch.distributed.get_world_size())


def started() -> int | None:
    """How many processes torchrun has started; None: it has started none."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def local_rank() -> int:
    """The number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


@contextmanager
def joined() -> Iterator[Processes]:
    """Connects the processes that torchrun has started.

    Raises:
        ValueError: another process has ended; the message names it.
        SystemExit: another process has said already why the run ends.
    """
    if (started() or 1) == 1:
        yield Processes()
        return
    from torch.distributed import PrefixStore, rendezvous

    shared, rank, size = next(rendezvous("env://"))
    store = PrefixStore("minigpt", shared)
    gpu = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", store=store, rank=rank, world_size=size
    )
    processes = Processes(rank, size)
    places = processes.texts(json.dumps([socket.gethostname(), os.getpid()]))
    try:
        with _silent(not processes.first):
            yield processes
            processes.sum(0)  # nobody leaves before all are done
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, which has seen an end, too
        broken = isinstance(error, RuntimeError | KeyboardInterrupt)
        lost = ended(rank, places) if broken and not isinstance(error, Interrupted) else ""
        if not _first_to_say(store):
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
        if lost:
            raise ValueError(f"{lost}: the others stop; --resume continues the run") from None
        raise
    torch.distributed.destroy_process_group()


def ended(rank: int, places: list[str], patience: float = PATIENCE) -> str:
    """Words for the processes that are there no more; "" where all are.

    Those of other machines cannot be looked at: where all of this one are there, they are named.

    Args:
        places: host and process id of each, by rank.
    """
    known: list[tuple[int, str, int]] = [(w, *json.loads(p)) for w, p in enumerate(places)]
    host = known[rank][1]
    deadline = time.monotonic() + patience
    while True:
        gone = [place for place in known if place[1] == host and not _runs(place[2])]
        if gone or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    named = gone or [place for place in known if place[1] != host]
    words = ", ".join(f"process {w} of {len(known)} (pid {pid} on {at})" for w, at, pid in named)
    return f"{words} has ended" if gone else words and f"lost the connection to {words}"


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _first_to_say(store: Any) -> bool:
    """Whether no process has said yet why the run ends."""
    try:
        return bool(store.add("said", 1) == 1)
    except RuntimeError:  # the store has ended with its process
        return True


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """What process 0 prints, the others would print again."""
    if not silent:
        yield
        return
    with ExitStack() as stack:
        nothing = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(nothing))
        stack.enter_context(redirect_stderr(nothing))
        stack.callback(logging.disable, logging.NOTSET)
        logging.disable()
        yield


def described(how: str) -> str:
    """What of the processes decides the last bits of a run, which they share in this way."""
    size = group().size
    return "1" if size == 1 else f"{size} by {how}"
