"""What a run leaves on disk: one row of metrics a step, and snapshots.

A snapshot says what its run is: the settings, a fingerprint of all frozen tensors, and the SHA-256
of the rows of metrics up to its step.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minigpt.settings.options import free
from minigpt.training import snapshot
from minigpt.training.parallel import Alone
from minigpt_kernels import ClippedAdamW
from peft_lite import storage


class Record:
    """The files of one run in `directory`, which process 0 writes; all processes restore and save
    the state together.
    """

    def __init__(
        self, directory: Path, parallel: Alone, optimizer: ClippedAdamW, config: Any
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics = directory / "metrics.jsonl"
        self.snapshots = directory / "snapshots"
        self.parallel, self.optimizer = parallel, optimizer
        self.first = parallel.processes.first
        deciding = {n: v for n, v in asdict(config).items() if n not in free(type(config))}
        settings = json.loads(json.dumps(deciding, default=str))
        self.run = {"settings": settings, "frozen": parallel.frozen}
        self.rows = hashlib.sha256()  # of the rows so far

    def start(self) -> None:
        """Raises ValueError where the files of another run stand."""
        if self.first and (self.metrics.exists() or self.snapshots.exists()):
            raise ValueError(
                f"{self.metrics.parent} holds another run: resume it, or choose another"
            )

    def restore(self) -> list[dict[str, float]]:
        """Restores the newest snapshot and drops the metrics of the steps after it.

        Raises:
            ValueError: the snapshot is of another run, or the metrics are not those it knows of.
        """
        state = snapshot.restore(self.snapshots, self.parallel, self.optimizer, self.run)
        rows = [] if state is None or not self.first else check_rows(self.metrics, state)
        text = self.parallel.processes.told(b"".join(rows).decode())
        if self.first:
            storage.write_text(self.metrics, text)
        self.rows.update(text.encode())
        return [json.loads(row) for row in text.splitlines()]

    def write(self, row: Mapping[str, float]) -> None:
        """Appends a row of metrics."""
        if not self.first:
            return
        line = json.dumps(row).encode() + b"\n"
        with self.metrics.open("ab") as file:
            file.write(line)
        self.rows.update(line)

    def snapshot(self, step: int) -> None:
        """Saves the state after `step` updates."""
        if self.first:
            with self.metrics.open() as file:
                os.fsync(file.fileno())  # a snapshot never knows of steps that the metrics do not
        run = {**self.run, "metrics": self.rows.hexdigest()}
        snapshot.save(self.snapshots, step, self.parallel, self.optimizer, run)

    def last_good(self) -> str:
        """The end of an error message: where the newest snapshot is."""
        files = snapshot.files(self.snapshots)
        return f"; the last good state is {files[-1]}" if files else ""


def check_rows(metrics: Path, state: Mapping[str, Any]) -> list[bytes]:
    """The rows of metrics up to a snapshot's step, each with its newline.

    Raises:
        ValueError: there are fewer, or they are not those that the snapshot knows of.
    """
    lines = metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else []
    rows = lines[: state["step"]]
    if len(rows) < state["step"]:
        raise ValueError(f"{metrics} has {len(rows)} rows, the snapshot {state['step']} steps")
    if hashlib.sha256(b"".join(rows)).hexdigest() != state["metrics"]:
        raise ValueError(
            f"{metrics} is damaged or was edited: up to step {state['step']} its SHA-256 is "
            "another; bring it back, or start a new run"
        )
    return rows
