"""Write-up 001: what is saved, and what forgotten, when attention and embeddings are frozen?

    theta_i <- theta_i - eta AdamW(g)_i    for i in T;    all other theta_i stay, to the bit

    full        T is everything
    intended    T is the MLPs and the layer norms: no name with `attn`, `wte` or `wpe` in it
    literal     the write-up's own test, `"attn" in name or "embed" in name` is frozen

GPT-Neo's checkpoints call its embeddings `wte` and `wpe`.  The literal test misses them without a
word: of 125,198,592 parameters it trains 96,877,824, the intended rule 56,707,584.

One model for each of two texts.  Both are held against both sets of popular tokens (the 100 most
frequent tokens of a text that are longer than two characters):

    p(model, set)    share of sampled tokens in the set, before and after
    p(text, set)     the same of the text itself, which an imitator approaches

Forgetting is the rise of the loss on the text the model was pretrained on.  Where that text is not
at hand the untouched model writes one itself, x ~ p_0; the rise of the loss on it estimates

    E_x [log p_0(x) - log p(x)] / T = KL(p_0 || p) / T

As published: AdamW 5e-5, neither schedule nor clipping, 476 batches of 16 random windows of 256
tokens of Alice (Gutenberg 11) or Poe's second volume (Gutenberg 2148).

What differs: several seeds; full tuning beside it, which the claims compare with; memory, times and
the check that frozen tensors stay are measured, each in a process of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.data.text import Batch, RandomWindows, consecutive_windows
from minigpt.generation import generate
from minigpt.metrics.intervals import longer_than, popular_tokens
from minigpt.models.config import positive
from minigpt.objectives.causal import language_model_loss
from minigpt.settings.options import option
from minigpt.studies.decoders import CARROLL, POE, Decoder, load_decoder, sample, starts
from minigpt.studies.lab import Part, Result
from minigpt.studies.report import Report
from minigpt.studies.timing import in_turn
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
from minigpt.training import memory
from minigpt.training.snapshot import fingerprint
from minigpt.training.train import evaluate

TITLE = "Partial fine-tuning: attention and embeddings frozen"
SOURCES = {
    "model": "EleutherAI/gpt-neo-125m",
    "text": "Alice (Gutenberg 11)",
    "text2": "Poe's second volume (Gutenberg 2148)",
}
PUBLISHED: Mapping[str, Any] = {
    "steps": 476,
    "batch_size": 16,
    "sequence_length": 256,
    "lr": 5e-5,
    "popular": 100,
}
RULES: Mapping[str, Rule] = {
    "full": lambda name: True,
    "intended": lambda name: not ("attn" in name or "wte" in name or "wpe" in name),
    "literal": lambda name: not ("attn" in name or "embed" in name),
}
TEXTS = ("text", "text2")
LONGER = 2  # characters of a token that may be popular
WINDOWS = 16  # windows of a text that a loss is measured on
MEASURED_STEPS = 3  # whose peak memory is taken


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of `minigpt study partial-freezing`."""

    model: str = option('a decoder: a directory, a hub id, or "bundled"', "bundled")
    text: str = option("the first text, UTF-8, or a bundled tale", CARROLL)
    text2: str = option("the second text", POE)
    pretraining_text: str | None = option(
        "what the model was pretrained on (default: what the untouched model writes)", None
    )
    seeds: int = option("runs of each model; verdicts need five", 2)
    steps: int = option("batches", 40)
    batch_size: int = option("windows in a batch", 8)
    sequence_length: int = option("tokens in a window", 128)
    lr: float = option("rate of AdamW", 3e-4)
    weight_decay: float = option("AdamW's", 0.01)
    popular: int = option("how many of a text's most frequent tokens are popular", 100)
    starts: int = option("random start tokens", 10)
    tokens: int = option("tokens sampled after each start", 100)
    rounds: int = option("measurements of each time, in turn", 11)


