"""TensorBoard: a curve for each number of a row.  https://www.tensorflow.org/tensorboard

tensorboard --logdir OUT/tracking
"""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Event files in FOLDER/tensorboard; those of an earlier attempt are removed."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        directory = folder / "tensorboard"
        shutil.rmtree(directory, ignore_errors=True)
        self.writer = EventFileWriter(str(directory), flush_secs=10)

    def log(self, row: Mapping[str, float]) -> None:
        """Writes a scalar for each number but the step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=n, simple_value=x) for n, x in row.items() if n != "step"]
        event = Event(step=int(row["step"]), wall_time=time.time(), summary=Summary(value=values))
        self.writer.add_event(event)

    def close(self) -> None:
        self.writer.close()
