"""`minigpt classify`: an encoder, labelled rows and a method -> a classifier; its predictions.

    minigpt classify train --model bundled-bert --data rows.jsonl --out runs/mine
    minigpt classify predict --run runs/mine --data more.jsonl

The classes are the labels of the rows, any number of them.  Of each class a share of the rows is
held out, drawn by the seed.
"""

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_lite
from minigpt.checkpoints.config import read_config
from minigpt.checkpoints.directory import load, outline
from minigpt.checkpoints.source import find
from minigpt.commands import confusion
from minigpt.commands.command import Group, Query, Run
from minigpt.commands.tuning import CLASSIFIER_CONFIG, TuningOptions, costs
from minigpt.data.classes import (
    Row,
    class_names,
    class_numbers,
    given_rows,
    read_rows,
    rows_file,
    split_rows,
)
from minigpt.data.tokenizer import Tokenizer
from minigpt.metrics.classification import Matrix, confusion_matrix, macro_f1
from minigpt.metrics.intervals import share
from minigpt.models.architecture import Model
from minigpt.objectives.classify import (
    Example,
    ShuffledExamples,
    classification_loss,
    consecutive_examples,
    encode,
    label_names,
    name_labels,
    new_modules,
    predict,
)
from minigpt.settings import manifest, runs
from minigpt.settings.checks import check_installed
from minigpt.settings.device import DeviceOption
from minigpt.settings.options import option
from minigpt.training import memory
from minigpt.training.progress import progress_bar, say
from minigpt.training.trackers.follow import tracked
from minigpt.training.train import evaluate, train
from peft_lite import report, storage
from peft_lite.tensor_files import read_outline

EVALUATED = 32  # rows in a batch that is only measured
NAME = "classify train"


@dataclass(frozen=True, kw_only=True)
class Train(TuningOptions):
    """The settings of `classify train`."""

    model: str = option('an encoder: a directory, a hub id, or "bundled-bert"')
    data: str = option("labelled rows: .jsonl or .csv, perhaps .gz, or bundled-reviews")
    batch_size: int = option("rows in a batch", 16)
    sequence_length: int = option("tokens of a row, the rest is cut", 128)
    heldout: float = option("share of the rows of each class that is held out, at random", 0.1)


@dataclass(frozen=True, kw_only=True)
class Predict(DeviceOption):
    """The settings of `classify predict`."""

    run: str | None = option("folder of a run of classify train", None)
    model: str | None = option("in its place: a classifier, or the model of --adapter", None)
    adapter: str | None = option("an adapter directory, written here or by HF PEFT", None)
    data: str | None = option(
        "rows as those of train, labelled or not, or bundled-test-reviews", None
    )
    text: list[str] | None = option("in their place: texts", None)
    out: str | None = option("file of the predictions, .jsonl (default: they are printed)", None)

    def __post_init__(self) -> None:
        for one, other in (("run", "model"), ("data", "text")):
            if (getattr(self, one) is None) == (getattr(self, other) is None):
                raise ValueError(f"give either --{one} or --{other}")
        if self.adapter is not None and self.model is None:
            raise ValueError("--adapter needs --model, that it was trained on")
        if self.out is not None and (Path(self.out).exists() or not Path(self.out).parent.is_dir()):
            raise ValueError(f"--out {self.out}: want a new file in a folder that exists")