def parts(settings: Settings) -> list[Part]:
    """A run for each seed, text and rule (the literal one on the first text only), and parts that
    take memory and times.

    Raises:
        ValueError: the model is no decoder, a text is too short, or a setting makes no sense.
    """
    positive(settings, "seeds", "batch_size", "sequence_length", "starts", "tokens", "popular")
    for name, value in (("steps", settings.steps), ("rounds", settings.rounds)):
        if value < 2:
            raise ValueError(f"{name} is {value}, must be at least 2")
    constant_rate(settings.steps, settings.lr, settings.weight_decay)
    decoder = load_decoder(settings.model, "cpu")
    check_length(decoder, settings.sequence_length, settings.tokens)
    for ids in both_texts(decoder, settings).values():
        popular_set(decoder, ids, settings)
        random_windows(ids, settings, 0)
    if settings.pretraining_text is not None:
        some_windows(token_ids(decoder, settings.pretraining_text), settings)
    runs = [
        Part(f"{arm}-{own}-{seed}", run, (settings, arm, own, seed))
        for seed in range(settings.seeds)
        for own in TEXTS
        for arm in RULES
        if (arm, own) != ("literal", "text2")
    ]
    memories = [
        Part(f"memory-{arm}-{seed}", peak_memory, (settings, arm))
        for seed in range(settings.seeds)
        for arm in RULES
    ]
    times = [Part("time", step_times, (settings,)), Part("inference", inference, (settings,))]
    return [*runs, *memories, *times]


def both_texts(decoder: Decoder, settings: Settings) -> dict[str, Tensor]:
    """Token ids of the two texts."""
    return {own: token_ids(decoder, getattr(settings, own)) for own in TEXTS}


def popular_set(decoder: Decoder, ids: Tensor, settings: Settings) -> set[int]:
    """The popular tokens of a text."""
    longer = longer_than(LONGER, decoder.tokenizer.decode)
    return popular_tokens(ids.tolist(), settings.popular, longer)


def random_windows(ids: Tensor, settings: Settings, seed: int) -> RandomWindows:
    """What a model learns from."""
    return RandomWindows(ids, settings.sequence_length, settings.batch_size, seed)


def some_windows(ids: Tensor, settings: Settings) -> list[Batch]:
    """The first windows of a text, side by side."""
    ids = ids[: WINDOWS * settings.sequence_length + 1]
    return list(consecutive_windows(ids, settings.sequence_length, settings.batch_size))


def pretraining_windows(
    decoder: Decoder, texts: Mapping[str, Tensor], settings: Settings
) -> list[Batch]:
    """The first windows of the pretraining text, or what the model itself writes after tokens of
    the two texts, drawn from the whole of its distribution: the same for all runs.
    """
    if settings.pretraining_text is not None:
        return some_windows(token_ids(decoder, settings.pretraining_text), settings)
    prompts = starts(torch.cat([*texts.values()]), WINDOWS, 0).to(decoder.device)
    random = torch.Generator(decoder.device).manual_seed(0)
    tokens = settings.sequence_length - 1
    ids = generate(decoder.model, prompts, tokens, generator=random).cpu()
    written = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    size = settings.batch_size
    return [{k: v[i : i + size] for k, v in written.items()} for i in range(0, WINDOWS, size)]


