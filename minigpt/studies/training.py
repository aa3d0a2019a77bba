"""How a part of a study trains; single steps, and their times taken in turn, so that whatever else
the machine does slows all sides alike.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from minigpt.data.text import Batch, moved
from minigpt.training.progress import progress_bar
from minigpt.training.train import Loss, Probe, Row, TrainConfig, train
from minigpt_kernels import ClippedAdamW

Seconds = dict[str, list[float]]


def at_least(settings: Any, least: int, *names: str) -> None:
    """Raises ValueError for a setting below `least`."""
    for name in names:
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")


def learn(
    folder: Path,
    title: str,
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    tokens: int,
    probes: Sequence[Probe] = (),
    dropout: bool = True,
) -> list[Row]:
    """Trains the parameters that require a gradient, with a progress bar; a run that was
    interrupted continues where it stopped.

    Args:
        tokens: the most that a step has; the bar shows the speed.
    """
    with progress_bar(title, config.steps, tokens) as observe:
        return train(
            *(model, loss, batches, config, folder),
            resume=True,
            observe=observe,
            probes=probes,
            dropout=dropout,
        )


class Step:
    """A training step without records."""

    def __init__(
        self, model: nn.Module, loss: Loss, batches: Callable[[int], Batch], config: TrainConfig
    ) -> None:
        self.model, self.loss, self.batches, self.numbers = model.train(), loss, batches, count()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.device = trained[0].device
        self.optimizer = ClippedAdamW(
            trained,
            config.lr,
            max_norm=math.inf if config.max_norm is None else config.max_norm,
            weight_decay=config.weight_decay,
        )

    def __call__(self) -> None:
        batch = moved(self.batches(next(self.numbers)), self.device)
        self.loss(self.model, batch).backward()
        self.optimizer.step().item()  # as the trainer, which waits for the norm
        self.optimizer.zero_grad()


def in_turn(sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> Seconds:
    """Seconds of each side in each of `rounds`; the first `warmup` rounds do not count."""
    seconds: Seconds = {name: [] for name in sides}
    for i in range(warmup + rounds):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return seconds
