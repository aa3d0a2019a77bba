"""`minigpt pretrain`: a tokenizer and a model from nothing but texts.

What is learned is the objective's (minigpt/objectives): clm predicts each token from those before
it, mlm predicts masked tokens from those on both sides.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minigpt.checkpoints.directory import save
from minigpt.commands.command import Run
from minigpt.data.tales import text_file, text_of
from minigpt.data.text import IGNORED, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.config import positive
from minigpt.objectives.objective import Windows
from minigpt.objectives.registry import OBJECTIVES
from minigpt.settings import runs
from minigpt.settings.device import DeviceOption
from minigpt.settings.options import option, with_default
from minigpt.settings.sizes import SizeOptions
from minigpt.settings.training import TrainingOptions
from minigpt.training import memory
from minigpt.training.progress import progress_bar, say, text_bar
from minigpt.training.trackers.follow import tracked
from minigpt.training.train import evaluate, train
from peft_lite import storage

WARMUP = 100


@dataclass(frozen=True, kw_only=True)
class Pretrain(SizeOptions, TrainingOptions, DeviceOption):
    """The command's settings."""

    text: list[str] = option("texts to learn from, UTF-8, or bundled-carroll, bundled-poe")
    objective: str = option(
        "; ".join(f"{name}: {objective.about}" for name, objective in OBJECTIVES.items()),
        "clm",
        choices=tuple(OBJECTIVES),
    )
    vocab_size: int = option("tokens to learn", 4096)
    steps: int = with_default(TrainingOptions, "steps", 2000)
    sequence_length: int = option("tokens in a window, and positions of the model", 256)
    lr: float = with_default(TrainingOptions, "lr", 1e-3)
    schedule: str = with_default(TrainingOptions, "schedule", "cosine")
    warmup_steps: int | None = option(  # type: ignore[assignment]
        f"updates of warm-up (default: {WARMUP}, at most a tenth of the steps)", None
    )
    weight_decay: float = with_default(TrainingOptions, "weight_decay", 0.1)
    heldout: float = with_default(TrainingOptions, "heldout", 0.05)
    evaluate_every: int = with_default(TrainingOptions, "evaluate_every", 250)
    snapshot_every: int = with_default(TrainingOptions, "snapshot_every", 250)
    dtype: str = option(
        "of the saved weights", "float32", choices=("float32", "bfloat16", "float16")
    )

    def __post_init__(self) -> None:
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(WARMUP, self.schedule_length // 10))
        super().__post_init__()


def pretrain(settings: Pretrain, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes `OUT/model` (weights, config, tokenizer) and `OUT/summary.json`."""
    device = settings.find_device()
    before_model = memory.resident()
    settings.check_sizes()
    positive(settings, "vocab_size")
    parts = [split_text(text_of(file), settings.heldout) for file in settings.text]
    train_texts, heldout_texts = zip(*parts, strict=True)
    characters = sum(map(len, train_texts))
    say(f"learns {settings.vocab_size:,} tokens from {characters:,} characters")
    objective = OBJECTIVES[settings.objective]
    tokenizer = objective.learn_tokenizer(train_texts, settings.vocab_size)
    torch.manual_seed(settings.seed)
    model = objective.new_model(settings, tokenizer, settings.sequence_length).to(device)

    def windows(texts: tuple[str, ...]) -> Windows:
        length, size = settings.sequence_length, settings.batch_size
        return Windows(_join(texts, tokenizer), tokenizer, length, size, settings.seed)

    say("turns the texts into tokens")
    learned = windows(train_texts)
    batches = objective.batches(learned)
    heldout = list(objective.heldout(windows(heldout_texts)))
    runs.claim(out, "pretrain", settings, {"text": map(text_file, settings.text)})
    with (
        progress_bar("pretrain", settings.steps, settings.tokens_a_step) as show,
        tracked(settings.track, out, asdict(settings), show) as observe,
    ):
        rows = train(model, objective.loss, batches, settings, out, heldout, resume, observe)

    model.to(getattr(torch, settings.dtype))
    written = out / "model.partial"
    save(model, written)
    tokenizer.save(written)
    storage.replace_folder(written, out / "model")
    loss = evaluate(model.float(), objective.loss, heldout)
    summary: dict[str, object] = {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(learned.tokens),
        "seen_tokens": settings.steps * settings.tokens_a_step,
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
    }
    if objective.predicts_every_token:  # then the loss is a code length of the text
        heldout_tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in heldout)
        heldout_bytes = sum(len(text.encode()) for text in heldout_texts)
        bits = loss * heldout_tokens / heldout_bytes / math.log(2)
        summary["heldout_bits_per_byte"] = bits
    summary |= {
        "seconds": sum(row["seconds"] for row in rows),
        "memory_before_model_bytes": before_model,
        "peak_memory_bytes": memory.peak(),
        "config": asdict(settings),
    }
    runs.complete(out, summary)
    return summary


def _join(texts: tuple[str, ...], tokenizer: Tokenizer) -> torch.Tensor:
    """All texts in one row of tokens, (n,), each followed by the end-of-text token."""
    end = torch.tensor([tokenizer.end_of_text], dtype=torch.int32)
    rows = []
    for text in texts:
        with text_bar("tokens of a text", len(text)) as show:
            rows += [tokenizer.ids(text, show), end]
    return torch.cat(rows)


COMMAND = Run(Pretrain, pretrain)
