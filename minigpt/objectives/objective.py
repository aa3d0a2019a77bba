"""What an objective of learning from texts consists of: a tokenizer, a model, batches, their loss.

A new objective is one file that ends with its `Objective`, and one line in
minigpt/objectives/registry.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from minigpt.data.text import Batch
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.architecture import Model
from minigpt.settings.sizes import SizeOptions


@dataclass(frozen=True)
class Windows:
    """What batches are cut from: `tokens` (n,), in rows of `length`, `batch_size` rows each."""

    tokens: Tensor
    tokenizer: Tokenizer
    length: int
    batch_size: int
    seed: int


@dataclass(frozen=True)
class Objective:
    """How to learn from nothing but texts.

    Attributes:
        about: one line for `--help`.
        head: of the models that learn it.
        learn_tokenizer: texts and the size of the vocabulary -> a tokenizer.
        new_model: size, tokenizer and number of positions -> a model with fresh weights.
        batches: the training text -> a pure function of the batch's number.
        heldout: the held-out text -> batches that are the same for every seed.
        loss: model and batch -> mean loss in nats over the labels.
        sample: model, tokenizer, beginning of a text (1, T) and seed -> what the model makes of it.
        predicts_every_token: whether the loss is a code length of the text.
    """

    about: str
    head: str
    learn_tokenizer: Callable[[Iterable[str], int], Tokenizer]
    new_model: Callable[[SizeOptions, Tokenizer, int], Model]
    batches: Callable[[Windows], Callable[[int], Batch]]
    heldout: Callable[[Windows], Iterable[Batch]]
    loss: Callable[[Any, Batch], Tensor]
    sample: Callable[[Any, Tokenizer, Tensor, int], str]
    predicts_every_token: bool
