"""What a run leaves on disk: one row of metrics a step, and snapshots."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minigpt.training import snapshot
from peft_lite import storage


class Record:
    """The files of one run in `directory`."""

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics = directory / "metrics.jsonl"
        self.snapshots = directory / "snapshots"
        self.parameters, self.optimizer = parameters, optimizer
        self.frozen = snapshot.fingerprint(model)

    def start(self) -> None:
        """Raises ValueError where the files of another run stand."""
        if self.metrics.exists() or self.snapshots.exists():
            raise ValueError(
                f"{self.metrics.parent} holds another run: resume it, or choose another"
            )

    def restore(self) -> list[dict[str, float]]:
        """Restores the newest snapshot and drops the metrics of the steps after it."""
        step = snapshot.restore(self.snapshots, self.parameters, self.optimizer, self.frozen)
        lines = self.metrics.read_text().splitlines()[:step] if self.metrics.exists() else []
        if len(lines) < step:
            raise ValueError(f"{self.metrics} has {len(lines)} rows, the snapshot {step} steps")
        storage.write_text(self.metrics, "".join(f"{line}\n" for line in lines))
        return [json.loads(line) for line in lines]

    def write(self, row: Mapping[str, float]) -> None:
        """Appends a row of metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def snapshot(self, step: int) -> None:
        """Saves the state after `step` updates."""
        with self.metrics.open() as file:
            os.fsync(file.fileno())  # a snapshot never knows of steps that the metrics do not
        snapshot.save(self.snapshots, step, self.parameters, self.optimizer, self.frozen)

    def last_good(self) -> str:
        """The end of an error message: where the newest snapshot is."""
        files = sorted(self.snapshots.glob("step-*.safetensors"))
        return f"; the last good state is {files[-1]}" if files else ""
