"""Every method on every model it is for, as the tests of the handle need them."""

from collections.abc import Callable, Iterable
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    FreezeConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from tests.peft_lite.peft_models import Plain, output, pair, tokens, twin

GPT_NEO: dict[str, Any] = {
    "lora": LoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7),
    "lora with all biases": LoraConfig(["q_proj", "c_fc"], r=3, bias="all"),
    "lora with its layers' biases": LoraConfig(["q_proj", "c_fc"], r=3, bias="lora_only"),
    "lora and a norm": LoraConfig(["q_proj"], r=3, modules_to_save=["ln_2"]),
    "lora of a table": LoraConfig(["wpe", "v_proj"], r=3, lora_alpha=7),
    "lora by pissa": LoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7, init_lora_weights="pissa"),
    "dora": DoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7),
    "dora of a table": DoraConfig(["wpe"], r=3, lora_alpha=7),
    "dora by pissa": DoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7, init_lora_weights="pissa"),
    "houlsby": BottleneckConfig("houlsby", 5, target_modules=["out_proj", "c_proj"]),
    "pfeiffer": BottleneckConfig("pfeiffer", 5, "gelu", target_modules=["c_proj"]),
    "parallel": BottleneckConfig("parallel", 5, "silu", target_modules=["mlp"]),
    "bias": BiasConfig(),
    "ia3": IA3Config(["k_proj", "v_proj", "c_proj"], ["c_proj"]),
    "freezing": FreezeConfig(train=["ln_1", "c_fc"]),
}
BERT: dict[str, Any] = {
    "lora": LoraConfig(["query", "output.dense"], r=3, lora_alpha=7),
    "lora with all biases": LoraConfig(["query"], r=3, bias="all"),
    "lora with its layers' biases": LoraConfig(["query", "key"], r=3, bias="lora_only"),
    "lora and a classifier": LoraConfig(["query"], r=3, modules_to_save=["classifier"]),
    "lora of a table": LoraConfig(["word_embeddings", "value"], r=3, lora_alpha=7),
    "dora": DoraConfig(["query", "output.dense"], r=3, lora_alpha=7),
    "dora of a table": DoraConfig(["position_embeddings"], r=3, lora_alpha=7),
    "pfeiffer": BottleneckConfig("pfeiffer", 5, "tanh", target_modules=["output.dense"]),
    "bias": BiasConfig(modules_to_save=["classifier"]),
    "ia3": IA3Config(["key", "value", "output.dense"], ["output.dense"]),
    "freezing": FreezeConfig(freeze=["attention", "embeddings"]),
}
OURS: dict[str, Any] = {
    "houlsby": BottleneckConfig("houlsby", 5),
    "pfeiffer": BottleneckConfig("pfeiffer", 5, "gelu"),
    "parallel": BottleneckConfig("parallel", 5, "silu"),
    "prefix": PrefixConfig(3),
    "prefix as in peft": PrefixConfig(3, form="peft"),
    "prefix by an mlp": PrefixConfig(3, prefix_projection=True, encoder_hidden_size=10),
    "prompt": PromptConfig(4),
}
PLAIN: dict[str, Any] = {
    "lora": LoraConfig("all-linear", r=2, lora_alpha=3),
    "lora with all biases": LoraConfig(["inner.0"], r=2, bias="all"),
    "lora by olora": LoraConfig("all-linear", r=2, lora_alpha=3, init_lora_weights="olora"),
    "lora and a whole layer": LoraConfig(["inner.0"], r=2, modules_to_save=["inner.2"]),
    "dora": DoraConfig("all-linear", r=2, lora_alpha=3),
    "pfeiffer": BottleneckConfig("pfeiffer", 5, target_modules=["inner.0", "out"]),
    "bias": BiasConfig(["inner.0"]),
    "ia3": IA3Config(["inner.0", "inner.2"], ["inner.2"]),
    "freezing": FreezeConfig(train=["inner.2"]),
}
TIED: dict[str, Any] = {  # a masked-language head has its weight and bias under two names
    "lora with all biases": LoraConfig(["query"], r=3, bias="all"),
    "bias": BiasConfig(["predictions"]),
    "freezing": FreezeConfig(train=["predictions"]),
}
ONCE = ("lora with", "lora of", "dora of", "houlsby")  # on our models only
TABLES = {
    "gpt-neo": {**GPT_NEO, **OURS},
    "bert": {**BERT, **OURS},
    "transformers gpt-neo": {m: c for m, c in GPT_NEO.items() if not m.startswith(ONCE)},
    "transformers bert": {m: c for m, c in BERT.items() if not m.startswith(ONCE)},
    "bert masked": TIED,
    "transformers bert masked": TIED,
    "plain": PLAIN,
}
CASES = [(kind, method) for kind, table in TABLES.items() for method in table]
MERGEABLE = ("lora", "dora", "ia3")  # how the names of methods begin
NO_WEIGHTS = ("houlsby", "pfeiffer", "parallel", "prefix", "prompt")
# the model's own parameters that a method trains where they are, by the checkpoint's names
IN_PLACE: dict[tuple[str, str], Callable[[str], bool]] = {
    ("gpt-neo", "lora with its layers' biases"): lambda n: n.endswith("c_fc.bias"),
    ("bert", "lora with its layers' biases"): lambda n: n.endswith(("query.bias", "key.bias")),
    ("bert", "bias"): lambda n: n.endswith("bias") and "classifier" not in n,
    ("bert masked", "bias"): lambda n: "predictions" in n and n.endswith("bias"),
    ("bert masked", "freezing"): lambda n: "predictions" in n or "word_embeddings" in n,
    ("plain", "bias"): lambda n: n == "inner.0.bias",
    ("gpt-neo", "freezing"): lambda n: ".ln_1." in n or ".c_fc." in n,
    ("bert", "freezing"): lambda n: "attention" not in n and "embeddings" not in n,
    ("plain", "freezing"): lambda n: n.startswith("inner.2."),
}


