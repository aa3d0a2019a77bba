"""A product with the Hessian of what a method trains is that of its plain expression in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lite
from peft_lite import DoraConfig, IA3Config, LoraConfig

K, N, R, V = 6, 4, 2, 9
S = 7 / R
X = torch.randn(5, K, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
IDS = torch.tensor([0, 3, 3, 8])


def lora(w: Tensor, b: Tensor, t: dict[str, Tensor]) -> Tensor:
    return X @ (w + S * t["lora_b"] @ t["lora_a"]).T + b


def dora(w: Tensor, b: Tensor, t: dict[str, Tensor], constant: bool = True) -> Tensor:
    v = w + S * t["lora_b"] @ t["lora_a"]
    norm = v.square().sum(1, keepdim=True).sqrt()
    return X @ (t["magnitude"][:, None] * v / (norm.detach() if constant else norm)).T + b


def table(w: Tensor, _: Tensor, t: dict[str, Tensor]) -> Tensor:
    return (w + S * (t["lora_b"] @ t["lora_a"]).T)[IDS]


FORMS: dict[str, tuple[Any, Callable[..., Tensor]]] = {
    "lora": (LoraConfig(["l"], r=R, lora_alpha=7), lora),
    "dora": (DoraConfig(["l"], r=R, lora_alpha=7), dora),
    "dora through the norm": (
        DoraConfig(["l"], r=R, lora_alpha=7, detach_norm=False),
        lambda w, b, t: dora(w, b, t, constant=False),
    ),
    "ia3": (IA3Config(["l"]), lambda w, b, t: t["scale"] * (X @ w.T + b)),
    "ia3 of inputs": (IA3Config(["l"], ["l"]), lambda w, b, t: (t["scale"] * X) @ w.T + b),
    "lora of a table": (LoraConfig(["e"], r=R, lora_alpha=7), table),
}


def product(output: Callable[[], Tensor], leaves: list[Tensor], curved: bool) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(4)
    y = output()
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    loss = (y.tanh() if curved else dy * y).sum()
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    along = [torch.randn(g.shape, generator=random, dtype=g.dtype) for g in gradients]
    total = sum((g * a).sum() for g, a in zip(gradients, along, strict=True))
    return torch.autograd.grad(total, leaves, materialize_grads=True)


@pytest.mark.parametrize(
    ("form", "curved"),
    [(form, curved) for form in FORMS for curved in (True, False) if curved or "ia3" not in form],
)
def test_a_product_with_the_hessian_is_that_of_the_plain_expression(
    form: str, curved: bool
) -> None:
    config, plain = FORMS[form]
    torch.manual_seed(0)
    model = nn.ModuleDict({"l": nn.Linear(K, N), "e": nn.Embedding(V, N)}).double()
    name, given = ("e", IDS) if "table" in form else ("l", X)
    handle = peft_lite.attach(model, config)
    layer: Any = handle.methods["default"].wrappers[name]
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.5 * torch.randn_like(p))
    w, b = layer.layer.weight.detach(), getattr(layer.layer, "bias", torch.zeros(())).detach()
    ours = product(lambda: model[name](given), list(trained.values()), curved)
    expected = product(lambda: plain(w, b, trained), list(trained.values()), curved)
    assert max(float(e.abs().max()) for e in expected) > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
