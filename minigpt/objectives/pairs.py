"""Pairs of completions -> batches, and the losses of them (minigpt/objectives/preference.py).

A batch is a dictionary: `labels` (B,), 0 or 1, which of the two is preferred; and of the pairs'
rows, the two of a pair side by side: `input_ids` and `attention_mask` (2 B, T); for DPO
`completion` (2 B, C), ids, -100 after the end.

Shapes:  B pairs   T time   C columns of the completions
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from minigpt.data.order import place
from minigpt.data.text import IGNORED, Batch, moved, right_padded
from minigpt.generation import left_padded
from minigpt.models.architecture import Decoder, Model
from minigpt.models.mode import mode
from minigpt.objectives.logprobs import completion_logprobs
from minigpt.objectives.preference import agreement, bradley_terry, dpo_scores
from minigpt.objectives.reference import Reference
from peft_lite.handle import Handle

P = TypeVar("P")
Scores = Callable[[Any, Batch], Tensor]  # model and batch -> (B, 2)


@dataclass(frozen=True)
class Completions:
    """The ids of a prompt and of its two completions, each with what ends it."""

    prompt: Sequence[int]
    chosen: Sequence[int]
    rejected: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of the longer row."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True)
class Texts:
    """The ids of two whole texts, prompt and completion, as an encoder reads them."""

    chosen: Sequence[int]
    rejected: Sequence[int]


def collate_completions(pairs: Sequence[Completions]) -> Batch:
    """Prompts padded at the left, completions at the right."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    prompts, real = left_padded([pair.prompt for pair in pairs for _ in range(2)])
    completion, counted = right_padded(rows, IGNORED)
    return {
        "input_ids": torch.cat([prompts, completion.where(counted == 1, 0)], 1),
        "attention_mask": torch.cat([real, counted], 1),
        "completion": completion,
        "labels": torch.zeros(len(pairs), dtype=torch.long),
    }


def collate_texts(pairs: Sequence[Texts], pad: int) -> Batch:
    """Rows padded at the right."""
    rows = [row for pair in pairs for row in (pair.chosen, pair.rejected)]
    ids, real = right_padded(rows, pad)
    return {
        "input_ids": ids,
        "attention_mask": real,
        "labels": torch.zeros(len(pairs), dtype=torch.long),
    }


@dataclass(frozen=True)
class Pairs(Generic[P]):
    """Batch i of an endless sequence of epochs, a function of the seed and i alone."""

    pairs: Sequence[P]
    batch_size: int
    seed: int
    collate: Callable[[Sequence[P]], Batch]

    def __call__(self, i: int) -> Batch:
        numbers = range(i * self.batch_size, (i + 1) * self.batch_size)
        chosen = [self.pairs[place(self.seed, len(self.pairs), number)] for number in numbers]
        return self.collate(chosen)

    def consecutive(self) -> Iterator[Batch]:
        """Every pair once, in order."""
        for start in range(0, len(self.pairs), self.batch_size):
            yield self.collate(self.pairs[start : start + self.batch_size])


@dataclass(frozen=True)
class Dpo:
    """The scores of DPO: beta (log pi - log pi_ref), summed over the tokens of a completion."""

    beta: float
    reference: Reference
    handle: Handle | None

    def __call__(self, model: Decoder, batch: Batch) -> Tensor:
        """(B, 2)."""
        rows = (batch["input_ids"], batch["attention_mask"], batch["completion"])
        logprobs = completion_logprobs(model, *rows).sum(1)
        with self.reference.of(model, self.handle) as before:
            reference = completion_logprobs(before, *rows).sum(1)
        return dpo_scores(logprobs, reference, self.beta).view(-1, 2)


def reward_scores(model: Model, batch: Batch) -> Tensor:
    """Scores (B, 2) of a model with a classification head of one output."""
    scores = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    return scores.float().view(-1, 2)


def preference_loss(scores: Scores) -> Callable[[Any, Batch], Tensor]:
    """The loss of pairs, by their scores."""

    def loss(model: Any, batch: Batch) -> Tensor:
        # - log sigma(s_w - s_l)
        return bradley_terry(scores(model, batch), batch["labels"])

    return loss


@torch.no_grad()
def loss_and_accuracy(
    model: Model, scores: Scores, batches: Iterable[Batch], bf16: bool = False
) -> tuple[float, float]:
    """Of all pairs the mean loss in nats, without dropout, and the share whose preferred completion
    has the higher score; equal ones count half.
    """
    device = next(model.parameters()).device
    loss, right, n = 0.0, 0.0, 0
    with mode(model, training=False):
        for batch in batches:
            batch = moved(batch, device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                pair, labels = scores(model, batch), batch["labels"]
                loss += len(labels) * bradley_terry(pair, labels).item()
            right += len(labels) * agreement(pair, labels).item()
            n += len(labels)
    return loss / n, right / n