def trains_in_place(kind: str, method: str, name: str) -> bool:
    every = ("bias", "lora with all biases")
    rule = IN_PLACE.get((kind.removeprefix("transformers "), method))
    return rule(name) if rule else method in every and name.endswith("bias")


@cache
def _base(kind: str) -> Any:
    if kind == "plain":
        torch.manual_seed(0)
        return Plain().eval()
    if kind.startswith("transformers "):
        return twin(kind.removeprefix("transformers "))
    with TemporaryDirectory() as folder:
        return pair(kind, Path(folder))[0]


def fresh(kind: str) -> Any:
    """A small model in evaluation mode, always of the same weights."""
    return deepcopy(_base(kind))


def inputs(kind: str, seed: int = 0, rows: int = 3) -> Tensor:
    if kind == "plain":
        return torch.randn(rows, 4, 7, generator=torch.Generator().manual_seed(seed))
    return tokens(seed)[:rows]


@torch.no_grad()
def of(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output in evaluation mode."""
    modes = {m: m.training for m in model.modules()}
    y = output(model.eval(), x)
    for module, training in modes.items():
        module.training = training
    return y


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def shake(parameters: Iterable[nn.Parameter], std: float = 0.2, seed: int = 11) -> None:
    """Moves what trains away from its start, be that 0, 1 or a norm."""
    random = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.add_(std * torch.randn(p.shape, generator=random).to(p.dtype))


def steps(model: nn.Module, kind: str, n: int = 3) -> None:
    """Some updates of AdamW on whatever requires a gradient, with dropout on."""
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW(trained(model).values(), 1e-2, weight_decay=0)
    modes = {m: m.training for m in model.modules()}
    model.train()
    for step in range(n):
        optimizer.zero_grad()
        output(model, inputs(kind, step)).sin().square().mean().backward()
        optimizer.step()
    for module, training in modes.items():
        module.training = training


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[n]) for n, t in a.items())
