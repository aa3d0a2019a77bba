"""`minigpt pretrain`: a tokenizer and a GPT-Neo from nothing but texts."""

import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minigpt import memory, runs
from minigpt.checkpoint import save
from minigpt.data import RandomWindows, consecutive_windows, read_text, split_text
from minigpt.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.loss import language_model_loss
from minigpt.options import option
from minigpt.progress import progress_bar
from minigpt.schedule import SCHEDULES
from minigpt.tokenizer import Tokenizer
from minigpt.train import TrainConfig, evaluate, train


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """The command's settings."""

    text: list[str] = option("texts to learn from, UTF-8")
    vocab_size: int = option("tokens to learn", 4096)
    hidden_size: int = option("width D", 224)
    num_layers: int = option("blocks, global and local in turn", 4)
    num_heads: int = option("heads H", 7)
    window_size: int = option("what a local block sees", 32)
    dropout: float = option("of embeddings and of what each half block adds", 0.1)
    steps: int = option("updates", 2000)
    batch_size: int = option("windows in a batch", 8)
    sequence_length: int = option("tokens in a window, and positions of the model", 256)
    lr: float = option("peak rate", 1e-3)
    schedule: str = option("course of the rate after warm-up", "cosine", choices=SCHEDULES)
    warmup_steps: int = option("updates of warm-up", 100)
    weight_decay: float = option("AdamW's", 0.1)
    max_norm: float = option("clip the gradient norm to this", 1.0)
    bf16: bool = option("compute in bfloat16 where it is safe", False)
    heldout: float = option("share of each text, at its end, that is only measured", 0.05)
    seed: int = option("of the weights, the windows and dropout", 0)
    evaluate_every: int = option("steps between two held-out losses", 250)
    snapshot_every: int = option("steps between two snapshots to resume from", 250)
    dtype: str = option(
        "of the saved weights", "float32", choices=("float32", "bfloat16", "float16")
    )


def pretrain(settings: Pretrain, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes `OUT/model` (weights, config, tokenizer) and `OUT/summary.json`."""
    before_model = memory.resident()
    parts = [split_text(read_text(Path(file)), settings.heldout) for file in settings.text]
    tokenizer = Tokenizer.train([part for part, _ in parts], settings.vocab_size)
    torch.manual_seed(settings.seed)
    model = GPTNeo(
        GPTNeoConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=settings.sequence_length,
            hidden_size=settings.hidden_size,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            window_size=settings.window_size,
            embed_dropout=settings.dropout,
            resid_dropout=settings.dropout,
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    )
    train_ids, heldout_ids = (_join(texts, tokenizer) for texts in zip(*parts, strict=True))
    batches = RandomWindows(train_ids, settings.sequence_length, settings.batch_size, settings.seed)
    heldout = list(consecutive_windows(heldout_ids, settings.sequence_length, settings.batch_size))
    config = TrainConfig(
        steps=settings.steps,
        lr=settings.lr,
        schedule=settings.schedule,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_norm=settings.max_norm,
        bf16=settings.bf16,
        evaluate_every=settings.evaluate_every,
        snapshot_every=settings.snapshot_every,
    )
    runs.claim(out, "pretrain", settings)
    tokens = settings.batch_size * settings.sequence_length
    with progress_bar("pretrain", settings.steps, tokens) as observe:
        rows = train(model, language_model_loss, batches, config, out, heldout, resume, observe)

    model.to(getattr(torch, settings.dtype))
    written = out / "model.partial"
    save(model, written)
    tokenizer.save(written)
    runs.replace_folder(written, out / "model")
    loss = evaluate(model.float(), language_model_loss, heldout)
    heldout_bytes = sum(len(text.encode()) for _, text in parts)
    summary: dict[str, object] = {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train_ids),
        "seen_tokens": settings.steps * tokens,
        "heldout_loss": loss,
        "heldout_bits_per_byte": loss * (len(heldout_ids) - 1) / heldout_bytes / math.log(2),
        "seconds": sum(row["seconds"] for row in rows),
        "memory_before_model_bytes": before_model,
        "peak_memory_bytes": memory.peak(),
        "config": asdict(settings),
    }
    runs.write(out / "summary.json", summary)
    shutil.rmtree(out / "snapshots", ignore_errors=True)
    return summary


def _join(texts: tuple[str, ...], tokenizer: Tokenizer) -> torch.Tensor:
    """All texts in one row of tokens, (n,), each followed by the end-of-text token."""
    end = tokenizer.end_of_text
    return torch.tensor([i for text in texts for i in [*tokenizer.encode(text), end]])
