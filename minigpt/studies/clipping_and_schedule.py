"""Write-up 002: does an encoder learn sentiment better with freezing, clipping and a schedule?

Reviews of films are told apart by a pretrained BERT with a new classifier.  A step, in this order:

    forward, backward    g                                   of the trained tensors
    record               |g|, and the norms of two weights' gradients
    clip                 g' = g min(1, c / |g|)              c(t) = c, or infinity for t < T_0
    optimizer            AdamW at the rate eta(t)
    schedule             t <- t + 1

    eta(t)  = eta t / w   for t < w,   eta (T_sched - t) / (T_sched - w)   after that
    w       = 5 % of the T_train steps,   T_sched = 1.5 T_train, so that the rate never reaches 0

With the optimizer before the schedule, as in the write-up's notebook and here, update n runs at
eta(n - 1), the first at 0; the write-up's section 3.4 puts the schedule first, eta(n), and gives a
third line, eta (1 - t / T_sched).  The first figure has all three.

Five runs for each seed, each from the same weights on the same batches in the same order:

    baseline     everything trains, at a constant rate, unclipped
    freezing     and every tensor with `attention` or `embeddings` in its checkpoint name is frozen
    clipping     and the norm is clipped to c = 1
    schedule     and the rate follows eta(t): what the write-up proposes
    delayed      the same with nothing clipped in the first T_0 updates

What clipping takes from a step is Delta g = |g| - |g'|.  The write-up's update rule is that of
plain gradient descent, theta <- theta - eta c / max(|g|, c) g, where a clipped step is a shorter
step.  AdamW divides by the root of its mean of squares, so that a factor common to all steps
cancels: here clipping only weighs steps against each other.  The schedule also lowers the mean
rate, to about two thirds; the table of accuracies has it.

Accuracy is that of held-out reviews, half of each label, with its interval.  Beside it stands the
course's measure: its test loader is not shuffled and starts again at each evaluation, so it always
shows the same first batch, which in IMDB's order, negatives first, has one class only.

What differs here: texts are padded to the longest of their batch, not to the limit; the padding is
masked, so this changes the time alone.  The default model and reviews are the bundled ones, and the
rate is one at which so small a model learns.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median, pvariance
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peft_lite
from minigpt.data.labelled import Rows, balanced, read_parts
from minigpt.data.text import Batch
from minigpt.metrics.intervals import Estimate, share
from minigpt.models.architecture import Model
from minigpt.models.bert import Bert, BertConfig
from minigpt.models.config import positive
from minigpt.objectives.classify import (
    ShuffledExamples,
    class_logits,
    consecutive_examples,
    encode,
    score,
)
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies import bag_of_words
from minigpt.studies.claims import Finding, above, below, count
from minigpt.studies.encoders import (
    EVALUATED,
    Encoder,
    Sentiment,
    check_encoder,
    data_name,
)
from minigpt.studies.figures import FROZEN, FULL, OTHERS, Figures, curve, line, marks, smooth
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import differences, over_seeds, ratios, successive_variance
from minigpt.studies.report import Report, Table, table
from minigpt.studies.training import learn
from minigpt.studies.words import name, percent, ran_on, shown, side
from minigpt.training import memory
from minigpt.training.train import Row, TrainConfig

TITLE = "Freezing, clipping and a schedule (write-up 002)"
SOURCES = {"model": "bert-base-uncased", "data": "the IMDB reviews"}
PUBLISHED = {
    "steps": 300,
    "batch_size": 64,
    "sequence_length": 512,
    "lr": 1e-5,
    "max_norm": 1.0,
    "evaluate_every": 10,
}
ARMS = ("baseline", "freezing", "clipping", "schedule", "delayed")
FROZEN_PARTS = ("attention", "embeddings")
MEASURED = ("loss", "accuracy", "gradient_norm", "gradient_norm.mlp", "gradient_norm.classifier")
TESTED = ("test_loss", "test_accuracy", "first_accuracy")
QUOTED_RATES = {15: "1e-05", 100: "8.046e-06", 200: "5.747e-06", 300: "3.448e-06"}
QUOTED_SCHEDULE = TrainConfig(300, 1e-5, "linear", warmup_steps=15, schedule_steps=450)


@dataclass(frozen=True, kw_only=True)
class Settings(Sentiment):
    """The study's settings."""

    model: str = option('an encoder: a directory, a hub id, or "bundled-bert"', "bundled-bert")
    data: str = option(
        'folder with train and test, .jsonl or .csv, perhaps .gz; or "bundled"', "bundled"
    )
    seeds: int = option("runs of each arm; below five nothing is decided", 1)
    steps: int = with_default(TrainingOptions, "steps", 300)
    batch_size: int = option("reviews in a batch", 16)
    sequence_length: int = option("tokens of a review, the rest is cut", 64)
    lr: float = with_default(TrainingOptions, "lr", 3e-4)
    max_norm: float = with_default(TrainingOptions, "max_norm", 1.0)
    clip_from: int | None = option(
        "updates that the delayed arm leaves unclipped, T_0 (default: a third of the steps)", None
    )
    train_rows: int | None = option(
        "reviews to learn from, half of each label (default: all)", None
    )
    test_rows: int | None = option("held-out reviews, half of each label (default: all)", None)
    watched_rows: int = option("those of them that are measured along the way", 200)
    evaluate_every: int = with_default(TrainingOptions, "evaluate_every", 10)

    @property
    def warmup(self) -> int:
        return round(0.05 * self.steps)

    @property
    def schedule_steps(self) -> int:
        return round(1.5 * self.steps)

    @property
    def delay(self) -> int:
        return self.steps // 3 if self.clip_from is None else self.clip_from

    def training(self, arm: str) -> TrainConfig:
        """How an arm trains."""
        scheduled = arm in ("schedule", "delayed")
        return TrainConfig(
            steps=self.steps,
            lr=self.lr,
            schedule="linear" if scheduled else "constant",
            warmup_steps=self.warmup if scheduled else 0,
            schedule_steps=self.schedule_steps if scheduled else None,
            max_norm=None if arm in ("baseline", "freezing") else self.max_norm,
            clip_from=self.delay if arm == "delayed" else 0,
            snapshot_every=50,
        )


