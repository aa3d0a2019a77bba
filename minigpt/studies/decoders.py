"""What the studies of a decoder share: a model with its text, how it trains, what it writes.

The write-ups 000 and 001 fine-tune a set T of parameters, chosen by their names, with AdamW at a
constant rate and without clipping:

    theta_i <- theta_i - eta AdamW(g)_i    for i in T;    all other theta_i stay

The names are the native ones, which are the same in every architecture: blocks.3.attention.query.

Popular tokens: p is the share of sampled tokens that are among the k most frequent ones of a text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minigpt.checkpoints import gguf
from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import FORMS, find
from minigpt.data.tales import text_of
from minigpt.data.text import RandomWindows, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.models import architecture
from minigpt.models.config import positive
from minigpt.objectives.causal import language_model_loss
from minigpt.studies.training import Step, at_least, learn
from minigpt.training.train import Probe, Row, TrainConfig

DECODER = f"a decoder: {FORMS}"

Rule = Callable[[str], bool]  # whether the parameter of a native name trains


@dataclass(frozen=True)
class Decoder:
    """A pretrained decoder and its tokenizer.

    Attributes:
        weights: what they were rounded to in a .gguf file, "Q4_1 weights"; "" in any other.
    """

    model: architecture.Decoder
    tokenizer: Tokenizer
    weights: str = ""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_decoder(source: str, device: str | None = None) -> Decoder:
    """The model called `source`, on the GPU where there is one unless `device` says otherwise.

    Raises:
        ValueError: it is no decoder, or its tokenizer is another model's.
    """
    directory = find(source)
    tokenizer = Tokenizer.load(directory)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load(directory, head="causal-lm", device=device)
    tokenizer.check(model.config.vocab_size)
    rounded = directory.suffix == ".gguf"
    return Decoder(model, tokenizer, f"{gguf.opened(directory).most()} weights" if rounded else "")


def check_positions(decoder: Decoder, length: int) -> None:
    """Raises ValueError when the model has too few positions for windows of a length."""
    if length > (limit := decoder.model.max_tokens):
        raise ValueError(f"--sequence-length is {length}, there are {limit} positions for tokens")


def token_ids(decoder: Decoder, source: str) -> Tensor:
    """The whole text, (n,)."""
    return decoder.tokenizer.ids(text_of(source))


def split_ids(decoder: Decoder, source: str, heldout: float) -> tuple[Tensor, Tensor]:
    """Token ids of a text: the part to train on, and the held-out end of it."""
    parts = split_text(text_of(source), heldout)
    train, test = (decoder.tokenizer.ids(part) for part in parts)
    return train, test


def train_only(model: architecture.Model, rule: Rule) -> int:
    """Lets those parameters train whose native names the rule picks, and no others.

    Returns:
        How many tensors train.
    """
    picked = [rule(name) for name, _ in model.named_parameters()]
    for p, trains in zip(model.parameters(), picked, strict=True):
        p.requires_grad_(trains)
    return sum(picked)


class Tuning:
    """The settings that 000 and 001 share, and the training they describe."""

    model: str
    seeds: int
    steps: int
    batch_size: int
    sequence_length: int
    lr: float
    weight_decay: float
    popular: int
    starts: int
    tokens: int
    rounds: int

    def checked_decoder(self) -> Decoder:
        """The model, on the CPU, after a check of the settings.

        Raises:
            ValueError: a setting is out of its range, or the model is no decoder or has too few
                positions for a window, or for the tokens sampled after a start token.
        """
        positive(self, "seeds", "batch_size", "sequence_length", "starts", "tokens", "popular")
        at_least(self, 2, "steps", "rounds")
        self.training()
        decoder = load_decoder(self.model, "cpu")
        limit = decoder.model.max_tokens
        for option, needed in (
            ("sequence_length", self.sequence_length),
            ("tokens", self.tokens + 1),
        ):
            if needed > limit:
                value = getattr(self, option)
                raise ValueError(f"{option} is {value}, the model has {limit} positions")
        return decoder

    def training(self) -> TrainConfig:
        """No schedule, no clipping."""
        return TrainConfig(
            self.steps,
            lr=self.lr,
            schedule="constant",
            weight_decay=self.weight_decay,
            max_norm=None,
            snapshot_every=50,
        )

    def windows(self, ids: Tensor, seed: int) -> RandomWindows:
        return RandomWindows(ids, self.sequence_length, self.batch_size, seed)

    def tune(
        self, folder: Path, decoder: Decoder, ids: Tensor, seed: int, probes: Sequence[Probe] = ()
    ) -> list[Row]:
        """Trains the parameters that require a gradient on windows of `ids`, as `learn` does."""
        torch.manual_seed(seed)  # of dropout: the same for all models of one seed
        batches, config, model = self.windows(ids, seed), self.training(), decoder.model
        tokens = self.batch_size * self.sequence_length
        return learn(
            folder, folder.name, model, language_model_loss, batches, config, tokens, probes
        )

    def step(self, decoder: Decoder, ids: Tensor) -> Step:
        """Such a step alone."""
        return Step(decoder.model, language_model_loss, self.windows(ids, 0), self.training())


def starts(ids: Tensor, n: int, seed: int) -> Tensor:
    """N tokens of a text, drawn at random: the prompts (n, 1) of all models that are compared."""
    random = np.random.default_rng(seed)
    return ids[random.integers(0, len(ids), n)][:, None]


def sample(decoder: Decoder, prompts: Tensor, tokens: int, seed: int) -> list[int]:
    """What the model adds to prompts (n, T): n x tokens ids, drawn from the 50 most likely."""
    random = torch.Generator(decoder.device).manual_seed(seed)
    ids = generate(decoder.model, prompts.to(decoder.device), tokens, top_k=50, generator=random)
    return ids[:, prompts.size(1) :].flatten().tolist()
