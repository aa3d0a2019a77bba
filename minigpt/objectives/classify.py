"""Labelled texts -> batches, their loss and their accuracy.  Devlin et al. 2018, section 4.1,
https://arxiv.org/abs/1810.04805

    a row    [CLS] text [SEP] [PAD] ...      cut to at most T tokens, filled to the batch's longest
    loss     = mean over rows of  - log softmax(logits)[label]
    accuracy = share of rows whose largest logit is the label's

A batch is a dictionary: `input_ids` and `attention_mask` (B, T), `labels` (B,).  Shuffled batch
number i is a function of the seed and i alone, as in minigpt/data/text.py.

Shapes:  B batch   T time
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.order import place
from minigpt.data.text import Batch, moved, right_padded
from minigpt.data.tokenizer import MARKS, Tokenizer
from minigpt.metrics.intervals import Estimate, share
from minigpt.models.architecture import Model, config_json
from minigpt.models.mode import mode

CLASSIFIER = "head.classifier"


@dataclass(frozen=True)
class Example:
    """A row of token ids with its marks, the number of its class, and whether its text was cut."""

    ids: list[int]
    label: int
    cut: bool = False


def encode(
    texts: Iterable[tuple[str, int]], tokenizer: Tokenizer, max_length: int
) -> list[Example]:
    """Pairs of text and label -> examples of at most `max_length` tokens, marks included.

    Raises:
        ValueError: no room for a token between the marks, a tokenizer without them, a text that is
            not Unicode, or a label that is negative or no whole number.
    """
    if max_length <= MARKS:
        raise ValueError(
            f"max_length is {max_length}, must be at least {MARKS + 1}: [CLS], a token and [SEP]"
        )
    special = tokenizer.special
    examples = []
    for text, label in texts:
        if type(label) is not int or label < 0:
            raise ValueError(f"label {label!r} of {text[:40]!r}, must be 0, 1, 2, ...")
        ids, room = tokenizer.encode(text), max_length - MARKS
        row = [special.first, *ids[:room], special.last]
        examples.append(Example(row, label, cut=len(ids) > room))
    return examples


def collate(examples: Sequence[Example], pad: int) -> Batch:
    """Rows filled with `pad` to the longest."""
    ids, real = right_padded([example.ids for example in examples], pad)
    return {
        "input_ids": ids,
        "attention_mask": real,
        "labels": torch.tensor([example.label for example in examples]),
    }


@dataclass(frozen=True)
class ShuffledExamples:
    """Batch i: the rows i B to i B + B - 1 of an endless sequence of epochs, each of which holds
    every example once, in a random order.
    """

    examples: Sequence[Example]
    batch_size: int
    seed: int
    pad: int

    def __post_init__(self) -> None:
        _check(self.examples, self.batch_size)

    def __call__(self, i: int) -> Batch:
        rows = range(i * self.batch_size, (i + 1) * self.batch_size)
        chosen = [self.examples[place(self.seed, len(self.examples), row)] for row in rows]
        return collate(chosen, self.pad)


def consecutive_examples(examples: Sequence[Example], batch_size: int, pad: int) -> Iterator[Batch]:
    """Every example once, in order."""
    _check(examples, batch_size)
    for start in range(0, len(examples), batch_size):
        yield collate(examples[start : start + batch_size], pad)


def new_modules(model: Model) -> list[str]:
    """Modules that train whole under every method: what the checkpoint lacks, which starts at
    random, so that nothing could be learned through it, and the classifier, which comes last.
    """
    lacking = {name.rpartition(".")[0] for name in model.fresh}
    return [*sorted(lacking - {CLASSIFIER}), CLASSIFIER]


def label_names(model: Model) -> list[str]:
    """The names of the classes, in their order; LABEL_0 and so on where they have none."""
    names = config_json(model)["id2label"]
    return [names[i] for i in sorted(names, key=int)]


def name_labels(model: Model, names: Sequence[str]) -> None:
    """Names the classes; config.json will have them as id2label and label2id."""
    id2label = {str(i): name for i, name in enumerate(names)}
    model.config = replace(model.config, id2label=id2label)  # type: ignore[type-var]


def classification_loss(model: Model, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats over the rows."""
    # - log softmax(logits)[label]
    return F.cross_entropy(class_logits(model, batch), batch["labels"])


def accuracy(model: Model, batches: Iterable[Batch]) -> Estimate:
    """Share of rows whose largest logit is the label's, with its interval."""
    return score(model, batches)[1]


def score(model: Model, batches: Iterable[Batch]) -> tuple[float, Estimate]:
    """Mean cross-entropy in nats over the rows, and the accuracy, in one pass."""
    logits, labels = predict(model, batches)
    right = int((logits.argmax(-1) == labels).sum())
    return F.cross_entropy(logits, labels).item(), share(right, len(labels))


@torch.no_grad()
def predict(model: Model, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Logits (n, classes) and labels (n,) of all rows, on the CPU, without dropout."""
    device = next(model.parameters()).device
    with mode(model, training=False):
        pairs = [
            (class_logits(model, moved(batch, device)).cpu(), batch["labels"]) for batch in batches
        ]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def class_logits(model: Model, batch: Batch) -> Tensor:
    """(B, classes).  Raises ValueError for a label that is none of them."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    classes = logits.size(-1)
    low, high = (int(label) for label in batch["labels"].cpu().aminmax())  # a GPU waits once
    if low < 0 or high >= classes:
        label = low if low < 0 else high
        raise ValueError(f"label {label}, the model has {classes} classes: 0 to {classes - 1}")
    return logits


def _check(examples: Sequence[Example], batch_size: int) -> None:
    if not examples:
        raise ValueError("there are no examples")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