def run(folder: Path, settings: Settings, arm: str, own: str, seed: int) -> Result:
    """One model tuned on one text: losses on all texts and popular tokens of both, before and
    after; and what moved.
    """
    decoder = load_decoder(settings.model)
    model = decoder.model
    tensors = train_only(model, RULES[arm])
    frozen = fingerprint(model)
    texts = both_texts(decoder, settings)
    windows = {name: some_windows(ids, settings) for name, ids in texts.items()}
    windows["pretraining"] = pretraining_windows(decoder, texts, settings)
    sets = {name: popular_set(decoder, ids, settings) for name, ids in texts.items()}
    prompts = starts(torch.cat([*texts.values()]), settings.starts, seed)

    def measured() -> Result:
        ids = sample(decoder, prompts, settings.tokens, seed)
        shares = {name: sum(i in chosen for i in ids) / len(ids) for name, chosen in sets.items()}
        losses = {name: evaluate(model, language_model_loss, w) for name, w in windows.items()}
        return {"popular": shares, "loss": losses}

    before = measured()
    config = constant_rate(settings.steps, settings.lr, settings.weight_decay)
    rows = tune(folder, decoder, random_windows(texts[own], settings, seed), config)
    return {
        "tensors": tensors,
        "trainable": trainable(model),
        "total": sum(p.numel() for p in model.parameters()),
        "loss": [row["loss"] for row in rows],
        "seconds": sum(row["seconds"] for row in rows),
        "before": before,
        "after": measured(),
        "texts": {
            name: {n: sum(i in s for i in ids.tolist()) / len(ids) for n, s in sets.items()}
            for name, ids in texts.items()
        },
        "frozen_to_the_bit": fingerprint(model) == frozen,
        **moved(decoder, settings.model),
    }


def moved(decoder: Decoder, source: str) -> Result:
    """How far tensors lie from where they started: the most of the frozen, the least of the
    trained ones; None where there are none.
    """
    start = dict(load_decoder(source).model.named_parameters())
    distance = {
        name: (p.detach() - start[name].detach()).norm().item()
        for name, p in decoder.model.named_parameters()
    }
    trains = {name for name, p in decoder.model.named_parameters() if p.requires_grad}
    frozen = [d for name, d in distance.items() if name not in trains]
    return {
        "frozen_moved": max(frozen, default=None),
        "trained_moved": min(distance[name] for name in trains),
    }


def peak_memory(folder: Path, settings: Settings, arm: str) -> Result:
    """Bytes: what a few steps take above what the process held before the model, and the state of
    the optimizer.
    """
    if torch.cuda.is_available():
        torch.cuda.init()  # from here on the GPU's bytes are counted
    before = memory.resident()
    step = stepper(load_decoder(settings.model), settings, arm)
    for _ in range(MEASURED_STEPS):
        step()
    states = step.optimizer.state.values()
    state = sum(value.nbytes for entries in states for value in entries.values() if value.dim())
    return {"peak": memory.peak() - before, "optimizer": state}


def step_times(folder: Path, settings: Settings) -> Result:
    """Seconds of a step under each rule, in turn."""
    sides = {arm: stepper(load_decoder(settings.model), settings, arm) for arm in RULES}
    return {"seconds": in_turn(sides, settings.rounds)}


def inference(folder: Path, settings: Settings) -> Result:
    """Seconds of sampling from the untouched model and from a tuned one, in turn.  A few updates
    make it: what a model is made of does not depend on how many.
    """
    untouched, tuned = (load_decoder(settings.model) for _ in range(2))
    step = stepper(tuned, settings, "intended")
    for _ in range(MEASURED_STEPS):
        step()
    prompts = starts(token_ids(untouched, settings.text), settings.starts, 0)
    seconds = in_turn(
        {
            "untouched": lambda: sample(untouched, prompts, settings.tokens, 0),
            "tuned": lambda: sample(tuned, prompts, settings.tokens, 0),
        },
        settings.rounds,
    )
    shapes = [{n: t.shape for n, t in d.model.state_dict().items()} for d in (untouched, tuned)]
    return {"seconds": seconds, "same_tensors": shapes[0] == shapes[1]}


def stepper(decoder: Decoder, settings: Settings, arm: str) -> Step:
    """Steps on the first text."""
    train_only(decoder.model, RULES[arm])
    config = constant_rate(settings.steps, settings.lr, settings.weight_decay)
    batches = random_windows(token_ids(decoder, settings.text), settings, 0)
    return Step(decoder.model, language_model_loss, batches, config)


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Figures, tables and verdicts."""
    from minigpt.studies import partial_freezing_report

    return partial_freezing_report.report(settings, results, out)