# --- runs ---------------------------------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """The baselines that read nothing, then every arm with every seed."""
    positive(settings, "seeds", "batch_size", "evaluate_every")
    for arm in ARMS:
        settings.training(arm)
    if settings.evaluate_every > settings.steps:
        raise ValueError(
            f"evaluate_every is {settings.evaluate_every}, must be at most steps = {settings.steps}"
        )
    check_encoder(settings.model, settings.sequence_length)
    watched_rows(settings)
    runs = [
        Part(f"{arm}-{seed}", run, (settings, arm, seed))
        for seed in range(settings.seeds)
        for arm in ARMS
    ]
    return [Part("unread", unread, (settings,)), *runs]


def unread(folder: Path, settings: Settings) -> Result:
    """How many reviews a bag of words gets right, and how many the more frequent label alone; the
    labels of the first batch.
    """
    train_rows, test_rows = settings.rows(seed=0)
    bag = bag_of_words.accuracy(train_rows, test_rows)
    positives = sum(label for _, label in test_rows)
    first = [label for _, label in first_rows(settings)]
    return {
        "rows": len(test_rows),
        "train_rows": len(train_rows),
        "bag_of_words": round(bag.value * len(test_rows)),
        "majority": max(positives, len(test_rows) - positives),
        "first_negative": first.count(0),
        "first_positive": first.count(1),
    }


def watched_rows(settings: Settings) -> Rows:
    """The held-out rows that are measured along the way."""
    return balanced(settings.rows(seed=0)[1], settings.watched_rows, 0)


