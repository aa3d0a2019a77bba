"""How the write-ups 000 and 001 fine-tune a decoder: some parameters, chosen by their names, with
AdamW at a constant rate and without clipping.

    theta_i <- theta_i - eta AdamW(g)_i    for i in the chosen set;    all other theta_i stay
"""

import math
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from kernels import ClippedAdamW
from minigpt.architectures import ARCHITECTURES, outline
from minigpt.data import RandomWindows
from minigpt.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.loss import language_model_loss
from minigpt.progress import progress_bar
from minigpt.studies.decoders import Decoder, text_of
from minigpt.train import Probe, Row, TrainConfig, train

Rule = Callable[[str], bool]


def train_only(model: GPTNeo, trains: Rule) -> int:
    """Lets those parameters train whose checkpoint names the rule picks, and no others.

    Returns:
        How many tensors train.
    """
    chosen = [trains(model.names.to_hf(name)) for name, _ in model.named_parameters()]
    for p, yes in zip(model.parameters(), chosen, strict=True):
        p.requires_grad_(yes)
    return sum(chosen)


def trainable(model: nn.Module) -> int:
    """Number of parameters that train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def published_model() -> GPTNeo:
    """GPT-Neo-125M without values: 125,198,592 parameters to be counted."""
    model = outline(ARCHITECTURES["gpt_neo"], GPTNeoConfig(), "causal-lm")
    assert isinstance(model, GPTNeo)
    return model


def constant_rate(steps: int, lr: float, weight_decay: float) -> TrainConfig:
    """No schedule, no clipping."""
    return TrainConfig(
        steps,
        lr=lr,
        schedule="constant",
        weight_decay=weight_decay,
        max_norm=None,
        snapshot_every=50,
    )


def token_ids(decoder: Decoder, text: str) -> Tensor:
    """The whole text of a file, (n,)."""
    return torch.tensor(decoder.tokenizer.encode(text_of(text)))


def check_length(decoder: Decoder, sequence_length: int, tokens: int) -> None:
    """Raises ValueError where the model has too few positions for what is asked of it."""
    limit = decoder.model.max_tokens
    for option, value, needed in (
        ("sequence_length", sequence_length, sequence_length),
        ("tokens", tokens, tokens + 1),  # after one start token
    ):
        if needed > limit:
            raise ValueError(f"{option} is {value}, the model has {limit} positions")


def tune(
    folder: Path,
    decoder: Decoder,
    batches: RandomWindows,
    config: TrainConfig,
    probes: Sequence[Probe] = (),
) -> list[Row]:
    """Trains what requires a gradient; what an interrupted part has done is not done again."""
    torch.manual_seed(batches.seed)  # of dropout: the same for all models of one seed
    tokens = batches.batch_size * batches.length
    with progress_bar(folder.name, config.steps, tokens) as observe:
        return train(
            decoder.model,
            language_model_loss,
            batches,
            config,
            folder,
            resume=True,
            observe=observe,
            probes=probes,
        )


class Step:
    """A training step without records, whose time and memory can be taken."""

    def __init__(self, decoder: Decoder, batches: RandomWindows, config: TrainConfig) -> None:
        self.model, self.device, self.batches = decoder.model.train(), decoder.device, batches
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = ClippedAdamW(
            trained, config.lr, max_norm=math.inf, weight_decay=config.weight_decay
        )
        self.numbers = count()

    def __call__(self) -> None:
        batch = self.batches(next(self.numbers))
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        language_model_loss(self.model, batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