def train_classifier(settings: Train, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes to OUT `model/` (full, freeze) or `adapter/` (all others), `metrics.jsonl`,
    `confusion.txt`, `confusion.png` and `summary.json`; returns the summary.
    """
    check_installed("matplotlib")
    device = settings.find_device()
    before_model = memory.resident()
    config = settings.with_rate()
    outline(settings.model, head="classification")  # a decoder is refused at once
    rows = read_rows(settings.data, labelled=True)
    names = class_names(rows)
    parts = split_rows(rows, settings.heldout, settings.seed)
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    torch.manual_seed(settings.seed)  # of the new modules, too
    model = load(directory, head="classification", num_labels=len(names), device=device)
    tokenizer.check(model.config.vocab_size)
    if {*label_names(model)} == {*names}:
        names = label_names(model)  # it goes on with its classes
    name_labels(model, names)
    handle = settings.attach(model, new_modules(model))
    _check_new(model)
    learned, rest = (
        _examples(part, class_numbers(part, names), tokenizer, settings.sequence_length)
        for part in parts
    )
    _say_cut([*learned, *rest], settings.sequence_length)
    pad = tokenizer.special.pad
    batches = ShuffledExamples(learned, settings.batch_size, settings.seed, pad)
    heldout = list(consecutive_examples(rest, EVALUATED, pad))
    inputs = {"rows": [rows_file(settings.data)], **manifest.model_files(directory)}
    runs.claim(out, NAME, settings, inputs)

    counts = report(model)
    before = evaluate(model, classification_loss, heldout)
    with (
        progress_bar(settings.method, settings.steps, settings.tokens_a_step) as show,
        tracked(settings.track, out, asdict(settings), show) as observe,
    ):
        steps = train(model, classification_loss, batches, config, out, heldout, resume, observe)
    logits, labels = predict(model, heldout)
    matrix = _confusion(logits, labels)
    accuracy = share(sum(row[i] for i, row in enumerate(matrix)), len(rest))

    result = settings.write(model, handle, tokenizer, directory, out)
    storage.write_text(out / "confusion.txt", confusion.text(matrix, names) + "\n")
    confusion.draw(out / "confusion.png", matrix, names)
    last = steps[-max(1, len(steps) // 10) :]
    summary: dict[str, object] = {
        "method": settings.method,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "train_rows": len(learned),
        "heldout_rows": len(rest),
        "rows_cut": sum(example.cut for example in learned + rest),
        "train_loss": fmean(row["loss"] for row in last),  # of the last tenth of the steps
        "heldout_loss_before": before,
        "heldout_loss_after": F.cross_entropy(logits, labels).item(),
        "heldout_accuracy": accuracy.value,
        "heldout_accuracy_low": accuracy.low,
        "heldout_accuracy_high": accuracy.high,
        "heldout_macro_f1": macro_f1(matrix),
        "heldout_confusion": {"labels": names, "rows": matrix},
        **costs(steps, before_model, result),
        "config": asdict(config),
    }
    runs.complete(out, summary)
    return summary


def predict_rows(settings: Predict) -> None:
    """Prints or writes a line of JSON for each row, the label and the probabilities of all; where
    the rows are labelled, prints how many of the predictions are right.
    """
    device = settings.find_device()
    rows = given_rows(settings.text or ()) if settings.data is None else read_rows(settings.data)
    model, tokenizer, length = _trained(settings, device)
    names = label_names(model)
    labelled = bool(rows[0].label)
    numbers = class_numbers(rows, names) if labelled else [0] * len(rows)  # nobody looks at them
    examples = _examples(rows, numbers, tokenizer, length)
    _say_cut(examples, length)
    batches = consecutive_examples(examples, EVALUATED, tokenizer.special.pad)
    logits, labels = predict(model, batches)
    lines = "".join(_line(p, names) for p in logits.softmax(-1).tolist())
    if settings.out is None:
        print(lines, end="")
    else:
        storage.write_text(Path(settings.out), lines)
    if labelled:
        measured = confusion.text(_confusion(logits, labels), names)
        print(measured, file=sys.stderr if settings.out is None else sys.stdout)


def _line(probabilities: Sequence[float], names: Sequence[str]) -> str:
    rounded = {name: round(p, 6) for name, p in zip(names, probabilities, strict=True)}
    label = names[probabilities.index(max(probabilities))]
    return json.dumps({"label": label, "probabilities": rounded}, ensure_ascii=False) + "\n"


def _trained(settings: Predict, device: torch.device) -> tuple[Model, Tokenizer, int]:
    """A classifier, its tokenizer, and the most tokens of a row that it reads."""
    length: int | None = None
    if settings.run is not None:
        source, adapter, length = _of_run(Path(settings.run))
    else:
        source = find(settings.model or "")
        adapter = None if settings.adapter is None else Path(settings.adapter)
    if adapter is None:
        model = load(source, head="classification", device=device)
        _check_trained(model, source)
    else:
        model = _with_adapter(source, adapter, device)
    tokenizer = Tokenizer.load(source)
    tokenizer.check(model.config.vocab_size)
    return model, tokenizer, length or model.max_tokens


def _of_run(run: Path) -> tuple[Path, Path | None, int]:
    """The model of a complete run, its adapter, and the most tokens of a row.

    Raises:
        ValueError: it is no such run, or its model has changed since.
    """
    if not (run / "run.json").exists():
        raise ValueError(f"{run} holds no run: there is no {run / 'run.json'}")
    stored = runs.settle(Train, NAME, {}, run, resume=True)
    if not (run / "summary.json").exists():
        raise ValueError(f"the run in {run} is not complete: minigpt {NAME} --resume continues it")
    if (run / "model").exists():
        return run / "model", None, stored.sequence_length
    directory = find(stored.model)
    present = manifest.digests(manifest.model_files(directory))
    before = {name: runs.read(run)["inputs"].get(name, {}) for name in present}
    manifest.check_inputs(before, present, run)
    return directory, run / "adapter", stored.sequence_length


def _with_adapter(source: Path, adapter: Path, device: torch.device) -> Model:
    """A model and an adapter on it, which may bring the classifier and the names of its classes."""
    architecture, _, _ = read_config(source)
    end = architecture.names.to_hf("head.classifier.weight")
    safe, old = adapter / "adapter_model.safetensors", adapter / "adapter_model.bin"
    tensors = read_outline(old if old.exists() and not safe.exists() else safe)
    classes = next((t.size(0) for name, t in tensors.items() if name.endswith(end)), None)
    with _quiet():
        model = load(source, head="classification", num_labels=classes, device=device)
    peft_lite.load(model, adapter)
    if classes is None:
        _check_trained(model, source)
    if (adapter / CLASSIFIER_CONFIG).exists():  # HF PEFT writes none
        _, _, raw = read_config(adapter / CLASSIFIER_CONFIG)
        names = raw.get("id2label") or {}
        name_labels(model, [names[i] for i in sorted(names, key=int)])
    return model


def _check_trained(model: Model, source: Path) -> None:
    if model.fresh:
        lacking = ", ".join(sorted(model.fresh))
        raise ValueError(f"{source} is not trained to classify: it lacks {lacking}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that a classifier is new: the adapter brings it, or peft_lite warns."""
    logger = logging.getLogger("minigpt")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _examples(
    rows: Sequence[Row], numbers: Sequence[int], tokenizer: Tokenizer, length: int
) -> list[Example]:
    texts = [row.text for row in rows]
    return encode(zip(texts, numbers, strict=True), tokenizer, length)


def _say_cut(examples: Sequence[Example], length: int) -> None:
    if cut := sum(example.cut for example in examples):
        say(f"{cut:,} of {len(examples):,} rows have more than {length} tokens: the rest is cut")


def _confusion(logits: Tensor, labels: Tensor) -> Matrix:
    return confusion_matrix(labels.tolist(), logits.argmax(-1).tolist(), logits.size(-1))


def _check_new(model: Model) -> None:
    """Raises ValueError where freezing leaves a new module as it was drawn."""
    for name, p in model.named_parameters():
        if name in model.fresh and not p.requires_grad:
            raise ValueError(
                f"{name} is new and would not train: "
                f"--train must name it, and --freeze must not, as in --train {name}"
            )


COMMAND = Group(
    {
        "train": (
            "train a classifier on labelled rows",
            Run(Train, train_classifier, "confusion.txt"),
        ),
        "predict": ("label rows or texts", Query(Predict, predict_rows)),
    }
)
