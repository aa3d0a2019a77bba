"""A study of two parts, each of which trains a tiny model, as a command of its own:

python -m tests.minigpt.studies.tiny_study study tiny --out DIR
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt import studies
from minigpt.commands.cli import main
from minigpt.objectives.causal import language_model_loss
from minigpt.settings.options import option
from minigpt.studies.figures import Figures
from minigpt.studies.lab import Part, Result
from minigpt.studies.report import Report
from minigpt.studies.training import learn
from minigpt.training.train import TrainConfig
from tests import tiny

SOURCES: Mapping[str, str] = {}
PUBLISHED: Mapping[str, Any] = {}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long the parts train."""

    model: str = option("a model", "bundled")
    steps: int = option("steps of a part", 100)
    seeds: int = option("runs", 1)


def part(folder: Path, steps: int, seed: int) -> Result:
    (folder / "pid").write_text(str(os.getpid()))
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = tiny.gpt_neo(seed, dropout=0.1)
    config = TrainConfig(steps, snapshot_every=20)
    rows = learn(folder, folder.name, model, language_model_loss, tiny.batch, config, 30)
    return {"losses": [row["loss"] for row in rows]}


def parts(settings: Settings) -> Sequence[Part]:
    return [Part(name, part, (settings.steps, i)) for i, name in enumerate("ab")]


def measure(settings: Settings, results: Mapping[str, Result]) -> Mapping[str, Result]:
    return results


def report(measured: Mapping[str, Result]) -> Report:
    return Report("tiny", ["It trains."], [], [])


def draw(measured: Mapping[str, Result], figures: Figures) -> None:
    pass


if __name__ == "__main__":
    studies.STUDIES = {"tiny": "a tiny study"}
    sys.modules["minigpt.studies.tiny"] = sys.modules[__name__]
    sys.exit(main())
