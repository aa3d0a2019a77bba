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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import torch

import peft_lite
from minigpt.data.labelled import Rows, balanced, read_parts
from minigpt.data.text import Batch
from minigpt.models.config import positive
from minigpt.objectives.classify import ShuffledExamples, consecutive_examples, encode, score
from minigpt.settings.options import option
from minigpt.studies import bag_of_words
from minigpt.studies import clipping_and_schedule_figures as figures
from minigpt.studies import clipping_and_schedule_report as reports
from minigpt.studies.clipping_and_schedule_measured import PARTS, Runs
from minigpt.studies.encoders import (
    EVALUATED,
    Encoder,
    Watched,
    check_encoder,
    data_name,
    load_encoder,
    read_rows,
)
from minigpt.studies.lab import Part, Result
from minigpt.studies.probes import GradientNorms
from minigpt.studies.report import Report
from minigpt.studies.training import learn
from minigpt.studies.words import ran_on
from minigpt.training import memory
from minigpt.training.train import Row, TrainConfig

TITLE = "Freezing, clipping and a schedule (write-up 002)"
ARMS = ("baseline", "freezing", "clipping", "schedule", "delayed")
MEASURED = ("loss", "accuracy", "gradient_norm", "gradient_norm.mlp", "gradient_norm.classifier")
TESTED = ("test_loss", "test_accuracy", "first_accuracy")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    model: str = option('an encoder: a directory, a hub id, or "bundled-bert"', "bundled-bert")
    data: str = option(
        'folder with train and test, .jsonl or .csv, perhaps .gz; or "bundled"', "bundled"
    )
    seeds: int = option("runs of each arm; below five nothing is decided", 1)
    steps: int = option("updates, T_train", 300)
    batch_size: int = option("reviews in a batch", 16)
    sequence_length: int = option("tokens of a review, the rest is cut", 64)
    lr: float = option("peak rate, eta", 3e-4)
    max_norm: float = option("norm that the gradient is clipped to, c", 1.0)
    clip_from: int | None = option(
        "updates that the delayed arm leaves unclipped, T_0 (default: a third of the steps)", None
    )
    train_rows: int | None = option(
        "reviews to learn from, half of each label (default: all)", None
    )
    test_rows: int | None = option("held-out reviews, half of each label (default: all)", None)
    watched_rows: int = option("those of them that are measured along the way", 200)
    evaluate_every: int = option("steps between two held-out measurements", 10)

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


SOURCES = {"model": "bert-base-uncased", "data": "the IMDB reviews"}
PUBLISHED = {
    "steps": 300,
    "batch_size": 64,
    "sequence_length": 512,
    "lr": 1e-5,
    "max_norm": 1.0,
    "evaluate_every": 10,
}


def parts(settings: Settings) -> list[Part]:
    """What reading nothing achieves, then every arm with every seed."""
    positive(settings, "seeds", "batch_size", "evaluate_every")
    for arm in ARMS:
        settings.training(arm)
    if settings.evaluate_every > settings.steps:
        raise ValueError(
            f"evaluate_every is {settings.evaluate_every}, must be at most steps = {settings.steps}"
        )
    check_encoder(settings.model, settings.sequence_length)
    _watched(settings)
    plan = [Part("unread", unread, (settings,))]
    plan += [
        Part(f"{arm}-{seed}", run, (settings, arm, seed))
        for seed in range(settings.seeds)
        for arm in ARMS
    ]
    return plan


def unread(folder: Path, settings: Settings) -> Result:
    """What counting words tells, and always the same answer; and what the first batch holds."""
    train_rows, test_rows = _rows(settings, 0)
    bag = bag_of_words.accuracy(train_rows, test_rows)
    positives = sum(label for _, label in test_rows)
    first = [label for _, label in _first(settings)]
    return {
        "rows": len(test_rows),
        "train_rows": len(train_rows),
        "bag_of_words": round(bag.value * len(test_rows)),
        "majority": max(positives, len(test_rows) - positives),
        "first_negative": first.count(0),
        "first_positive": first.count(1),
    }


def run(folder: Path, settings: Settings, arm: str, seed: int) -> Result:
    """Trains one arm."""
    before = memory.resident()
    encoder = load_encoder(
        settings.model,
        settings.data,
        settings.sequence_length,
        settings.train_rows,
        settings.test_rows,
        seed,
    )
    model = encoder.model
    if arm != "baseline":
        peft_lite.attach(model, peft_lite.FreezeConfig(freeze=PARTS))
    sets = {
        "test": _batches(encoder, settings, _watched(settings)),
        "first": _batches(encoder, settings, _first(settings)),
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
    config, title = settings.training(arm), f"{arm}, seed {seed}"
    torch.manual_seed(seed)  # of dropout
    tokens = settings.batch_size * settings.sequence_length
    rows = learn(
        folder, title, model, watched.loss, watched.batch, config, tokens, [watched, norms]
    )
    loss, right = score(model, encoder.test_batches())
    _, first_right = score(model, sets["first"])
    return {
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "total": sum(p.numel() for p in model.parameters()),
        "layer": layer,
        "loss": loss,
        "right": round(right.value * len(encoder.test)),
        "first_accuracy": first_right.value,
        "seconds": sum(row["seconds"] for row in rows),
        "memory_bytes": memory.peak() - before,
        "steps": {name: _column(rows, name) for name in MEASURED},
        "tests": {name: _column(rows, name) for name in TESTED},
    }


def gather(settings: Settings, results: Mapping[str, Result]) -> Runs:
    """The runs by their arms."""
    seeds = range(settings.seeds)
    return Runs(
        arms={arm: [results[f"{arm}-{seed}"] for seed in seeds] for arm in ARMS},
        configs={arm: settings.training(arm) for arm in ARMS},
        unread=results["unread"],
        on=ran_on(settings.model, [data_name(settings.data)], settings.seeds),
    )


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Figures, tables and verdicts."""
    runs = gather(settings, results)
    return Report(
        TITLE,
        reports.answer(runs),
        figures.draw(runs, settings.evaluate_every, out / "figures"),
        reports.tables(runs),
        reports.findings(runs),
    )


def _rows(settings: Settings, seed: int) -> tuple[Rows, Rows]:
    return read_rows(settings.data, settings.train_rows, settings.test_rows, seed)


def _watched(settings: Settings) -> Rows:
    """The held-out rows that are measured along the way."""
    return balanced(_rows(settings, 0)[1], settings.watched_rows, 0)


def _first(settings: Settings) -> Rows:
    """The first batch of an unshuffled test set in IMDB's order, negatives first."""
    return sorted(read_parts(settings.data)[1], key=itemgetter(1))[: settings.batch_size]


def _batches(encoder: Encoder, settings: Settings, rows: Rows) -> list[Batch]:
    examples = encode(rows, encoder.tokenizer, settings.sequence_length)
    return list(consecutive_examples(examples, EVALUATED, encoder.pad))


def _column(rows: Sequence[Row], name: str) -> list[float]:
    """A column of the metrics to six digits; `metrics.jsonl` has them all."""
    return [float(f"{row[name]:.6g}") for row in rows if name in row]
