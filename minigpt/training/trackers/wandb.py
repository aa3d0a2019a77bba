"""Weights & Biases.  https://docs.wandb.ai

    wandb sync OUT/tracking/wandb/offline-run-*

A run is written to files and nothing is sent, unless the environment says so: WANDB_MODE=online.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Wandb:
    """A run in FOLDER/wandb with the settings as its config.

    An offline run cannot be continued: it takes the place of an earlier attempt's, under its id.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        earlier = sorted((folder / "wandb").glob("*run-*-*"))
        if mode == "offline":
            shutil.rmtree(folder / "wandb", ignore_errors=True)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minigpt"),
            name=folder.parent.resolve().name,
            id=earlier[-1].name.rpartition("-")[2] if earlier else None,
            resume="allow" if earlier and mode == "online" else None,
            dir=str(folder),
            config=dict(settings),
            mode=mode,
            settings=wandb.Settings(
                console="off", silent=True, x_disable_stats=True, x_disable_meta=True
            ),
        )

    def log(self, row: Mapping[str, float]) -> None:
        """Logs each number but the step."""
        values = {name: x for name, x in row.items() if name != "step"}
        self.run.log(values, step=int(row["step"]))

    def close(self) -> None:
        self.run.finish()
