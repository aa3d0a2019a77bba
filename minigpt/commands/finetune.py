"""`minigpt finetune`: a pretrained model, a text, a method -> an adapter, metrics, a sample.

A decoder learns to predict the next token, an encoder learns to predict masked ones (`--objective`,
minigpt/objectives).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import FORMS, find
from minigpt.commands.command import Run
from minigpt.commands.tuning import TuningOptions, costs
from minigpt.data.tales import text_file, text_of
from minigpt.data.text import split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.objectives.objective import Windows
from minigpt.objectives.registry import OBJECTIVES
from minigpt.settings import runs
from minigpt.settings.manifest import model_files
from minigpt.settings.options import option
from minigpt.training import memory
from minigpt.training.progress import progress_bar, text_bar
from minigpt.training.train import evaluate, train
from peft_lite import report, storage
from peft_lite.quantized import CODECS, is_quantized

PROMPT = 24  # tokens


@dataclass(frozen=True, kw_only=True)
class Finetune(TuningOptions):
    """The command's settings."""

    model: str = option(f"a model: {FORMS}")
    text: str = option("the text to learn from, UTF-8, or bundled-carroll or bundled-poe")
    objective: str = option(
        "clm: a decoder predicts the next token; mlm: an encoder predicts masked tokens",
        "clm",
        choices=tuple(OBJECTIVES),
    )
    quantize: str | None = option("hold the linear layers but the head in 4 bits", None, CODECS)


def finetune(settings: Finetune, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes to OUT `model/` (full, freeze) or `adapter/` (all others), `metrics.jsonl`,
    `sample.txt` and `summary.json`; returns the summary.
    """
    device = settings.find_device()
    before_model = memory.resident()
    config = settings.with_rate()
    text = text_of(settings.text)
    directory = find(settings.model)
    tokenizer = Tokenizer.load(directory)
    objective = OBJECTIVES[settings.objective]
    model = load(directory, objective.head, device=device, quantize=settings.quantize)
    tokenizer.check(model.config.vocab_size)
    if any(map(is_quantized, model.modules())):  # then memory counts more than time
        memory.map_large_blocks()
    with text_bar("tokens of the text", len(text)) as show:
        learned, rest = split_text(text, settings.heldout)
        train_ids = tokenizer.ids(learned, show)
        heldout_ids = tokenizer.ids(rest, lambda done: show(len(learned) + done))
    length, size = settings.sequence_length, settings.batch_size
    batches = objective.batches(Windows(train_ids, tokenizer, length, size, settings.seed))
    windows = Windows(heldout_ids, tokenizer, length, size, settings.seed)
    heldout = list(objective.heldout(windows))
    torch.manual_seed(settings.seed)
    handle = settings.attach(model)
    inputs = {"text": [text_file(settings.text)], **model_files(directory)}
    runs.claim(out, "finetune", settings, inputs)

    counts = report(model)
    before = evaluate(model, objective.loss, heldout, settings.bf16)
    limit = min(PROMPT, model.max_tokens // 2)
    prompt = heldout_ids[None, :limit].to(device)
    sample_before = objective.sample(model, tokenizer, prompt, settings.seed)
    with progress_bar(settings.method, settings.steps, settings.tokens_a_step) as observe:
        rows = train(model, objective.loss, batches, config, out, heldout, resume, observe)
    after = evaluate(model, objective.loss, heldout, settings.bf16)
    sample_after = objective.sample(model, tokenizer, prompt, settings.seed)

    result = settings.write(model, handle, tokenizer, directory, out)
    storage.write_text(
        out / "sample.txt",
        f"--- before ---\n{sample_before}\n\n--- after ---\n{sample_after}\n",
    )
    summary: dict[str, object] = {
        "method": settings.method,
        "trainable_parameters": counts.trainable,
        "total_parameters": counts.total,
        "heldout_loss_before": before,
        "heldout_loss_after": after,
        **costs(rows, before_model, result),
        "config": asdict(config),
    }
    runs.complete(out, summary)
    return summary


COMMAND = Run(Finetune, finetune)
