"""What the studies of an encoder share: a model with a classifier on it, and labelled texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minigpt.checkpoints.directory import load, outline
from minigpt.checkpoints.source import find
from minigpt.data.labelled import Rows, balanced, read_parts
from minigpt.data.text import Batch
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.architecture import Model
from minigpt.objectives.classify import Example, consecutive_examples, encode

EVALUATED = 64  # rows in a batch that is only measured


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder with a new classifier, its tokenizer, and examples of two classes."""

    model: Model
    tokenizer: Tokenizer
    train: Sequence[Example]
    test: Sequence[Example]

    @property
    def pad(self) -> int:
        return self.tokenizer.special.pad

    def test_batches(self) -> list[Batch]:
        """Every test example once."""
        return list(consecutive_examples(self.test, EVALUATED, self.pad))


def data_name(data: str) -> str:
    """The name of labelled texts in findings."""
    return "bundled reviews" if data == "bundled" else data


def check_encoder(source: str, length: int, prompt: int = 0) -> None:
    """Raises ValueError when the model called `source` is no encoder, or cannot read `length`
    tokens beside a prompt of so many; reads no weight.
    """
    directory = find(source)
    model = outline(directory, head="classification")
    tokenizer = Tokenizer.load(directory)
    tokenizer.check(model.config.vocab_size)
    encode([("", 0)], tokenizer, length)
    if length > (limit := model.max_tokens - prompt):
        beside = f" beside a prompt of {prompt}" if prompt else ""
        raise ValueError(
            f"--sequence-length is {length}, there are {limit} positions for tokens{beside}"
        )


def read_rows(
    data: str, train_rows: int | None, test_rows: int | None, seed: int
) -> tuple[Rows, Rows]:
    """The texts of `data` to learn from, and held-out ones, half of each label.

    Args:
        train_rows: how many, half of each label; None: all there are.
        test_rows: how many; None: twice those of the rarer label.
        seed: of the training rows; the test rows are the same for all seeds.

    Raises:
        ValueError: the data cannot be read or lacks rows.
    """
    train, test = read_parts(data)
    if train_rows is not None:
        train = balanced(train, train_rows, seed)
    positives = sum(label for _, label in test)
    rarer = min(positives, len(test) - positives)
    return train, balanced(test, 2 * rarer if test_rows is None else test_rows, 0)


def load_encoder(
    source: str, rows: tuple[Rows, Rows], length: int, seed: int, quantize: str | None = None
) -> Encoder:
    """The model called `source` with a classifier of this seed, on the GPU where there is one.

    Args:
        rows: to learn from, and held out; cut to `length` tokens.
        quantize: "nf4": the linear layers but the head in 4 bits.

    Raises:
        ValueError: the model is no encoder, or its tokenizer is another model's.
    """
    directory = find(source)
    tokenizer = Tokenizer.load(directory)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(directory, head="classification", num_labels=2, device=device, quantize=quantize)
    tokenizer.check(model.config.vocab_size)
    train, test = (encode(part, tokenizer, length) for part in rows)
    return Encoder(model, tokenizer, train, test)


class Sentiment:
    """The settings that 002 and 003 share: an encoder and labelled texts."""

    model: str
    data: str
    sequence_length: int
    train_rows: int | None
    test_rows: int | None

    def rows(self, seed: int) -> tuple[Rows, Rows]:
        """Texts to learn from, and held-out ones, as `read_rows` gives them."""
        return read_rows(self.data, self.train_rows, self.test_rows, seed)

    def encoder(self, seed: int) -> Encoder:
        """The model with a classifier of this seed, and the texts of this seed.

        Raises:
            ValueError: the model is no encoder, or the data cannot be read or lacks rows.
        """
        return load_encoder(self.model, self.rows(seed), self.sequence_length, seed)
