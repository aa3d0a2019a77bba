"""Trackers follow OUT/metrics.jsonl, which is the truth about a run.

A tracker begins with the first row of the file, whichever row a run is at: after --resume the whole
run is replayed, without the steps that were lost.  A tracker that fails is off from there on, with
one line on stderr; the run goes on.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.settings.runs import TRACKING
from minigpt.training.progress import say
from minigpt.training.trackers.registry import TRACKERS, Tracker
from minigpt.training.train import Row
from peft_lite.json_files import printable


@contextmanager
def tracked(
    names: Sequence[str] | None,
    out: Path,
    settings: Mapping[str, Any],
    show: Callable[[Row], None] = lambda row: None,
) -> Iterator[Callable[[Row], None]]:
    """Yields a function to call after each row of metrics: it shows the row, and the trackers
    follow.  Where no row comes they get those that are there.

    Args:
        names: of `TRACKERS`.
        out: the folder of the run.
        settings: of the run.
        show: called with each row, first.
    """
    followers = [Follower(name, out, settings) for name in dict.fromkeys(names or ())]

    def observe(row: Row) -> None:
        show(row)
        for follower in followers:
            follower.follow()

    try:
        yield observe
        for follower in followers:
            follower.follow()
    finally:
        for follower in followers:
            follower.close()


class Follower:
    """A tracker and how far it has read."""

    def __init__(self, name: str, out: Path, settings: Mapping[str, Any]) -> None:
        self.name, self.out, self.settings = name, out, settings
        self.tracker: Tracker | None = None
        self.read = 0  # bytes of the metrics
        self.failed = False

    def follow(self) -> None:
        """Shows the rows that it has not read yet."""
        if self.failed:
            return
        try:
            if self.tracker is None:
                folder = self.out / TRACKING
                folder.mkdir(exist_ok=True)
                self.tracker = TRACKERS[self.name](folder, self.settings)
            with (self.out / "metrics.jsonl").open("rb") as file:
                file.seek(self.read)
                for line in file:
                    self.tracker.log(json.loads(line))
                    self.read += len(line)
        except Exception as error:  # whatever the library raises
            self._turn_off(error)

    def close(self) -> None:
        """Lets the tracker write what is left."""
        try:
            if self.tracker is not None:
                self.tracker.close()
        except Exception as error:
            self._turn_off(error)

    def _turn_off(self, error: Exception) -> None:
        if not self.failed:
            reason = printable(str(error)) or type(error).__name__
            say(f"{self.name} is off, the run goes on: {reason}")
        self.failed = True
