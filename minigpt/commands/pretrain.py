"""`minigpt pretrain`: a tokenizer and a model from nothing but texts.

clm    GPT-Neo predicts each token from those before it          (minigpt/data/text.py)
mlm    Bert predicts masked tokens from those on both sides      (minigpt/objectives/masked.py)
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minigpt.checkpoints.directory import save
from minigpt.data.text import Batch, RandomWindows, consecutive_windows, read_text, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.bert import Bert, BertConfig
from minigpt.models.config import positive
from minigpt.models.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.objectives.causal import IGNORED, language_model_loss
from minigpt.objectives.masked import (
    MaskedWindows,
    Masking,
    fixed_masked_windows,
    masked_language_model_loss,
    start_local,
)
from minigpt.settings import runs
from minigpt.settings.options import option
from minigpt.training import memory
from minigpt.training.progress import progress_bar
from minigpt.training.schedule import SCHEDULES
from minigpt.training.train import Loss, TrainConfig, evaluate, train

WINDOW = 32


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """The command's settings."""

    text: list[str] = option("texts to learn from, UTF-8")
    objective: str = option(
        "clm: a GPT-Neo that predicts the next token; mlm: a Bert that predicts masked ones",
        "clm",
        choices=("clm", "mlm"),
    )
    vocab_size: int = option("tokens to learn", 4096)
    hidden_size: int = option("width D", 224)
    num_layers: int = option("blocks; of clm, global and local in turn", 4)
    num_heads: int = option("heads H", 7)
    window_size: int | None = option(f"clm: what a local block sees (default: {WINDOW})", None)
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


@dataclass(frozen=True)
class _Task:
    """What an objective trains, and on what."""

    tokenizer: Tokenizer
    model: GPTNeo | Bert
    loss: Loss
    batches: Callable[[int], Batch]
    heldout: list[Batch]
    train_tokens: int


def pretrain(settings: Pretrain, out: Path, resume: bool) -> dict[str, object]:
    """Trains and writes `OUT/model` (weights, config, tokenizer) and `OUT/summary.json`."""
    before_model = memory.resident()
    if not 0 < settings.heldout < 1:
        raise ValueError(f"--heldout is {settings.heldout}, must lie between 0 and 1")
    positive(settings, "vocab_size", "batch_size", "sequence_length")
    if not 0 <= settings.seed < 2**63:
        raise ValueError(f"--seed is {settings.seed}, must lie in [0, 2^63)")
    parts = [split_text(read_text(Path(file)), settings.heldout) for file in settings.text]
    learned, heldout = zip(*parts, strict=True)
    task = OBJECTIVES[settings.objective](settings, learned, heldout)
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
        rows = train(
            task.model, task.loss, task.batches, config, out, task.heldout, resume, observe
        )

    model = task.model
    model.to(getattr(torch, settings.dtype))
    written = out / "model.partial"
    save(model, written)
    task.tokenizer.save(written)
    runs.replace_folder(written, out / "model")
    loss = evaluate(model.float(), task.loss, task.heldout)
    summary: dict[str, object] = {
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": task.train_tokens,
        "seen_tokens": settings.steps * tokens,
        "heldout_loss": loss,
        "heldout_perplexity": math.exp(loss),
    }
    if settings.objective == "clm":  # the loss over masked tokens is no code length of the text
        heldout_tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in task.heldout)
        heldout_bytes = sum(len(text.encode()) for text in heldout)
        bits = loss * heldout_tokens / heldout_bytes / math.log(2)
        summary["heldout_bits_per_byte"] = bits
    summary |= {
        "seconds": sum(row["seconds"] for row in rows),
        "memory_before_model_bytes": before_model,
        "peak_memory_bytes": memory.peak(),
        "config": asdict(settings),
    }
    runs.write(out / "summary.json", summary)
    shutil.rmtree(out / "snapshots", ignore_errors=True)
    return summary


def _clm(settings: Pretrain, learned: tuple[str, ...], heldout: tuple[str, ...]) -> _Task:
    tokenizer = Tokenizer.train(learned, settings.vocab_size)
    torch.manual_seed(settings.seed)
    model = GPTNeo(
        GPTNeoConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=settings.sequence_length,
            hidden_size=settings.hidden_size,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            window_size=WINDOW if settings.window_size is None else settings.window_size,
            embed_dropout=settings.dropout,
            resid_dropout=settings.dropout,
            bos_token_id=tokenizer.end_of_text,
            eos_token_id=tokenizer.end_of_text,
        )
    )
    length, size = settings.sequence_length, settings.batch_size
    tokens = _join(learned, tokenizer)
    return _Task(
        tokenizer,
        model,
        language_model_loss,
        RandomWindows(tokens, length, size, settings.seed),
        list(consecutive_windows(_join(heldout, tokenizer), length, size)),
        len(tokens),
    )


def _mlm(settings: Pretrain, learned: tuple[str, ...], heldout: tuple[str, ...]) -> _Task:
    if settings.window_size is not None:
        raise ValueError("--window-size belongs to --objective clm, not mlm")
    tokenizer = Tokenizer.train_word_piece(learned, settings.vocab_size)
    torch.manual_seed(settings.seed)
    model = Bert(
        BertConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=settings.sequence_length,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            intermediate_size=4 * settings.hidden_size,
            hidden_dropout_prob=settings.dropout,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.special.pad,
        ),
        head="masked-lm",
    )
    start_local(model)
    length, size = settings.sequence_length, settings.batch_size
    masking = Masking(tokenizer.special, tokenizer.vocab_size)
    tokens = _join(learned, tokenizer)
    return _Task(
        tokenizer,
        model,
        masked_language_model_loss,
        MaskedWindows(tokens, length, size, settings.seed, masking),
        list(fixed_masked_windows(_join(heldout, tokenizer), length, size, masking)),
        len(tokens),
    )


OBJECTIVES: dict[str, Callable[[Pretrain, tuple[str, ...], tuple[str, ...]], _Task]] = {
    "clm": _clm,
    "mlm": _mlm,
}


def _join(texts: tuple[str, ...], tokenizer: Tokenizer) -> torch.Tensor:
    """All texts in one row of tokens, (n,), each followed by the end-of-text token."""
    end = tokenizer.end_of_text
    return torch.tensor([i for text in texts for i in [*tokenizer.encode(text), end]])
