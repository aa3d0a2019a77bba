"""`minigpt finetune`: a pretrained decoder, a text, a method -> an adapter, metrics, a sample."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from minigpt.checkpoints.directory import load
from minigpt.checkpoints.source import find
from minigpt.commands.command import Run
from minigpt.commands.tuning import TuningOptions, costs
from minigpt.data.tales import text_file, text_of
from minigpt.data.text import RandomWindows, consecutive_windows, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.generation import generate
from minigpt.models.architecture import Decoder
from minigpt.objectives.causal import language_model_loss
from minigpt.settings import runs
from minigpt.settings.manifest import model_files
from minigpt.settings.options import option
from minigpt.training import memory
from minigpt.training.progress import progress_bar, text_bar
from minigpt.training.train import evaluate, train
from peft_lite import report, storage

PROMPT, SAMPLE = 24, 120  # tokens


@dataclass(frozen=True, kw_only=True)
class Finetune(TuningOptions):
    """The command's settings."""

    model: str = option('a model directory, a .gguf file, a hub id, "bundled" or "smollm2"')
    text: str = option("the text to learn from, UTF-8, or bundled-carroll or bundled-poe")


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
    model = load(directory, head="causal-lm", device=device)
    tokenizer.check(model.config.vocab_size)
    with text_bar("tokens of the text", len(text)) as show:
        learned, rest = split_text(text, settings.heldout)
        train_ids = tokenizer.ids(learned, show)
        heldout_ids = tokenizer.ids(rest, lambda done: show(len(learned) + done))
    length, size = settings.sequence_length, settings.batch_size
    batches = RandomWindows(train_ids, length, size, settings.seed)
    heldout = list(consecutive_windows(heldout_ids, length, size))
    torch.manual_seed(settings.seed)
    handle = settings.attach(model)
    inputs = {"text": [text_file(settings.text)], **model_files(directory)}
    runs.claim(out, "finetune", settings, inputs)

    counts = report(model)
    before = evaluate(model, language_model_loss, heldout, settings.bf16)
    limit = min(PROMPT, model.max_tokens // 2)
    prompt = heldout_ids[None, :limit].to(device)
    sample_before = _sample(model, tokenizer, prompt, settings.seed)
    with progress_bar(settings.method, settings.steps, settings.tokens_a_step) as observe:
        rows = train(model, language_model_loss, batches, config, out, heldout, resume, observe)
    after = evaluate(model, language_model_loss, heldout, settings.bf16)
    sample_after = _sample(model, tokenizer, prompt, settings.seed)

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


def _sample(model: Decoder, tokenizer: Tokenizer, prompt: Tensor, seed: int) -> str:
    """The beginning of the held-out text, continued by the model."""
    new = min(SAMPLE, model.max_tokens - prompt.size(1))
    random = torch.Generator(prompt.device).manual_seed(seed)
    ids = generate(model, prompt, new, temperature=0.8, top_k=50, generator=random)
    return tokenizer.decode(ids[0].tolist())


COMMAND = Run(Finetune, finetune)
