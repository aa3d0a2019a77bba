"""What the studies of an encoder share: a model with a classifier on it, and labelled texts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import find
from minigpt.data.labelled import Rows, balanced, read_parts
from minigpt.data.text import Batch
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.architectures import outline, read_config
from minigpt.models.bert import Bert
from minigpt.objectives.classify import Example, class_logits, consecutive_examples, encode, score
from minigpt.training.train import Row

EVALUATED = 64  # rows in a batch that is only measured


@dataclass(frozen=True)
class Encoder:
    """A pretrained encoder with a new classifier, its tokenizer, and examples of two classes."""

    model: Bert
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
    """Of labelled texts, in words."""
    return "bundled reviews" if data == "bundled" else data


def check_encoder(source: str, length: int, prompt: int = 0) -> None:
    """Raises ValueError when the model called `source` is no encoder, or cannot read `length`
    tokens beside a prompt of so many; reads no weight.
    """
    directory = find(source)
    architecture, config, _ = read_config(directory)
    model = outline(architecture, config, "classification")
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
    source: str, data: str, length: int, train_rows: int | None, test_rows: int | None, seed: int
) -> Encoder:
    """The model called `source`, and the texts of `data`, cut to `length` tokens.

    Args:
        train_rows, test_rows: as in `read_rows`.
        seed: of the classifier's first weights and of the training rows.

    Raises:
        ValueError: the model is no encoder, or the data cannot be read or lacks rows.
    """
    directory = find(source)
    tokenizer = Tokenizer.load(directory)
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(directory, head="classification", num_labels=2, device=device)
    assert isinstance(model, Bert)
    tokenizer.check(model.config.vocab_size)
    train, test = read_rows(data, train_rows, test_rows, seed)
    return Encoder(
        model, tokenizer, encode(train, tokenizer, length), encode(test, tokenizer, length)
    )


class Watched:
    """The batches and the loss of a run that also say what each step shows.

    As a probe of the training loop it gives the `accuracy` of the step's own batch, out of the same
    forward pass with its dropout, and every `every` steps loss and accuracy of some sets of
    batches, as `test_loss` and `test_accuracy` for a set called `test`.
    """

    def __init__(
        self,
        model: Bert,
        batches: Callable[[int], Batch],
        sets: Mapping[str, Sequence[Batch]],
        every: int,
    ) -> None:
        self.model, self.batches, self.sets, self.every = model, batches, sets, every
        self.step, self.right = 0, 0.0

    def batch(self, i: int) -> Batch:
        """Batch number i, that of step i + 1."""
        self.step = i + 1
        return self.batches(i)

    def loss(self, model: Bert, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats over the rows."""
        logits = class_logits(model, batch)
        right = logits.detach().argmax(-1) == batch["labels"]
        self.right = right.float().mean().item()
        return F.cross_entropy(logits, batch["labels"])

    def before(self) -> Row:
        return {"accuracy": self.right}

    def after(self) -> Row:
        row: Row = {}
        if self.step % self.every == 0:
            for name, batches in self.sets.items():
                row[f"{name}_loss"], right = score(self.model, batches)
                row[f"{name}_accuracy"] = right.value
        return row
