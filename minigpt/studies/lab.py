"""Runs the parts of a study, each once and in a process of its own, so that a part shares neither
peak memory nor random numbers with another.

OUT/run.json                    the study and its settings
OUT/runs/PART/metrics.jsonl     one row a step, where the part trains
OUT/runs/PART/result.json       the result of the part, written last, with its SHA-256

A part that has a result does not run again, and its snapshots are deleted; a part that was
interrupted continues from them.  A result that is damaged is computed again.

A pipe leads from the study to its part: it says when to stop, and the part ends when it breaks,
so that no part outlives its study.  A lock makes the next study wait for that.
"""

import _thread
import logging
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minigpt.settings import sealed
from minigpt.settings.lock import owned
from minigpt.training.interrupt import SIGNALS, Interrupted, stop_requested

Result = dict[str, Any]
PRELOAD = [
    "torch",
    "torch._dynamo",
    "minigpt.checkpoints.directory",
    "minigpt.training.train",
    "peft_lite",
]
METHOD = "spawn" if os.name == "nt" else "forkserver"


@dataclass(frozen=True)
class Part:
    """A piece of a study: `function(folder, *arguments)` -> a result that JSON can hold.

    The function is defined at the top of a module and writes to `folder` alone.
    """

    name: str
    function: Callable[..., Result]
    arguments: tuple[Any, ...] = ()


class Lab:
    """Runs parts in OUT/runs."""

    def __init__(self, out: Path) -> None:
        self.folder = out / "runs"
        self.context: Any = multiprocessing.get_context(METHOD)
        self.context.set_forkserver_preload(PRELOAD)
        self.warned: set[str] = set()

    def run(self, parts: Sequence[Part]) -> dict[str, Result]:
        """Results by the names of the parts.

        Raises:
            ValueError: a part raised it, or died.
            Interrupted: SIGINT or SIGTERM came; finished parts keep their results.
        """
        results: dict[str, Result] = {}
        begin, ran = time.monotonic(), 0
        with stop_requested() as stop:
            _start_server()
            for i, part in enumerate(parts):
                path = self.folder / part.name / "result.json"
                result = self._result(path)
                if result is None:
                    each = (time.monotonic() - begin) / ran if ran else None
                    left = f", about {each * (len(parts) - i) / 60:.0f} min left" if each else ""
                    _say(f"part {i + 1} of {len(parts)}: {part.name}{left}")
                    self._run(part, path, stop)
                    ran += 1
                    result = sealed.read(path)
                results[part.name] = result
        return results

    def _result(self, path: Path) -> Result | None:
        """The result of a part that is done; one that is damaged is set aside."""
        try:
            return sealed.read(path) if path.exists() else None
        except ValueError as error:
            self._warn(f"{error}; its part runs again")
            path.replace(path.with_suffix(".damaged"))
            return None

    def _run(self, part: Part, path: Path, stop: threading.Event) -> None:
        ours, theirs = self.context.Pipe()
        child = self.context.Process(target=_child, args=(part, path, theirs))
        kind, message = "died", ""
        with ours:  # closed, whatever comes: then the child ends
            child.start()
            theirs.close()
            try:
                asked = False
                while kind in ("died", "warning"):
                    if stop.is_set() and not asked:
                        ours.send("stop")
                        asked = True
                    if ours.poll(0.1):
                        kind, message = ours.recv()
                        if kind == "warning":
                            self._warn(message)
            except (EOFError, OSError):
                kind = "died"
        child.join()
        if stop.is_set():
            raise Interrupted(f"{part.name}: {message or 'interrupted'}")
        if kind == "died":
            raise ValueError(f"{part.name} ended with status {child.exitcode}")
        if kind == "failed":
            raise ValueError(message)

    def _warn(self, text: str) -> None:
        """Prints a warning once, however many parts give it."""
        if text not in self.warned:
            self.warned.add(text)
            _say(text)


class _Warnings(logging.Handler):
    """Sends a part's warnings to the parent."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(logging.WARNING)
        self.pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        self.pipe.send(("warning", self.format(record)))


def _child(part: Part, path: Path, pipe: Connection) -> None:
    """The part's process."""
    if os.name != "nt":
        os.setpgrp()  # Ctrl-C reaches the parent, which passes it on once
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=_obey, args=(pipe,), daemon=True).start()
        logging.getLogger().addHandler(_Warnings(pipe))
        with owned(path.parent, wait=30):
            sealed.write(path, part.function(path.parent, *part.arguments))
            for snapshots in [*path.parent.rglob("snapshots")]:
                shutil.rmtree(snapshots)
        pipe.send(("done", ""))
    except KeyboardInterrupt as stop:
        pipe.send(("interrupted", str(stop) or "interrupted"))
    except (ValueError, OSError) as error:
        pipe.send(("failed", str(error)))


def _obey(pipe: Connection) -> None:
    """Interrupts the part when the parent says so; ends the process when the parent is gone."""
    try:
        while pipe.recv() == "stop":
            _thread.interrupt_main()
    except (EOFError, OSError):
        os._exit(1)


def _start_server() -> None:
    """Starts the process that the parts are forked from, deaf to the signals: they may come to the
    whole group of processes, and what has to stop is told.
    """
    if os.name == "nt":
        return
    resource_tracker.ensure_running()  # by itself, as it lets the signals through at its end
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _say(text: str) -> None:
    print(f"minigpt: {text}", file=sys.stderr, flush=True)
