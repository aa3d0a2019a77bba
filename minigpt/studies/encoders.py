"""What the studies of an encoder share: a model with a classifier on it, and labelled texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minigpt.bert import Bert
from minigpt.checkpoint import load
from minigpt.classify import Example, consecutive_examples, encode
from minigpt.data import Batch
from minigpt.labelled import balanced, read_parts
from minigpt.source import find
from minigpt.tokenizer import Tokenizer

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


def load_encoder(
    source: str, data: str, length: int, train_rows: int | None, test_rows: int | None, seed: int
) -> Encoder:
    """The model called `source`, and the texts of `data`, cut to `length` tokens.

    Args:
        train_rows, test_rows: how many, half of each label; None: all there are.
        seed: of the classifier's first weights and of the training rows; the test rows are the
            same for all seeds.

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
    train, test = read_parts(data)
    if train_rows is not None:
        train = balanced(train, train_rows, seed)
    if test_rows is not None:
        test = balanced(test, test_rows, 0)
    return Encoder(
        model, tokenizer, encode(train, tokenizer, length), encode(test, tokenizer, length)
    )
