"""What is measured in the runs of write-up 002."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pvariance

import torch

from minigpt.metrics.intervals import Estimate, share
from minigpt.models.bert import Bert, BertConfig
from minigpt.studies.lab import Result
from minigpt.studies.words import over_seeds
from minigpt.training.train import TrainConfig

PARTS = ("attention", "embeddings")


@dataclass(frozen=True)
class Runs:
    """All runs of a study.

    Attributes:
        arms: arm -> its runs, one a seed.
        configs: arm -> how it trains.
        unread: what counting words tells.
        on: model, data and number of seeds, in words.
    """

    arms: Mapping[str, Sequence[Result]]
    configs: Mapping[str, TrainConfig]
    unread: Result
    on: str

    @property
    def seeds(self) -> int:
        return len(self.arms["baseline"])

    @property
    def rows(self) -> int:
        """Held-out reviews."""
        return int(self.unread["rows"])

    def each(self, arm: str, figure: Callable[[Result], float]) -> list[float]:
        """A figure of every seed's run."""
        return [figure(run) for run in self.arms[arm]]

    def accuracy(self, arm: str) -> Estimate:
        """The mean over seeds, with the interval that so many reviews leave."""
        right = fmean(self.each(arm, lambda run: run["right"]))
        return replace(share(round(right), self.rows), value=right / self.rows)

    def first(self, arm: str) -> float:
        """The course's accuracy, that of the first batch alone, at the end of training."""
        return fmean(self.each(arm, lambda run: run["first_accuracy"]))

    def clipped(self, arm: str) -> float:
        """Share of the steps that clipping changed."""
        config = self.configs[arm]
        return fmean(
            fmean(value > 0 for value in lost(run["steps"]["gradient_norm"], config))
            for run in self.arms[arm]
        )

    def gains(self) -> list[float]:
        """Accuracy with everything less that of the baseline, by seeds."""
        pairs = zip(self.arms["schedule"], self.arms["baseline"], strict=True)
        return [(a["right"] - b["right"]) / self.rows for a, b in pairs]

    def variances(self, of: Callable[[Result], float]) -> list[float]:
        """Logarithm of a variance of the loss with clipping and schedule against that with
        neither, by seeds; the same tensors train in both.
        """
        pairs = zip(self.arms["schedule"], self.arms["freezing"], strict=True)
        return [math.log(of(a) / of(b)) for a, b in pairs]

    def ratio(self, of: Callable[[Result], float]) -> Estimate:
        """Of these variances, the geometric mean over seeds."""
        found = over_seeds(self.variances(of))
        if math.isinf(found.low):  # one seed
            return replace(found, value=math.exp(found.value))
        return Estimate(*(math.exp(x) for x in (found.value, found.low, found.high)))


def lost(norms: Sequence[float], config: TrainConfig) -> list[float]:
    """Delta g of each step, from |g|."""
    # Delta g = |g| - |g'|,   |g'| = min(|g|, c(t))
    return [norm - min(norm, config.limit(t)) for t, norm in enumerate(norms)]


def straight(config: TrainConfig, t: int) -> float:
    """The write-up's third line, without warm-up: rate of the update that follows `t` others."""
    return config.lr * (1 - t / config.schedule_length)


def tail(values: Sequence[float]) -> Sequence[float]:
    """The last half."""
    return values[len(values) // 2 :]


def early(values: Sequence[float]) -> Sequence[float]:
    """The first tenth."""
    return values[: max(1, len(values) // 10)]


def below_one(run: Result) -> float:
    """Share of the steps in which the gradient of the MLP's weight has a norm below 1."""
    return fmean(norm < 1 for norm in run["steps"]["gradient_norm.mlp"])


def early_classifier(run: Result) -> float:
    """Mean norm of the classifier's gradient in the first tenth of the steps."""
    return fmean(early(run["steps"]["gradient_norm.classifier"]))


def tail_variance(run: Result) -> float:
    """Of the training loss."""
    return pvariance(tail(run["steps"]["loss"]))


def jumps(run: Result) -> float:
    """Half the mean square of the difference of neighbouring losses."""
    losses = run["steps"]["loss"]
    pairs = zip(losses[1:], losses[:-1], strict=True)
    return fmean([(a - b) ** 2 / 2 for a, b in pairs])


def frozen_of_bert_base() -> tuple[int, int]:
    """Parameters of BERT-base with two classes that the rule freezes, and all there are."""
    with torch.device("meta"):
        model = Bert(BertConfig(), "classification", 2)
    sizes = {model.names.to_hf(name): p.numel() for name, p in model.named_parameters()}
    frozen = sum(n for name, n in sizes.items() if any(part in name for part in PARTS))
    return frozen, sum(sizes.values())
