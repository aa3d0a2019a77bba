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

import torch
from torch import nn

import peft_lite
from minigpt.data.text import RandomWindows, consecutive_windows
from minigpt.models.config import positive
from minigpt.objectives.causal import language_model_loss
from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions
from minigpt.settings.options import option
from minigpt.studies import lora_rank_figures as figures
from minigpt.studies import lora_rank_findings as findings
from minigpt.studies.decoders import CARROLL, encode, load_decoder
from minigpt.studies.lab import Part, Result
from minigpt.studies.lora_rank_findings import FULL, RANKS, SHARES, part_name
from minigpt.studies.report import Report
from minigpt.studies.training import learn
from minigpt.studies.words import ran_on
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


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    model: str = option('a decoder: a directory, a hub id, or "bundled"', "bundled")
    text: str = option("the text to learn from, UTF-8, or a bundled tale", CARROLL)
    seeds: int = option("runs of each rank and size; below five nothing is decided", 5)
    steps: int = option("updates", 24)
    batch_size: int = option("windows in a batch", 4)
    sequence_length: int = option("tokens in a window", 64)
    heldout: float = option("share of the text, at its end, that is only measured", 0.2)
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


def parts(settings: Settings) -> list[Part]:
    """One for each seed and data size."""
    positive(settings, "batch_size", "sequence_length")
    if settings.seeds < 2:
        raise ValueError(f"--seeds is {settings.seeds}, an interval needs at least 2")
    if not 0 < settings.heldout < 1:
        raise ValueError(f"--heldout is {settings.heldout}, must lie between 0 and 1")
    for arm in (FULL, str(RANKS[0])):
        settings.training(arm)
    decoder = load_decoder(settings.model)
    if settings.sequence_length > decoder.model.max_tokens:
        raise ValueError(
            f"--sequence-length is {settings.sequence_length}, there are "
            f"{decoder.model.max_tokens} positions for tokens"
        )
    learned, left = encode(decoder, settings.text, settings.heldout)
    list(consecutive_windows(left, settings.sequence_length, settings.batch_size))
    for share in SHARES:
        own = learned[: int(len(learned) * share)]
        RandomWindows(own, settings.sequence_length, settings.batch_size, 0)
    attach(decoder.model, settings, str(RANKS[0]))
    return [
        Part(part_name(share, seed), run, (settings, share, seed))
        for seed in range(settings.seeds)
        for share in SHARES
    ]


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
    learned, left = encode(decoder, settings.text, settings.heldout)
    batches = RandomWindows(learned[: int(len(learned) * share)], length, size, seed)
    heldout = list(consecutive_windows(left, length, size))
    losses, trainable = {}, {}
    for arm in (FULL, *map(str, RANKS)):
        model = deepcopy(decoder.model)
        torch.manual_seed(seed)
        attach(model, settings, arm)
        trainable[arm] = peft_lite.report(model).trainable
        title = f"{'full tuning' if arm == FULL else f'rank {arm}'}, {share} of the text"
        config = settings.training(arm)
        learn(folder / arm, title, model, language_model_loss, batches, config, size * length)
        losses[arm] = evaluate(model, language_model_loss, heldout)
    return {
        "tokens": len(batches.tokens),
        "before": evaluate(decoder.model, language_model_loss, heldout),
        "losses": losses,
        "trainable": trainable,
    }


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Tables, figures and verdicts."""
    found = findings.collect(results, settings.seeds)
    on = ran_on(settings.model, [settings.text], settings.seeds)
    return Report(
        TITLE,
        findings.answer(found),
        figures.draw(found, out / "figures"),
        findings.tables(found),
        findings.findings(found, on),
        {str(share): asdict(size) for share, size in found.items()},
    )
