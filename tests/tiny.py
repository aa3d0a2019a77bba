"""A GPT-Neo small enough for a test, and random batches."""

from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from minigpt import GPTNeo, GPTNeoConfig, save
from minigpt.data.tokenizer import Tokenizer

VOCABULARY, LENGTH = 61, 10


def gpt_neo(seed: int = 0, dropout: float = 0.0, **settings: object) -> GPTNeo:
    """Two blocks of width 32, no parameter at its initial value."""
    defaults = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 16,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "window_size": 4,
        "embed_dropout": dropout,
        "attention_dropout": dropout,
        "resid_dropout": dropout,
    }
    random = torch.Generator().manual_seed(seed)
    model = GPTNeo(GPTNeoConfig(**{**defaults, **settings}))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0.0, 0.2, generator=random)
            if "norm.weight" in name:
                p += 1
    return model


def folder(out: Path) -> Path:
    """A model directory with its tokenizer, and text.txt beside them."""
    words = Random(0).choices(["sea", "whale", "ship", "the", "a", "saw", "old"], k=1500)
    text = "".join(w + ("\n" if i % 9 == 8 else " ") for i, w in enumerate(words))
    (out / "text.txt").write_text(text)
    tokenizer = Tokenizer.train([text], 270)
    tokenizer.save(out)
    save(gpt_neo(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, dropout=0.1), out)
    return out


def batch(i: int, rows: int = 3, ignored: float = 0.2) -> dict[str, Tensor]:
    """Random ids, and random labels of which a share says nothing; a function of `i` alone."""
    random = torch.Generator().manual_seed(1000 + i)
    ids, labels = torch.randint(VOCABULARY, (2, rows, LENGTH), generator=random)
    labels[torch.rand(rows, LENGTH, generator=random) < ignored] = -100
    return {"input_ids": ids, "labels": labels}


def full_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of all the logits at once."""
    logits = model(batch["input_ids"], attention_mask=batch.get("attention_mask"))
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, in units of b's largest value and of its rounding error."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / (b.abs().max() * torch.finfo(b.dtype).eps))
