"""Factors in float32: a change that the model's dtype cannot hold still acts."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import DoraConfig, IA3Config, LoraConfig, PrefixConfig


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.l = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l(x)
        return y


SCALED = {
    "outputs of ia3": IA3Config(["l"]),
    "inputs of ia3": IA3Config(["l"], ["l"]),
    "dora": DoraConfig(["l"], r=2),
}


@pytest.mark.parametrize("what", SCALED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_factor_near_one_acts(what: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = One(nn.Linear(64, 48, bias=what == "dora").to(dtype))
    x = torch.randn(99, 64).to(dtype)
    handle = peft_lite.attach(model, SCALED[what])
    wrapper: Any = handle.methods["default"].wrappers["l"]
    factor = wrapper.magnitude if what == "dora" else wrapper.scale
    b = 0.0 if wrapper.layer.bias is None else wrapper.layer.bias.double()
    with torch.no_grad():
        exact = x.double() @ wrapper.layer.weight.double().T * 1.003 + b
        factor.mul_(1.003)
        y = model(x)
    assert y.dtype == dtype
    error, limit = (y.double() - exact).norm(), torch.finfo(dtype).eps * exact.norm()
    assert error < limit
    assert ((y.double() - exact).mean() / exact.abs().mean()).abs() < 1e-3


@pytest.mark.parametrize("config", [LoraConfig(["l"], r=2), DoraConfig(["l"], r=2)])
@pytest.mark.parametrize("kind", ["linear", "table"])
def test_autocast_does_not_round_what_is_merged(config: Any, kind: str) -> None:
    weights = []
    for autocast in (False, True):
        torch.manual_seed(0)
        model = One(nn.Linear(24, 18) if kind == "linear" else nn.Embedding(24, 18))
        handle = peft_lite.attach(model, config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.normal_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            handle.fold()
        weights.append(model.l.weight.detach())
    assert torch.equal(*weights)


def test_dora_in_half_precision_does_not_overflow() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 4, bias=False).half()
    layer.weight.data[1] = 1e-5  # its length is 8e-5, its magnitude 6,250 times that
    model = One(layer)
    handle = peft_lite.attach(model, DoraConfig(["l"], r=2))
    wrapper: Any = handle.methods["default"].wrappers["l"]
    wrapper.magnitude.data[1] = 8.0  # g = 100,000 is no number of float16
    x = torch.randn(3, 64).half()
    apart = model(x)
    handle.merge()
    assert apart.isfinite().all()
    torch.testing.assert_close(apart, model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("config", [LoraConfig(["l"], r=2), DoraConfig(["l"], r=2)])
@pytest.mark.parametrize("kind", ["linear", "table"])
def test_what_a_norm_and_a_weight_are_does_not_depend_on_autocast(config: Any, kind: str) -> None:
    torch.manual_seed(0)
    model = One(nn.Linear(24, 18) if kind == "linear" else nn.Embedding(24, 18))
    handle = peft_lite.attach(model, config)
    wrapper: Any = handle.methods["default"].wrappers["l"]
    with torch.no_grad():
        wrapper.lora_a.normal_()
        wrapper.lora_b.normal_()
    outside = [wrapper.weight, getattr(wrapper, "norm", wrapper.delta)()]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [wrapper.weight, getattr(wrapper, "norm", wrapper.delta)()]
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_a_prefix_that_an_mlp_computes_is_saved_as_outside_autocast() -> None:
    model = minigpt.GPTNeo(
        minigpt.GPTNeoConfig(vocab_size=11, max_position_embeddings=16, hidden_size=8, num_heads=2)
    )
    handle = peft_lite.attach(model, PrefixConfig(3, prefix_projection=True))
    outside = handle.state()
    with torch.autocast("cpu", torch.bfloat16):
        inside = handle.state()
    assert torch.equal(inside["prompt_embeddings"], outside["prompt_embeddings"])


@pytest.mark.parametrize("config", [LoraConfig(["l"], r=2), DoraConfig(["l"], r=2)])
def test_a_change_without_values_has_a_shape(config: Any) -> None:
    """The meta device has no autocast."""
    model = One(nn.Linear(24, 18, device="meta"))
    peft_lite.attach(model, config)
    assert model.l.weight.shape == (18, 24)
