"""A GPT-Neo small enough for a test, and random batches."""

import torch
from torch import Tensor, nn

from minigpt import GPTNeo, GPTNeoConfig

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
