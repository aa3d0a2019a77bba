"""Write-up 003: what does each method of fine-tuning cost, and what does it give?

An encoder with a classifier learns sentiment under every method of `peft_lite`, under full tuning,
and with the classifier alone, the floor.  With r the share of the parameters that train, the
write-up says, and has no experiment for it:

    T = r T_full        time of a step
    A <= A_full         accuracy, while A for the cost is higher
    fewer parameters:   less variance between seeds, more bias

Here p_s(x) is the probability of "positive" that the model of seed s gives a held-out review x, and
over X reviews and S seeds

    A_s   = share of reviews where p_s is on the label's side of 1/2
    V     = 1/X sum_x variance over s of p_s(x)
    V_s   = S V - (S - 1) V without seed s         jackknife (Tukey 1958): their mean is V
    fit_s = mean loss over training reviews at the end, without dropout: the bias
    worth = (A - chance) / (T / T_full)                           accuracy for the cost

Quality: one part for each seed and method; of one seed all methods have the same reviews, batches
and first classifier.  Cost: peak memory, parameters and bytes on disk, one process for each method;
the time of a step, all methods in one process, in turn on one batch.

Every method trains the classifier too, and the pooler where it is new (encoder_methods.py), and has
the command's defaults (settings/methods.py).  The peak rates by method are for a small encoder;
peft_rates.py searches for them on reviews held out of the training part, never on the test part.
The schedule is linear after a tenth of the steps of warm-up; gradients are clipped to norm 1.
"""

import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import peft_lite
from minigpt.checkpoints.directory import save
from minigpt.models.bert import Bert
from minigpt.models.config import nearest, positive
from minigpt.objectives.classify import (
    ShuffledExamples,
    classification_loss,
    consecutive_examples,
    predict,
)
from minigpt.settings.options import option
from minigpt.studies import peft_methods_figures as figures
from minigpt.studies import peft_methods_findings as findings
from minigpt.studies.encoder_methods import LR, METHODS, attach, new_modules
from minigpt.studies.encoders import (
    EVALUATED,
    Encoder,
    check_encoder,
    data_name,
    load_encoder,
    read_rows,
)
from minigpt.studies.lab import Part, Result
from minigpt.studies.report import Report
from minigpt.studies.timing import in_turn
from minigpt.studies.training import Step, learn
from minigpt.studies.words import ran_on
from minigpt.training import memory
from minigpt.training.train import TrainConfig, evaluate

TITLE = "Methods of fine-tuning (write-up 003)"

