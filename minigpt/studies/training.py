"""How a part of a study trains, and a single step of it, whose time and memory can be taken."""

import math
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

from torch import nn

from minigpt.data.text import Batch, moved
from minigpt.training.progress import progress_bar
from minigpt.training.train import Loss, Probe, Row, TrainConfig, train
from minigpt_kernels import ClippedAdamW


def learn(
    folder: Path,
    title: str,
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    tokens: int,
    probes: Sequence[Probe] = (),
) -> list[Row]:
    """Trains what requires a gradient, with a progress bar; what an interrupted part has done is
    not done again.

    Args:
        tokens: of a step, at most; the bar shows the speed.
    """
    with progress_bar(title, config.steps, tokens) as observe:
        return train(
            model, loss, batches, config, folder, resume=True, observe=observe, probes=probes
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
