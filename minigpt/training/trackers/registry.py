"""The kinds of trackers.  A new one is a file with a class like these and a line here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from minigpt.training.trackers.tensorboard import TensorBoard
from minigpt.training.trackers.wandb import Wandb

Row = Mapping[str, float]


class Tracker(Protocol):
    """Shows rows of metrics, each with its `step`."""

    def log(self, row: Row) -> None:
        """Shows a row; steps come in order."""

    def close(self) -> None:
        """Writes what is not written yet."""


# name, which is the library's, too -> a tracker that begins anew in OUT/tracking, of these settings
TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
}