def first_rows(settings: Settings) -> Rows:
    """The first batch of an unshuffled test set in IMDB's order, negatives first."""
    return sorted(read_parts(settings.data)[1], key=itemgetter(1))[: settings.batch_size]


def run(folder: Path, settings: Settings, arm: str, seed: int) -> Result:
    """Trains one arm."""
    before = memory.resident()
    encoder = settings.encoder(seed)
    model = encoder.model
    if arm != "baseline":
        peft_lite.attach(model, peft_lite.FreezeConfig(freeze=FROZEN_PARTS))
    sets = {
        "test": measured_batches(encoder, settings, watched_rows(settings)),
        "first": measured_batches(encoder, settings, first_rows(settings)),
    }
    shuffled = ShuffledExamples(encoder.train, settings.batch_size, seed, encoder.pad)
    watched = Watched(model, shuffled, sets, settings.evaluate_every)
    layer = 7 * len(model.blocks) // 12  # the published layer 7 of 12
    weights = dict(model.named_parameters())
    norms = GradientNorms(
        {
            "mlp": weights[f"blocks.{layer}.mlp.down.weight"],
            "classifier": weights["head.classifier.weight"],
        }
    )
    torch.manual_seed(seed)  # of dropout
    metrics = learn(
        folder,
        f"{arm}, seed {seed}",
        model,
        watched.loss,
        watched.batch,
        settings.training(arm),
        settings.batch_size * settings.sequence_length,
        [watched, norms],
    )
    loss, right = score(model, encoder.test_batches())
    _, first_right = score(model, sets["first"])
    counts = peft_lite.report(model)
    return {
        "trainable": counts.trainable,
        "total": counts.total,
        "layer": layer,
        "loss": loss,
        "right": round(right.value * len(encoder.test)),
        "first_accuracy": first_right.value,
        "seconds": sum(row["seconds"] for row in metrics),
        "memory_bytes": memory.peak() - before,
        "steps": {name: column(metrics, name) for name in MEASURED},
        "tests": {name: column(metrics, name) for name in TESTED},
    }


def measured_batches(encoder: Encoder, settings: Settings, rows: Rows) -> list[Batch]:
    """Batches to evaluate on."""
    examples = encode(rows, encoder.tokenizer, settings.sequence_length)
    return list(consecutive_examples(examples, EVALUATED, encoder.pad))


def column(metrics: Sequence[Row], name: str) -> list[float]:
    """A column of the metrics to six digits; `metrics.jsonl` has them all."""
    return [float(f"{row[name]:.6g}") for row in metrics if name in row]


