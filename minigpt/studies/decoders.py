"""What the studies of a decoder share: a model with its text, and what it writes.

Popular tokens: p is the share of sampled tokens that are among the k most frequent ones of a text.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import ASSETS, find
from minigpt.data.text import read_text, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.metrics.intervals import Estimate, popular_share
from minigpt.models.gpt_neo import GPTNeo

CARROLL, POE = "bundled-carroll", "bundled-poe"  # the tales in the package
TALES = {name: ASSETS / "tales" / f"{name.removeprefix('bundled-')}.txt" for name in (CARROLL, POE)}


@dataclass(frozen=True)
class Decoder:
    """A pretrained decoder and its tokenizer."""

    model: GPTNeo
    tokenizer: Tokenizer

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
    assert isinstance(model, GPTNeo)
    tokenizer.check(model.config.vocab_size)
    return Decoder(model, tokenizer)


def text_of(source: str) -> str:
    """The text in a file, or that of a bundled tale."""
    return read_text(TALES.get(source) or Path(source))


def encode(decoder: Decoder, text: str, heldout: float) -> tuple[Tensor, Tensor]:
    """Token ids of the text in a file: the part to train on, and the held-out end of it."""
    parts = split_text(text_of(text), heldout)
    train, test = (torch.tensor(decoder.tokenizer.encode(part)) for part in parts)
    return train, test


def starts(ids: Tensor, n: int, seed: int) -> Tensor:
    """N tokens of a text, drawn at random: the prompts (n, 1) of all models that are compared."""
    random = np.random.default_rng(seed)
    return ids[random.integers(0, len(ids), n)][:, None]


def sample(decoder: Decoder, prompts: Tensor, tokens: int, seed: int) -> list[int]:
    """What the model adds to prompts (n, T): n x tokens ids, drawn from the 50 most likely."""
    random = torch.Generator(decoder.device).manual_seed(seed)
    ids = generate(decoder.model, prompts.to(decoder.device), tokens, top_k=50, generator=random)
    return ids[:, prompts.size(1) :].flatten().tolist()


def popularity(
    decoder: Decoder, prompts: Tensor, tokens: int, popular: Collection[int], seed: int
) -> Estimate:
    """P of a sample."""
    return popular_share(sample(decoder, prompts, tokens, seed), popular)
