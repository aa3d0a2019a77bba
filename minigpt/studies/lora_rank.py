"""Write-up 004: which rank does LoRA need, and where does more of it stop to help?

    W' = W + s B A        A (r, in), B (out, r)        r (in + out) of in x out parameters

A decoder learns a text with LoRA of rank r = 1, 2, 4, ..., 64 on its linear layers, and by full
tuning, from all of the text's training part, its first quarter and its first sixteenth.  Measured
is the mean loss on the held-out end of the text after the last step, in nats a token.  Runs of one
seed and one data size see the same windows in the same order.

The plateau begins at the smallest rank whose difference to the best rank's loss, seed by seed, has
an interval that contains 0.  Such an interval may be wide, so the verdict asks for more: a plateau
is there when some rank below the largest, and every rank above it, is within 5 % of what
fine-tuning gains, with the whole interval.

The scale.  With s = alpha / r, Hu et al. 2021, the update shrinks as r grows, and what looks like a
plateau of the rank may be one of the scale; with alpha = 2 r it grows.  s = alpha / sqrt(r) keeps
it comparable (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732): so it is here, with one alpha
and one rate for all ranks.  Both rates were chosen on the other bundled tale.

The write-up is a survey without an experiment; what it counts, LoRA of rank 8 on a 512 x 64 matrix,
is counted here on such a layer.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import peft_lite
from minigpt.data.tales import CARROLL
from minigpt.data.text import RandomWindows, consecutive_windows
from minigpt.metrics.intervals import Estimate, mean
from minigpt.models.config import positive
from minigpt.objectives.causal import language_model_loss
from minigpt.settings import methods
from minigpt.settings.checks import check_heldout
from minigpt.settings.methods import MethodOptions
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies.claims import Finding, count, decided
from minigpt.studies.counts import lora_counts
from minigpt.studies.decoders import DECODER, check_positions, load_decoder, split_ids
from minigpt.studies.figures import OTHERS, Figures, line, points
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import differences
from minigpt.studies.report import Report, Table
from minigpt.studies.training import at_least, learn
from minigpt.studies.words import moves, ran_on, weights
from minigpt.training.train import TrainConfig, evaluate

TITLE = "The rank of LoRA (write-up 004)"
# those of write-up 001, since 004 names none
SOURCES = {"model": "EleutherAI/gpt-neo-125m", "text": "Alice (Gutenberg 11)"}
PUBLISHED = {
    "steps": 476,
    "batch_size": 16,
    "sequence_length": 256,
    "lr": 1e-3,
    "full_lr": 5e-5,
}
RANKS = (1, 2, 4, 8, 16, 32, 64)
SHARES = (Fraction(1, 16), Fraction(1, 4), Fraction(1))  # of the text's training part
ALL = SHARES[-1]
FULL = "full"
ARMS = (FULL, *map(str, RANKS))
MARGIN = 0.05  # of what fine-tuning gains


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    model: str = option(DECODER, "bundled")
    text: str = option("the text to learn from, UTF-8, or a bundled tale", CARROLL)
    seeds: int = option("runs of each rank and size; below five nothing is decided", 5)
    steps: int = with_default(TrainingOptions, "steps", 24)
    batch_size: int = with_default(TrainingOptions, "batch_size", 4)
    sequence_length: int = with_default(TrainingOptions, "sequence_length", 64)
    heldout: float = with_default(TrainingOptions, "heldout", 0.2)
    target: list[str] | None = option("layers that LoRA stands at (default: all-linear)", None)
    alpha: float = option("of the scale s = alpha / sqrt(r)", 4.0)
    lr: float = option("peak rate of LoRA, at every rank", 1e-2)
    full_lr: float = option("peak rate of full tuning", 1e-3)

    def training(self, arm: str) -> TrainConfig:
        """How a rank, or full tuning, trains."""
        return TrainConfig(
            steps=self.steps,
            lr=self.full_lr if arm == FULL else self.lr,
            warmup_steps=self.steps // 10,
            snapshot_every=100,
        )


# --- runs ---------------------------------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """One for each seed and data size."""
    positive(settings, "batch_size", "sequence_length")
    at_least(settings, 2, "seeds")
    check_heldout(settings.heldout)
    for arm in (FULL, str(RANKS[0])):
        settings.training(arm)
    decoder = load_decoder(settings.model)
    check_positions(decoder, settings.sequence_length)
    learned, left = split_ids(decoder, settings.text, settings.heldout)
    list(consecutive_windows(left, settings.sequence_length, settings.batch_size))
    for share in SHARES:
        beginning = learned[: int(len(learned) * share)]
        RandomWindows(beginning, settings.sequence_length, settings.batch_size, 0)
    attach(decoder.model, settings, str(RANKS[0]))
    return [
        Part(part_name(share, seed), run, (settings, share, seed))
        for seed in range(settings.seeds)
        for share in SHARES
    ]


def part_name(share: Fraction, seed: int) -> str:
    return f"{share.numerator}-of-{share.denominator}-seed-{seed}"


def attach(model: nn.Module, settings: Settings, arm: str) -> None:
    """Full tuning, or LoRA of a rank."""
    model.requires_grad_(True)
    if arm != FULL:
        lora = MethodOptions(
            method="lora",
            target=settings.target or ["all-linear"],
            rank=int(arm),
            alpha=settings.alpha,
        )
        # s = alpha / sqrt(r)
        peft_lite.attach(model, replace(methods.config(lora), use_rslora=True))


def run(folder: Path, settings: Settings, share: Fraction, seed: int) -> Result:
    """Trains at every rank and fully, on the first `share` of the text."""
    length, size = settings.sequence_length, settings.batch_size
    decoder = load_decoder(settings.model)
    learned, left = split_ids(decoder, settings.text, settings.heldout)
    batches = RandomWindows(learned[: int(len(learned) * share)], length, size, seed)
    heldout = list(consecutive_windows(left, length, size))
    losses, trainable = {}, {}
    for arm in ARMS:
        model = deepcopy(decoder.model)
        torch.manual_seed(seed)
        attach(model, settings, arm)
        trainable[arm] = peft_lite.report(model).trainable
        title = f"{'full tuning' if arm == FULL else f'rank {arm}'}, {share} of the text"
        config = settings.training(arm)
        learn(folder / arm, title, model, language_model_loss, batches, config, size * length)
        losses[arm] = evaluate(model, language_model_loss, heldout)
    return {
        "weights": decoder.weights,
        "tokens": len(batches.tokens),
        "before": evaluate(decoder.model, language_model_loss, heldout),
        "losses": losses,
        "trainable": trainable,
    }


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """The losses after learning from one share of the text.

    Attributes:
        tokens: to train on.
        before: held-out loss before, nats a token.
        full: the same after full tuning, by seed.
        losses: after LoRA, by rank, then by seed.
        trainable: number of parameters, by rank.
        whole: the same of full tuning.
    """

    tokens: int
    before: float
    full: list[float]
    losses: dict[int, list[float]]
    trainable: dict[int, int]
    whole: int

    @property
    def best(self) -> int:
        """The rank of the least mean loss."""
        return min(RANKS, key=lambda r: fmean(self.losses[r]))

    @property
    def gain(self) -> float:
        """How far fine-tuning at the best rank lowers the loss."""
        return self.before - fmean(self.losses[self.best])

    def above(self, r: int, other: int) -> Estimate:
        """How much more loss rank r ends with than another, seed by seed."""
        return mean(differences(self.losses[r], self.losses[other]))

    def above_best(self, r: int) -> Estimate:
        return self.above(r, self.best)

    @property
    def plateau(self) -> int:
        """The smallest rank whose difference to the best has an interval that contains 0."""
        gaps = {r: self.above_best(r) for r in RANKS}
        return next(r for r, gap in gaps.items() if gap.low <= 0 <= gap.high)

    def flat_from(self) -> int | None:
        """The smallest rank that, with all ranks above it, is within MARGIN of the best; None: no
        rank is.
        """
        start = None
        for r in reversed(RANKS):
            gap = self.above_best(r)
            if max(-gap.low, gap.high) > MARGIN * self.gain:
                break
            start = r
        return start

    def reaches_plateau(self) -> str:
        """The verdict on the claim that quality reaches a plateau below the largest rank."""
        start, seeds = self.flat_from(), len(self.full)
        if self.gain <= 0:
            return "undecided"
        if start is not None and start < RANKS[-1]:
            return decided("holds", seeds)
        rises = any(self.above_best(r).low > MARGIN * self.gain for r in RANKS[-2:])
        return decided("fails", seeds) if rises else "undecided"


@dataclass(frozen=True)
class Measured:
    """The losses for each share of the text."""

    settings: Settings
    sizes: Mapping[Fraction, Size]
    weights: str = ""  # what the model's were rounded to

    @property
    def all(self) -> Size:
        """With all of the text."""
        return self.sizes[ALL]


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    sizes = {}
    for share in SHARES:
        runs = [results[part_name(share, seed)] for seed in range(settings.seeds)]
        trainable = runs[0]["trainable"]
        sizes[share] = Size(
            tokens=runs[0]["tokens"],
            before=runs[0]["before"],
            full=[run["losses"][FULL] for run in runs],
            losses={r: [run["losses"][str(r)] for run in runs] for r in RANKS},
            trainable={r: trainable[str(r)] for r in RANKS},
            whole=trainable[FULL],
        )
    return Measured(settings, sizes, weights(results))


def of_text(share: Fraction) -> str:
    """A share in words."""
    return f"{'all' if share == ALL else share} of the text"


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    numbers = {str(share): asdict(size) for share, size in m.sizes.items()}
    return Report(TITLE, answer(m), tables(m), findings(m), numbers)


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    size = m.all
    begins = " and ".join(
        f"at rank {small.plateau} with {share} of it ({small.tokens:,} tokens)"
        for share, small in m.sizes.items()
        if share != ALL
    )
    change = size.above(RANKS[-1], RANKS[0])
    return [
        f"With all of the text ({size.tokens:,} tokens) rank {size.best} ends lowest, at "
        f"{mean(size.losses[size.best])} nats a held-out token, after {size.before:.4g} before and "
        f"against {mean(size.full)} of full tuning ({len(size.full)} seeds).",
        f"The plateau, where the difference to the best rank is no longer clear, begins at rank "
        f"{size.plateau}; {begins}.",
        f"From rank {RANKS[0]} to {RANKS[-1]} the trained parameters grow from "
        f"{100 * size.trainable[RANKS[0]] / size.whole:.2g} to "
        f"{100 * size.trainable[RANKS[-1]] / size.whole:.2g} % of full tuning's, and the loss "
        f"{moves(change, len(size.full), ' nats')}; fine-tuning at the best rank gains "
        f"{size.gain:.4g}.",
    ]


def findings(m: Measured) -> list[Finding]:
    """The verdicts."""
    trained, full = lora_counts(512, 64, r=8)
    size, start = m.all, m.all.flat_from()
    flat = "no rank" if start is None else f"rank {start}"
    others = ", ".join(
        f"{of_text(share)} {small.reaches_plateau()}"
        for share, small in m.sizes.items()
        if share != ALL
    )
    return [
        Finding(
            "rank.count",
            f"{trained:,} against {full:,}, {100 * (1 - trained / full):.0f} % fewer",
            count((trained, full), (4_608, 32_768)),
            "a 512 x 64 layer",
        ),
        Finding(
            "rank.plateau",
            f"the difference to rank {size.best}, the best, contains 0 at rank {size.plateau}; "
            f"within 5 % of the gain of fine-tuning from {flat} on",
            size.reaches_plateau(),
            ran_on(m.settings.model, [m.settings.text], m.settings.seeds, m.weights),
            f"With all of the text. With less of it: {others}. The scale is alpha / sqrt(r): with "
            "alpha / r larger ranks would be held back.",
        ),
    ]


def tables(m: Measured) -> list[Table]:
    """Losses, and differences to the best rank."""
    sizes, titles = m.sizes.values(), [of_text(share) for share in m.sizes]
    losses = [
        ["before", "0", *(f"{size.before:.4g}" for size in sizes)],
        *(
            [f"{r}", f"{m.all.trainable[r]:,}", *(f"{mean(size.losses[r])}" for size in sizes)]
            for r in RANKS
        ),
        ["full", f"{m.all.whole:,}", *(f"{mean(size.full)}" for size in sizes)],
    ]
    tokens = [f"{of_text(share)} {size.tokens:,}" for share, size in m.sizes.items()]
    return [
        Table(
            "Held-out loss, nats a token",
            ["rank", "trains", *titles],
            losses,
            "Mean over seeds with Student's interval. Tokens to train on: " + ", ".join(tokens),
        ),
        Table(
            "Loss above the best rank's, nats a token",
            ["rank", *titles],
            [[f"{r}", *(f"{size.above_best(r)}" for size in sizes)] for r in RANKS],
            "Seed by seed, mean and interval; the best rank's own is 0.",
        ),
    ]


# --- figures ------------------------------------------------------------------------------------

STYLES = dict(zip(SHARES, OTHERS[:3], strict=True))
GREY = "#444444"


def draw(m: Measured, figures: Figures) -> None:
    """All figures; a data size looks the same in both."""
    with figures.add(
        "rank.png",
        "Held-out loss against the rank; bars are 95 % intervals over seeds, thin horizontal "
        "lines full tuning on as much of the text.",
    ) as axes:
        for share, size in m.sizes.items():
            losses = [mean(size.losses[r]) for r in RANKS]
            points(axes, RANKS, losses, label=of_text(share), **STYLES[share])
            axes.axhline(mean(size.full).value, linewidth=0.8, **line(STYLES[share]))
        axes.axhline(m.all.before, color=GREY, linestyle=":", label="before")
        axes.plot([], [], color=GREY, linewidth=0.8, label="full tuning, same colour")
        rank_axis(axes)
        axes.set(ylabel="held-out loss (nats a token)")
        axes.legend()
    with figures.add(
        "gap.png",
        "Loss above that of the best rank, seed by seed, with 95 % intervals. Circled: "
        "where the plateau begins; dotted: 5 % of what fine-tuning gains.",
        width=10,
        height=3.6,
        ncols=len(SHARES),
    ) as panels:
        for axes, (share, size) in zip(panels, m.sizes.items(), strict=True):
            points(axes, RANKS, [size.above_best(r) for r in RANKS], label="", **STYLES[share])
            circle = {"marker": "o", "markersize": 14, "fillstyle": "none"}
            height = size.above_best(size.plateau).value
            axes.plot(size.plateau, height, color=STYLES[share]["color"], **circle)
            axes.axhline(0, color=GREY, linewidth=0.8)
            if size.gain > 0:
                axes.axhline(MARGIN * size.gain, color=GREY, linestyle=":", linewidth=0.8)
            rank_axis(axes)
            axes.set(title=of_text(share))
        panels[0].set(ylabel="loss above the best rank's\n(nats a token)")


def rank_axis(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.set(xlabel="rank r")