class Watched:
    """The batches and the loss of a run, and a probe of the training loop.

    The probe gives the `accuracy` of the step's own batch, out of the same forward pass with its
    dropout, and every `every` steps the loss and the accuracy on some sets of batches, as
    `test_loss` and `test_accuracy` for a set called `test`.
    """

    def __init__(
        self,
        model: Model,
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

    def loss(self, model: Model, batch: Batch) -> Tensor:
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


class GradientNorms:
    """Norms of some gradients before clipping: `name` -> |g|, as `gradient_norm.name`.

    Frozen parameters have none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def before(self) -> Row:
        return {
            f"gradient_norm.{name}": p.grad.norm().item()
            for name, p in self.parameters.items()
            if p.grad is not None
        }

    def after(self) -> Row:
        return {}


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """All runs, and the measured quantities behind the claims.

    Attributes:
        arms: arm -> its runs, one a seed.
        unread: results of the baselines that read nothing.
    """

    settings: Settings
    arms: Mapping[str, Sequence[Result]]
    unread: Result

    @property
    def rows(self) -> int:
        """Held-out reviews."""
        return int(self.unread["rows"])

    def each(self, arm: str, figure: Callable[[Result], float]) -> list[float]:
        """A figure of every seed's run."""
        return [figure(run) for run in self.arms[arm]]

    def mean(self, arm: str, figure: Callable[[Result], float]) -> float:
        """Its mean over seeds."""
        return fmean(self.each(arm, figure))

    def accuracy(self, arm: str) -> Estimate:
        """The mean over seeds, with the interval that so many reviews leave."""
        right = self.mean(arm, itemgetter("right"))
        return replace(share(round(right), self.rows), value=right / self.rows)

    def bag_of_words(self) -> Estimate:
        """The accuracy of counting words."""
        return share(self.unread["bag_of_words"], self.rows)

    def first(self, arm: str) -> float:
        """The course's accuracy, that of the first batch alone, at the end of training."""
        return self.mean(arm, itemgetter("first_accuracy"))

    def clipped(self, arm: str) -> float:
        """Share of the steps that clipping changed."""
        return self.mean(arm, lambda run: fmean(taken > 0 for taken in self.lost(arm, run)))

    def lost(self, arm: str, run: Result) -> list[float]:
        """Delta g of each step."""
        return lost(run["steps"]["gradient_norm"], self.settings.training(arm))

    def gain(self) -> Estimate:
        """Accuracy with everything less that of the baseline."""
        right = (self.each(arm, itemgetter("right")) for arm in ("schedule", "baseline"))
        return over_seeds([difference / self.rows for difference in differences(*right)])

    def log_variance(self, of: Callable[[Result], float]) -> Estimate:
        """Logarithm of a variance of the loss with clipping and schedule over that with neither;
        the same tensors train in both.
        """
        variances = (self.each(arm, of) for arm in ("schedule", "freezing"))
        return over_seeds([math.log(ratio) for ratio in ratios(*variances)])

    def variance_ratio(self, of: Callable[[Result], float]) -> str:
        """The geometric mean of these ratios, with its interval."""
        log = self.log_variance(of)
        low, high = (math.exp(x) if math.isfinite(x) else x for x in (log.low, log.high))
        return shown(Estimate(math.exp(log.value), low, high), ".2f")


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    seeds = range(settings.seeds)
    arms = {arm: [results[f"{arm}-{seed}"] for seed in seeds] for arm in ARMS}
    return Measured(settings, arms, results["unread"])


def lost(norms: Sequence[float], config: TrainConfig) -> list[float]:
    """Delta g of each step, from |g|."""
    # Delta g = |g| - |g'|,   |g'| = min(|g|, c(t))
    return [norm - min(norm, config.limit(t)) for t, norm in enumerate(norms)]


def straight(config: TrainConfig, t: int) -> float:
    """The write-up's third line, without warm-up: rate of the update that follows `t` others."""
    return config.lr * (1 - t / config.schedule_length)


def below_one(run: Result) -> float:
    """Share of the steps in which the gradient of the MLP's weight has a norm below 1."""
    return fmean(norm < 1 for norm in run["steps"]["gradient_norm.mlp"])


def early_classifier(run: Result) -> float:
    """Mean norm of the classifier's gradient in the first tenth of the steps."""
    norms = run["steps"]["gradient_norm.classifier"]
    return fmean(norms[: max(1, len(norms) // 10)])


def last_half(run: Result) -> list[float]:
    """The training losses of the last half of the steps."""
    losses: list[float] = run["steps"]["loss"]
    return losses[len(losses) // 2 :]


def tail_variance(run: Result) -> float:
    """Of the training loss, over the last half of the steps."""
    return pvariance(last_half(run))


def jumps(run: Result) -> float:
    """The variance of the training loss from step to step, which leaves out its fall."""
    return successive_variance(run["steps"]["loss"])


def frozen_of_bert_base() -> tuple[int, int]:
    """Parameters of BERT-base with two classes that the rule freezes, and all there are."""
    with torch.device("meta"):
        model = Bert(BertConfig(), "classification", 2)
    sizes = {model.names.to_hf(name): p.numel() for name, p in model.named_parameters()}
    frozen = sum(n for name, n in sizes.items() if any(part in name for part in FROZEN_PARTS))
    return frozen, sum(sizes.values())


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    return Report(TITLE, answer(m), tables(m), findings(m))


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    best = max(ARMS, key=lambda arm: m.accuracy(arm).value)
    gain, variance, bag = m.gain(), m.log_variance(tail_variance), m.bag_of_words()
    seeds = m.settings.seeds
    apart = "seeds do not tell them apart" if seeds > 1 else "one seed tells nothing apart"
    better = side(gain, seeds, "more than", "fewer than", "beside")
    doubt = side(gain, seeds, "", "", f" ({apart})")
    lower = side(variance, seeds, ", higher", ", lower", f" ({apart})")
    ranks = ("is above", "is below", "is not told apart from")
    rank = side(m.accuracy(best), m.rows, *ranks, alternative=bag.value)
    negative, positive = m.unread["first_negative"], m.unread["first_positive"]
    first = negative + positive
    kinds = "both classes" if min(negative, positive) else "one class only"
    return [
        f"With freezing, clipping and schedule {percent(m.accuracy('schedule'))} of {m.rows} "
        f"held-out reviews are told right, {better} the {percent(m.accuracy('baseline'))} with "
        f"none of them{doubt}; the best arm, {best} at {100 * m.accuracy(best).value:.1f} %, "
        f"{rank} the {percent(bag)} of counting words.",
        f"The variance of the training loss over the last half of the steps is "
        f"{m.variance_ratio(tail_variance)} times that with neither clipping nor schedule on the "
        f"same tensors{lower}; clipping took part in {100 * m.clipped('schedule'):.0f} % of the "
        f"steps.",
        f"The course's measure, always the same {first} test reviews and {kinds}, ends at "
        f"{100 * m.first('schedule'):.1f} % and {100 * m.first('baseline'):.1f} % for these two, "
        f"and would give {100 * max(negative, positive) / first:.0f} % to a model that says the "
        f"same of every review.",
    ]


def findings(m: Measured) -> list[Finding]:
    """A verdict on each claim."""
    frozen, total = frozen_of_bert_base()
    rates = {t: f"{QUOTED_SCHEDULE.rate(t):.4g}" for t in QUOTED_RATES}
    mlp = over_seeds(m.each("schedule", below_one))
    classifier = over_seeds(m.each("schedule", early_classifier))
    gain, variance = m.gain(), m.log_variance(tail_variance)
    negative, positive = m.unread["first_negative"], m.unread["first_positive"]
    seeds = m.settings.seeds
    on = ran_on(m.settings.model, [data_name(m.settings.data)], seeds)
    return [
        Finding(
            "clipping.count",
            f"{frozen:,} of {total:,}, {100 * frozen / total:.2f} %",
            count(frozen, 52_204_032),
            "the published shape of BERT-base with two classes",
        ),
        Finding(
            "clipping.rates",
            ", ".join(rates.values()),
            count(rates, QUOTED_RATES),
            "the published schedule",
            "after so many steps of the schedule; update n runs at the rate after n - 1",
        ),
        Finding(
            "clipping.accuracy",
            f"{percent(gain, ' points')}: {percent(m.accuracy('schedule'))} against "
            f"{percent(m.accuracy('baseline'))}",
            above(gain, seeds, quoted=0.05),  # 90 against 85 %
            on,
            f"{m.rows} held-out reviews, half of each label; the interval of the difference is "
            "over seeds, those of the two over reviews",
        ),
        Finding(
            "clipping.variance",
            f"{m.variance_ratio(tail_variance)} times that of the same tensors with neither",
            below(variance, seeds),
            on,
            "variance of the training loss over the last half of the steps, geometric mean; from "
            f"step to step, which leaves its fall out, {m.variance_ratio(jumps)} times",
        ),
        Finding(
            "clipping.mlp-norm",
            f"below 1 in {percent(mlp)} of the steps",
            above(mlp, seeds, 0.5),
            on,
            f"block {m.arms['schedule'][0]['layer']}, counted from 0, before clipping; mostly: in "
            "more than half of the steps",
        ),
        Finding(
            "clipping.classifier-norm",
            f"{shown(classifier, '.2f')} on average",
            above(classifier, seeds, 1),
            on,
            "before clipping; early: the first tenth of the steps",
        ),
        Finding(
            "clipping.measure",
            f"{negative} negative and {positive} positive reviews; it says "
            f"{100 * m.first('schedule'):.1f} %, all held-out reviews "
            f"{100 * m.accuracy('schedule').value:.1f} %",
            count((negative > 0) + (positive > 0), 2),
            name(data_name(m.settings.data)),
            "classes in the first batch, negatives first as in IMDB, against the test set's two; "
            "the loader is not shuffled and starts again at each evaluation",
        ),
    ]


def tables(m: Measured) -> list[Table]:
    """Accuracies, norms, variances, rates."""
    accuracies = table(
        "Held-out accuracy",
        "arm",
        ARMS,
        {
            "trains": lambda arm: f"{m.arms[arm][0]['trainable']:,}",
            "mean rate": lambda arm: f"{mean_rate(m.settings.training(arm)):.3g}",
            "accuracy [reviews]": lambda arm: percent(m.accuracy(arm)),
            "accuracy [seeds]": lambda arm: percent(
                over_seeds(m.each(arm, lambda run: run["right"] / m.rows))
            ),
            "loss, nats": lambda arm: f"{m.mean(arm, itemgetter('loss')):.4f}",
            "course's measure": lambda arm: f"{100 * m.first(arm):.1f} %",
        },
        f"{m.rows} held-out reviews, half of each label. [reviews]: Wilson's interval for so "
        "many reviews; [seeds]: Student's over the seeds, where there are two or more. Course's "
        "measure: the first batch alone, negatives first. Bag of words: logistic regression on "
        f"counts of words, from {m.unread['train_rows']:,} training reviews.",
    )
    majority = share(m.unread["majority"], m.rows)
    unread = [
        [name, "", "", percent(accuracy), "", "", ""]
        for name, accuracy in (("bag of words", m.bag_of_words()), ("always one answer", majority))
    ]
    return [
        replace(accuracies, rows=[*accuracies.rows, *unread]),
        table(
            "Norms of gradients, before clipping",
            "arm",
            ARMS,
            {
                "|g|, median": lambda arm: f"{median(all_norms(m, arm)):.3g}",
                "|g|, largest": lambda arm: f"{max(all_norms(m, arm)):.3g}",
                "MLP below 1": lambda arm: f"{100 * m.mean(arm, below_one):.1f} %",
                "classifier, early": lambda arm: f"{m.mean(arm, early_classifier):.3g}",
                "steps clipped": lambda arm: f"{100 * m.clipped(arm):.0f} %",
                "Delta g, mean": lambda arm: f"{m.mean(arm, lambda r: fmean(m.lost(arm, r))):.3g}",
            },
            "|g| is that of all trained tensors, so of fewer where some are frozen. MLP below 1: "
            "share of the steps. Early: the first tenth of the steps.",
        ),
        table(
            "Variance of the training loss",
            "arm",
            ARMS,
            {
                "all steps": lambda arm: (
                    f"{m.mean(arm, lambda run: pvariance(run['steps']['loss'])):.4g}"
                ),
                "last half": lambda arm: f"{m.mean(arm, tail_variance):.4g}",
                "step to step": lambda arm: f"{m.mean(arm, jumps):.4g}",
                "mean loss, last half": lambda arm: (
                    f"{m.mean(arm, lambda run: fmean(last_half(run))):.4f}"
                ),
            },
            "Over all steps the variance is mostly the fall of the loss, larger where it falls "
            "further. Step to step: half the mean square of the difference of neighbours. All arms "
            "see the same batches.",
        ),
        rate_table(),
    ]


def mean_rate(config: TrainConfig) -> float:
    return fmean(config.rate(t) for t in range(config.steps))


def all_norms(m: Measured, arm: str) -> list[float]:
    """|g| of all steps of all seeds."""
    return [norm for run in m.arms[arm] for norm in run["steps"]["gradient_norm"]]


def rate_table() -> Table:
    schedule, at = QUOTED_SCHEDULE, list(QUOTED_RATES)
    lines = {
        "after so many steps of the schedule": [schedule.rate(t) for t in at],
        "update, optimizer first (used here)": [schedule.rate(t - 1) for t in at],
        "update, schedule first (section 3.4)": [schedule.rate(t) for t in at],
        "update, 1 - t / T_sched": [straight(schedule, t - 1) for t in at],
    }
    return Table(
        "Rates of the published schedule",
        ["", *map(str, at)],
        [[name, *(f"{rate:.4g}" for rate in rates)] for name, rates in lines.items()],
        "The write-up quotes the first line.",
    )


# --- figures ------------------------------------------------------------------------------------

STYLES = dict(zip(ARMS, (FULL, FROZEN, *OTHERS), strict=False))
LABELS = {
    "baseline": "baseline",
    "freezing": "+ freezing",
    "clipping": "+ clipping",
    "schedule": "+ schedule",
    "delayed": "+ schedule, clipping delayed",
}
SMOOTHED = 10  # steps


def draw(m: Measured, figures: Figures) -> None:
    """All figures."""
    draw_rates(m.settings.training("schedule"), figures)
    draw_course(m, figures)
    draw_norms(m, figures)
    draw_lost(m, figures)
    draw_measures(m, figures)


def draw_rates(config: TrainConfig, figures: Figures) -> None:
    """The learning rate of each update, by the three readings of the write-up."""
    caption = (
        f"Learning rate of each update: warm-up over {config.warmup_steps}, then linear decay to 0 "
        f"at {config.schedule_length}, beyond the last update. The runs use the solid line, whose "
        "first update has rate 0."
    )
    updates = range(1, config.steps + 1)
    lines = [
        ("optimizer first: the notebook, and here", [config.rate(n - 1) for n in updates], FULL),
        ("schedule first: section 3.4", [config.rate(n) for n in updates], FROZEN),
        ("1 - t / T_sched", [straight(config, n - 1) for n in updates], OTHERS[0]),
        ("constant: baseline, freezing, clipping", [config.lr for _ in updates], OTHERS[1]),
    ]
    begin = min(config.steps, 2 * config.warmup_steps + 2)
    grid = {"ncols": 2, "width_ratios": (3, 2)}
    with figures.add("rate.png", caption, 9, 3.6, **grid) as (whole, start):
        for name, rates, style in lines:
            curve(whole, rates, style, name)
            start.plot(updates[:begin], rates[:begin], **line(style), marker=".")
        whole.set(xlabel="update", ylabel="learning rate", title="all updates")
        start.set(xlabel="update", title="the first ones")
        whole.set_ylim(bottom=0)
        whole.legend()


def draw_course(m: Measured, figures: Figures) -> None:
    """Loss and accuracy along the way, training left, held-out right."""
    every, seeds = m.settings.evaluate_every, m.settings.seeds
    caption = (
        "Loss and accuracy. Training: of each step's own batch, with dropout. Held-out: of "
        "reviews that are not trained on, half of each label"
        + (f"; means over {seeds} seeds." if seeds > 1 else ".")
    )
    grid = {"nrows": 2, "ncols": 2, "sharex": True}
    with figures.add("loss_accuracy.png", caption, 9, 6.4, **grid) as panels:
        for name, label, (trained, tested) in zip(
            ("loss", "accuracy"), ("loss, nats", "accuracy"), panels, strict=True
        ):
            for arm in ARMS:
                steps = mean_course([run["steps"][name] for run in m.arms[arm]])
                curve(trained, smooth(steps, SMOOTHED), STYLES[arm], LABELS[arm])
                tests = mean_course([run["tests"][f"test_{name}"] for run in m.arms[arm]])
                at = range(every, every * len(tests) + 1, every)
                tested.plot(at, tests, markersize=3, **STYLES[arm])
            trained.set(ylabel=label)
            tested.sharey(trained)
        panels[0][0].set(title=f"training, mean of {SMOOTHED} steps")
        panels[0][1].set(title=f"held-out, every {every} steps")
        for bottom in panels[1]:
            bottom.set(xlabel="update")
        panels[0][0].legend()


def mean_course(runs: Sequence[Sequence[float]]) -> list[float]:
    """Step by step over the seeds."""
    return [fmean(values) for values in zip(*runs, strict=True)]


def draw_norms(m: Measured, figures: Figures) -> None:
    """Norms of two weights' gradients."""
    caption = (
        f"Norm of two gradients before clipping, and the line at 1: the MLP's output weight in "
        f"block {m.arms['schedule'][0]['layer']}, counted from 0, and the classifier's weight; "
        "seed 0."
    )
    names = {"mlp": "output weight of the MLP", "classifier": "weight of the classifier"}
    with figures.add("norms.png", caption, 9, 3.8, ncols=2, sharey=True) as panels:
        for axes, (name, title) in zip(panels, names.items(), strict=True):
            for arm in ("freezing", "schedule"):
                scatter(axes, arm, m.arms[arm][0]["steps"][f"gradient_norm.{name}"])
            axes.axhline(1, color="black", linewidth=1)
            axes.set(title=title, xlabel="update", yscale="log")
        panels[0].set(ylabel="norm of the gradient, before clipping")
        panels[1].legend()


def draw_lost(m: Measured, figures: Figures) -> None:
    """Delta g of each step."""
    delay = m.settings.delay
    caption = (
        "What clipping takes from the gradient, Delta g = |g| - |g'| over all trained tensors. "
        f"The delayed arm is not clipped in the first {delay} updates, left of the dotted line; "
        "seed 0."
    )
    with figures.add("lost.png", caption, 8, 3.8) as axes:
        for arm in ("clipping", "schedule", "delayed"):
            scatter(axes, arm, m.lost(arm, m.arms[arm][0]))
        axes.axvline(delay + 0.5, color="black", linewidth=1, linestyle=":")
        axes.set(xlabel="update", ylabel="|g| before clipping - |g| after")
        axes.legend()


def scatter(axes: Any, arm: str, values: Sequence[float]) -> None:
    """A mark for each update of an arm."""
    at, style = range(1, len(values) + 1), marks(STYLES[arm])
    axes.scatter(at, values, s=9, alpha=0.7, label=LABELS[arm], **style)


def draw_measures(m: Measured, figures: Figures) -> None:
    """The course's measure beside the held-out accuracy."""
    caption = (
        "Two measures of the same models. The course's shows one class only, negatives, and swings "
        "with whatever the model says more often."
    )
    every, grey = m.settings.evaluate_every, {"color": "#6b6b6b", "linewidth": 1}
    measures = {
        "test_accuracy": ("held-out reviews, half of each label", FULL),
        "first_accuracy": ("the course's: the same first batch", FROZEN),
    }
    with figures.add("measure.png", caption, 9, 3.8, ncols=2, sharey=True) as panels:
        for axes, arm in zip(panels, ("baseline", "schedule"), strict=True):
            for name, (label, style) in measures.items():
                values = mean_course([run["tests"][name] for run in m.arms[arm]])
                at = range(every, every * len(values) + 1, every)
                axes.plot(at, values, markersize=3, label=label, **style)
            axes.axhline(m.bag_of_words().value, linestyle="-.", label="bag of words", **grey)
            axes.axhline(0.5, linestyle=":", label="one answer", **grey)
            axes.set(title=LABELS[arm], xlabel="update")
        panels[0].set(ylabel="accuracy", ylim=(-0.03, 1.03))
        panels[1].legend()
