"""Small models for the tests of methods: ours, their twins in `transformers`, and plain ones.

No layer is square but the attention's own, heads are tied where the architecture ties them, and no
bias is zero.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import files

GPT_NEO = {
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 40,
    "window_size": 4,
    "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 0,
    "eos_token_id": 0,
}
BERT = {
    "vocab_size": 67,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_labels": 3,
}
CLASSES = {
    "gpt-neo": transformers.GPTNeoForCausalLM,
    "gpt-neo bare": transformers.GPTNeoModel,
    "bert": transformers.BertForSequenceClassification,
    "bert masked": transformers.BertForMaskedLM,
    "bert bare": transformers.BertModel,
}
HEADS = {"gpt-neo bare": "none", "bert bare": "none", "bert masked": "masked-lm"}
# every projection of a block, by the ends of our names
PROJECTIONS = ["query", "key", "value", "attention.output", "mlp.up", "mlp.down"]


def twin(kind: str) -> nn.Module:
    """A randomly initialised model of `transformers`, in evaluation mode."""
    torch.manual_seed(3)
    if kind.startswith("gpt-neo"):
        config: Any = transformers.GPTNeoConfig(**GPT_NEO)
    else:
        config = transformers.BertConfig(**BERT)
    model = CLASSES[kind](config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.3)
            elif "embed" not in name and "wte" not in name:
                p.mul_(4)
    return model.eval()


def pair(kind: str, folder: Path) -> tuple[Any, Any]:
    """(ours, its twin) with the same weights, through a checkpoint that `transformers` writes."""
    theirs = twin(kind)
    theirs.save_pretrained(folder)
    return minigpt.load(folder, head=HEADS.get(kind)), theirs


def output(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, or states where there is no head, of either library's model."""
    y = model(ids)
    return y if isinstance(y, Tensor) else y[0]


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(1, 60, (3, 11), generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """Linear layers that know of no table of names: 7 -> 12 -> 5, and a bare one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5))
        self.out = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


def perturb(handle: peft_lite.Handle, std: float = 0.2) -> None:
    """Moves an adapter away from its start, where B = 0 would hide most mistakes."""
    random = torch.Generator().manual_seed(11)
    for tensor in live(handle).values():
        tensor.copy_(std * torch.randn(tensor.shape, generator=random))


def live(handle: peft_lite.Handle, name: str = "default") -> dict[str, Tensor]:
    """What `handle.state` copies."""
    return files.state(handle.model, handle.methods[name])


class Picture:
    """All that a method could change in a model: modules, weights to the bit, flags, modes."""

    def __init__(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.parameters = {n: (id(p), p.requires_grad, p.dtype) for n, p in parameters.items()}
        self.values = {n: p.detach().clone() for n, p in parameters.items()}
        self.modules = {n: (id(m), m.training) for n, m in model.named_modules()}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Picture)
        return (
            self.parameters == other.parameters
            and self.modules == other.modules
            and all(torch.equal(v, other.values[n]) for n, v in self.values.items())
        )

    __hash__ = None  # type: ignore[assignment]