# those of write-up 002, since 003 names none; rates as in the papers
SOURCES = {"model": "bert-base-uncased", "data": "the IMDB reviews"}
PUBLISHED = {
    "steps": 300,
    "batch_size": 64,
    "sequence_length": 492,  # 512 positions, of which prompts take 20
    "lr": [
        *("full=1e-5", "freeze=1e-5", "bias=1e-3", "lora=5e-4", "dora=5e-4"),
        *("ia3=3e-3", "bottleneck=3e-4", "prefix=1e-2", "prompt=3e-2", "classifier=1e-3"),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    model: str = option('an encoder: a directory, a hub id, or "bundled-bert"', "bundled-bert")
    data: str = option(
        'folder with train and test, .jsonl or .csv, perhaps .gz; or "bundled"', "bundled"
    )
    seeds: int = option("runs of each method; below five nothing is decided", 3)
    steps: int = option("updates", 100)
    batch_size: int = option("reviews in a batch", 16)
    sequence_length: int = option("tokens of a review, the rest is cut", 64)
    lr: list[str] | None = option(
        "peak rates that are not the default, as in full=5e-5 lora=1e-3 (default: "
        + " ".join(f"{method}={lr:g}" for method, lr in LR.items())
        + ")",
        None,
    )
    train_rows: int | None = option(
        "reviews to learn from, half of each label (default: all)", None
    )
    test_rows: int | None = option("held-out reviews, half of each label (default: all)", None)
    rounds: int = option("times that a step of each method is timed", 10)

    def rates(self) -> dict[str, float]:
        """The peak rate of each method."""
        found = dict(LR)
        for pair in self.lr or ():
            method, _, value = pair.partition("=")
            if method not in LR:
                raise ValueError(
                    f"--lr {pair}: {method!r} must be one of {', '.join(LR)}{nearest(method, LR)}"
                )
            try:
                found[method] = float(value)
            except ValueError:
                raise ValueError(f"--lr {pair}: want a number, as in {method}=1e-3") from None
        return found

    def training(self, method: str) -> TrainConfig:
        """How a method trains."""
        return TrainConfig(
            steps=self.steps,
            lr=self.rates()[method],
            warmup_steps=self.steps // 10,
            snapshot_every=100,
        )

    def encoder(self, seed: int) -> Encoder:
        """The model with a classifier of this seed, and the reviews."""
        rows = (self.train_rows, self.test_rows)
        return load_encoder(self.model, self.data, self.sequence_length, *rows, seed)


def parts(settings: Settings) -> list[Part]:
    """Costs, times, then the qualities, seed by seed."""
    positive(settings, "batch_size")
    for name, least in (("seeds", 3), ("rounds", 2)):
        if getattr(settings, name) < least:
            raise ValueError(
                f"--{name} is {getattr(settings, name)}, an interval needs at least {least}"
            )
    for method in METHODS:
        settings.training(method)
    check_encoder(
        settings.model, settings.sequence_length, peft_lite.PrefixConfig().num_virtual_tokens
    )
    read_rows(settings.data, settings.train_rows, settings.test_rows, 0)
    todo = [Part(f"cost-{method}", cost, (settings, method)) for method in METHODS]
    todo.append(Part("times", times, (settings,)))
    for seed in range(settings.seeds):
        for method in METHODS:
            todo.append(Part(f"{method}-seed-{seed}", quality, (settings, method, seed)))
    return todo


def quality(folder: Path, settings: Settings, method: str, seed: int) -> Result:
    """Trains a method, and measures what was learned."""
    encoder = settings.encoder(seed)
    model = encoder.model
    torch.manual_seed(seed)
    attach(model, method, new_modules(settings.model))
    batches = ShuffledExamples(encoder.train, settings.batch_size, seed, encoder.pad)
    config, title = settings.training(method), f"{method}, seed {seed}"
    tokens = settings.batch_size * settings.sequence_length
    learn(folder, title, model, classification_loss, batches, config, tokens)
    logits, labels = predict(model, encoder.test_batches())
    positives = logits.softmax(-1)[:, 1]
    learned = encoder.train[: len(labels)]
    return {
        # A_s: p_s is on the label's side of 1/2
        "right": int(((positives > 0.5) == labels).sum()),
        "rows": len(labels),
        "chance": labels.bincount().max().item() / len(labels),
        "fit": evaluate(
            model, classification_loss, consecutive_examples(learned, EVALUATED, encoder.pad)
        ),
        "positives": [round(p, 5) for p in positives.tolist()],
    }


def cost(folder: Path, settings: Settings, method: str) -> Result:
    """Parameters of a method, memory of two training steps, and bytes on disk."""
    before = memory.resident()
    encoder = settings.encoder(0)
    model = encoder.model
    handle = attach(model, method, new_modules(settings.model))
    counts = peft_lite.report(model)
    step = first_batch_again(settings, encoder, model)
    for _ in range(2):  # in the second the optimizer's state is there
        step()
    peak, saved = memory.peak(), folder / "saved"
    if handle is None:
        save(model, saved)
    else:
        handle.save(saved)
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    shutil.rmtree(saved)
    return {
        "trainable": counts.trainable,
        "total": counts.total,
        "memory_before_bytes": before,
        "memory_peak_bytes": peak,
        "file_bytes": size,
    }


def times(folder: Path, settings: Settings) -> Result:
    """Seconds of a step of each method, in turn on the same batch."""
    encoder = settings.encoder(0)
    new = new_modules(settings.model)
    sides = {}
    for method in METHODS:
        model = deepcopy(encoder.model)
        attach(model, method, new)
        sides[method] = first_batch_again(settings, encoder, model)
    return in_turn(sides, settings.rounds)


def first_batch_again(settings: Settings, encoder: Encoder, model: Bert) -> Step:
    """The step that all costs are measured on."""
    batch = ShuffledExamples(encoder.train, settings.batch_size, 0, encoder.pad)(0)
    return Step(model, classification_loss, lambda i: batch, TrainConfig(steps=1, lr=1e-6))


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Tables, figures and verdicts."""
    found = findings.outcomes(results, settings.seeds)
    on = ran_on(settings.model, [data_name(settings.data)], settings.seeds)
    return Report(
        TITLE,
        findings.answer(found),
        figures.draw(found, out / "figures"),
        findings.tables(found, settings.rates()),
        findings.findings(found, on),
        {method: asdict(outcome) for method, outcome in found.items()},
    )
