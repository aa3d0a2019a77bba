"""Where a study's parts run: each once, each in a process of its own, so that its peak memory and
its random numbers are its own.

OUT/run.json                    the study and its settings
OUT/runs/PART/metrics.jsonl     one row a step, where the part trains
OUT/runs/PART/result.json       what the part found, written last

A part that has its result is not run again, and its snapshots are gone; one that was interrupted
goes on from them.
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

from minigpt.settings import runs
from minigpt.training.train import Interrupted

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
    """A piece of a study: `function(folder, *arguments)` -> what JSON can hold.

    The function stands at the top of a module, and what it writes goes to `folder`.
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
            ValueError: what a part raised.
            Interrupted: SIGINT or SIGTERM came; parts that were done stay done.
        """
        found: dict[str, Result] = {}
        begin, ran = time.monotonic(), 0
        for i, part in enumerate(parts):
            path = self.folder / part.name / "result.json"
            if not path.exists():
                each = (time.monotonic() - begin) / ran if ran else None
                left = f", about {each * (len(parts) - i) / 60:.0f} min left" if each else ""
                _say(f"part {i + 1} of {len(parts)}: {part.name}{left}")
                self._run(part, path)
                ran += 1
            found[part.name] = json.loads(path.read_text())
        return found

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
        """Says once what many parts warn of, such as a classifier that is new."""
        if text not in self.warned:
            self.warned.add(text)
            _say(text)


class _Warnings(logging.Handler):
    """Sends what a part warns of to the parent."""

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
        runs.write(path, part.function(path.parent, *part.arguments))
        for snapshots in [*path.parent.rglob("snapshots")]:
            shutil.rmtree(snapshots)
        pipe.send(("done", ""))
    except KeyboardInterrupt as stop:
        pipe.send(("interrupted", str(stop) or "interrupted"))
    except (ValueError, OSError) as error:
        pipe.send(("failed", str(error)))


class _passed_on:
    """Signals that ask to stop go on to a child."""

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
