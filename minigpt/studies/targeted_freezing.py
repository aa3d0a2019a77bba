"""Write-up 000: how does a model learn when only query, key and value of its upper blocks train?

    full       theta_A <- theta_A - eta AdamW(g)    everything trains
    frozen     theta_B <- the same in T alone       T: q, k, v of blocks L/2 to L - 1
    inverse    theta_C <- the same outside T        exactly T is frozen

from one start, theta_A(0) = theta_B(0) = theta_C(0), on the same batches in the same order.  Of
GPT-Neo-125M's 12 blocks T holds those of blocks 6 to 11, 10,616,832 of 125,198,592 parameters.

    p             share of sampled tokens among the 100 most frequent ones of the text,
                  Delta p = p after - p before
    |W_t - W_t-1| Frobenius norm of each step's change of the key weight of block L/2
    r             (T_full - T_frozen) / T_full, the saving of time

As published: AdamW 5e-4 with weight decay 0.01, neither schedule nor clipping, 474 batches of 16
random windows of 256 tokens of Moby-Dick; 10 random start tokens, 100 sampled after each, top-k 50.

What differs: several seeds; the same starts and the same random numbers before and after and for
all models, so that equal weights give equal samples (with others each time, as in the write-up,
p moves by some points of its own: `fresh`); times taken in turn, besides the sums over the runs.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.data.text import RandomWindows
from minigpt.metrics.intervals import popular_tokens
from minigpt.models.config import positive
from minigpt.models.gpt_neo import GPTNeo
from minigpt.objectives.causal import language_model_loss
from minigpt.settings.options import option
from minigpt.studies.decoders import CARROLL, load_decoder, popularity, starts
from minigpt.studies.lab import Part, Result
from minigpt.studies.probes import WeightChange
from minigpt.studies.report import Report
from minigpt.studies.timing import Seconds, in_turn
from minigpt.studies.training import Step
from minigpt.studies.tuning import (
    Rule,
    check_length,
    constant_rate,
    token_ids,
    train_only,
    trainable,
    tune,
)
from minigpt.training.snapshot import fingerprint

TITLE = "Targeted freezing: query, key and value of the upper blocks"
SOURCES = {"model": "EleutherAI/gpt-neo-125m", "text": "Moby-Dick (Gutenberg 2701)"}
PUBLISHED: Mapping[str, Any] = {
    "steps": 474,
    "batch_size": 16,
    "sequence_length": 256,
    "lr": 5e-4,
    "weight_decay": 0.01,
    "popular": 100,
    "starts": 10,
    "tokens": 100,
}
ARMS = ("full", "frozen", "inverse")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `minigpt study targeted-freezing`."""

    model: str = option('a decoder: a directory, a hub id, or "bundled"', "bundled")
    text: str = option("the text to learn from, UTF-8, or a bundled tale", CARROLL)
    seeds: int = option("runs of each model; verdicts need five", 2)
    steps: int = option("batches", 60)
    batch_size: int = option("windows in a batch", 8)
    sequence_length: int = option("tokens in a window", 128)
    lr: float = option("rate of AdamW", 5e-4)
    weight_decay: float = option("AdamW's", 0.01)
    popular: int = option("how many of the text's most frequent tokens are popular", 100)
    starts: int = option("random start tokens", 10)
    tokens: int = option("tokens sampled after each start", 100)
    rounds: int = option("steps of each model whose time is taken, in turn", 15)


def middle(model: GPTNeo) -> int:
    """Number of the first block of the upper half."""
    return model.config.num_layers // 2


def rule(model: GPTNeo, arm: str) -> Rule:
    """Which parameters train, by the names in the checkpoint."""
    pattern = re.compile(r"transformer\.h\.(\d+)\.attn\.attention\.[qkv]_proj\.weight")

    def targeted(name: str) -> bool:
        match = pattern.fullmatch(name)
        return match is not None and int(match[1]) >= middle(model)

    rules: dict[str, Rule] = {
        "full": lambda name: True,
        "frozen": targeted,
        "inverse": lambda name: not targeted(name),
    }
    return rules[arm]


def parts(settings: Settings) -> list[Part]:
    """A run for each seed and model, and one part that takes times.

    Raises:
        ValueError: the model is no decoder, the text is too short, or a setting makes no sense.
    """
    positive(settings, "seeds", "batch_size", "sequence_length", "starts", "tokens", "popular")
    for name, value in (("steps", settings.steps), ("rounds", settings.rounds)):
        if value < 2:
            raise ValueError(f"{name} is {value}, must be at least 2")
    constant_rate(settings.steps, settings.lr, settings.weight_decay)
    decoder = load_decoder(settings.model, "cpu")
    check_length(decoder, settings.sequence_length, settings.tokens)
    ids = token_ids(decoder, settings.text)
    popular_tokens(ids.tolist(), settings.popular)
    RandomWindows(ids, settings.sequence_length, settings.batch_size, 0)
    runs = [
        Part(f"{arm}-{seed}", run, (settings, arm, seed))
        for seed in range(settings.seeds)
        for arm in ARMS
    ]
    return [*runs, Part("time", times, (settings,))]


def run(folder: Path, settings: Settings, arm: str, seed: int) -> Result:
    """One model of one seed: losses, weight changes, and popular tokens before and after."""
    decoder = load_decoder(settings.model)
    model = decoder.model
    start = fingerprint(model.requires_grad_(False))
    tensors = train_only(model, rule(model, arm))
    ids = token_ids(decoder, settings.text)
    popular = popular_tokens(ids.tolist(), settings.popular)

    def p(seed: int) -> float:
        prompts = starts(ids, settings.starts, seed)
        return popularity(decoder, prompts, settings.tokens, popular, seed).value

    before, fresh = p(seed), p(1000 * (seed + 1) + ARMS.index(arm))
    key: Any = model.get_submodule(f"blocks.{middle(model)}.attention.key")
    rows = tune(
        folder,
        decoder,
        RandomWindows(ids, settings.sequence_length, settings.batch_size, seed),
        constant_rate(settings.steps, settings.lr, settings.weight_decay),
        [WeightChange(key.weight)],
    )
    return {
        "start": start,
        "tensors": tensors,
        "trainable": trainable(model),
        "total": sum(parameter.numel() for parameter in model.parameters()),
        "block": middle(model),
        "loss": [row["loss"] for row in rows],
        "weight_change": [row["weight_change"] for row in rows],
        "seconds": sum(row["seconds"] for row in rows),
        "before": before,
        "fresh": fresh,
        "after": p(seed),
        "text": sum(token in popular for token in ids.tolist()) / len(ids),
    }


def times(folder: Path, settings: Settings) -> Result:
    """Seconds of a step of each model, in turn."""
    config = constant_rate(settings.steps, settings.lr, settings.weight_decay)
    sides = {}
    for arm in ARMS:
        decoder = load_decoder(settings.model)
        train_only(decoder.model, rule(decoder.model, arm))
        ids = token_ids(decoder, settings.text)
        batches = RandomWindows(ids, settings.sequence_length, settings.batch_size, 0)
        sides[arm] = Step(decoder.model, language_model_loss, batches, config)
    seconds: Seconds = in_turn(sides, settings.rounds)
    return {"seconds": seconds}


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Figures, tables and verdicts."""
    from minigpt.studies import targeted_freezing_report

    return targeted_freezing_report.report(settings, results, out)
