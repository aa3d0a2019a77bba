"""Sentiment without reading: logistic regression on how often each word occurs.

    p(positive) = 1 / (1 + exp(-(b + sum over the words of a text of w[word])))
    (w, b)      = argmin  mean of - log p(label)  +  decay / 2 (|w|^2 + b^2)

The minimum is the only one; L-BFGS finds it (Liu and Nocedal 1989).
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.data.labelled import Rows
from minigpt.metrics.intervals import Estimate, share


def accuracy(train: Rows, test: Rows, decay: float = 1e-2) -> Estimate:
    """Share of `test` told right by the weights that `train` gives, with its interval."""
    vocabulary = {w: i for i, w in enumerate(sorted({w for text, _ in train for w in words(text)}))}
    weight = torch.zeros(len(vocabulary), 1, requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    bags, labels = _bags(train, vocabulary), _labels(train)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        squares = weight.square().sum() + bias.square().sum()
        # mean of - log p(label)  +  decay / 2 (|w|^2 + b^2)
        value = F.binary_cross_entropy_with_logits(_logits(bags, weight, bias), labels)
        value = value + decay / 2 * squares
        value.backward()
        return value

    optimizer.step(loss)
    guesses = _logits(_bags(test, vocabulary), weight, bias) > 0
    return share(int((guesses == _labels(test).bool()).sum()), len(test))


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def _bags(rows: Rows, vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """The known words of all texts in a row, and where each text begins."""
    ids = [[vocabulary[w] for w in words(text) if w in vocabulary] for text, _ in rows]
    lengths = torch.tensor([0, *map(len, ids)])
    return torch.tensor([i for text in ids for i in text]), lengths.cumsum(0)[:-1]


def _labels(rows: Rows) -> Tensor:
    return torch.tensor([float(label) for _, label in rows])


def _logits(bags: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    # b + sum over the words of a text of w[word]
    return F.embedding_bag(bags[0], weight, bags[1], mode="sum")[:, 0] + bias
