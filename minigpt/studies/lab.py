"""Runs the parts of a study, each once and in a process of its own, so that a part shares neither
peak memory nor random numbers with another.

OUT/run.json                    the study and its settings
OUT/runs/PART/metrics.jsonl     one row a step, where the part trains
OUT/runs/PART/result.json       the result of the part, written last

A part that has a result does not run again, and its snapshots are deleted; a part that was
interrupted continues from them.
"""

import json
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
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minigpt.training.interrupt import Interrupted
from peft_lite import storage

Result = dict[str, Any]
PRELOAD = [
    "torch",
    "torch._dynamo",
    "minigpt.checkpoints.directory",
    "minigpt.training.train",
    "peft_lite",
]


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
        self.context = multiprocessing.get_context("forkserver")
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
        for i, part in enumerate(parts):
            path = self.folder / part.name / "result.json"
            if not path.exists():
                each = (time.monotonic() - begin) / ran if ran else None
                left = f", about {each * (len(parts) - i) / 60:.0f} min left" if each else ""
                _say(f"part {i + 1} of {len(parts)}: {part.name}{left}")
                self._run(part, path)
                ran += 1
            results[part.name] = json.loads(path.read_text())
        return results

    def _run(self, part: Part, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = self.context.Pipe(duplex=False)
        child = self.context.Process(target=_child, args=(part, path, theirs))
        with _passed_on(child):
            child.start()
            theirs.close()
            try:
                while (received := ours.recv())[0] == "warning":
                    self._warn(received[1])
                kind, message = received
            except EOFError:
                child.join()
                kind, message = "died", f"{part.name} ended with status {child.exitcode}"
            child.join()
        if kind == "interrupted":
            raise Interrupted(f"{part.name}: {message}")
        if kind != "done":
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
    os.setpgrp()  # Ctrl-C reaches the parent, which passes it on once
    logging.getLogger().addHandler(_Warnings(pipe))
    try:
        storage.write_json(path, part.function(path.parent, *part.arguments))
        for snapshots in [*path.parent.rglob("snapshots")]:
            shutil.rmtree(snapshots)
        pipe.send(("done", ""))
    except KeyboardInterrupt as stop:
        pipe.send(("interrupted", str(stop) or "interrupted"))
    except (ValueError, OSError) as error:
        pipe.send(("failed", str(error)))


class _passed_on:
    """Passes SIGINT and SIGTERM on to a child."""

    def __init__(self, child: Any) -> None:
        self.child = child
        self.before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._pass)

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _pass(self, number: int, frame: object) -> None:
        if self.child.pid is not None:
            os.kill(self.child.pid, number)


def _say(text: str) -> None:
    print(f"minigpt: {text}", file=sys.stderr, flush=True)
