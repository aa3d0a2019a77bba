"""Stopping on SIGINT or SIGTERM: a run between two steps, not within one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and stopped between two steps with a snapshot on disk."""


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set.  A second signal acts as it did before.

    Raises:
        Interrupted: at the end, when a signal came that nobody has acted on.
    """
    stop = threading.Event()

    def request(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    with _handled(request) as before:
        yield stop
    if stop.is_set():
        raise Interrupted("interrupted")


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, also in a process of the background."""
    with _handled(signal.default_int_handler):
        yield


@contextmanager
def _handled(handler: Any) -> Iterator[dict[signal.Signals, Any]]:
    """Handles SIGINT and SIGTERM; yields what handled them before.  Threads have no signals."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number in before:
            signal.signal(number, handler)
        yield before
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
