"""Query, key and value through one product: the same numbers, and only where it is right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minigpt_kernels
import peft_lite
from minigpt import Bert, BertConfig
from minigpt.models.slots import Projection
from peft_lite import LoraConfig, shared
from tests.tiny import gpt_neo


def bert() -> Bert:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
    return Bert(BertConfig(vocab_size=61, hidden_size=24, **sizes), head="masked-lm")


MODELS: list[Callable[[], Any]] = [gpt_neo, bert]
IDS = torch.arange(12).view(2, 6) + 1


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each shared product was of."""
    counts: list[int] = []

    def counted(x: Tensor, loras: list[minigpt_kernels.Lora], p: float) -> list[Tensor]:
        counts.append(len(loras))
        return minigpt_kernels.lora_linears(x, loras, p)

    monkeypatch.setattr(shared, "lora_linears", counted)
    return counts


def adapted(make: Callable[[], Any], *targets: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(3)
    model = make().double().eval()
    peft_lite.attach(model, LoraConfig(list(targets), r=3, lora_alpha=5, lora_dropout=dropout))
    for name, p in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(p)
    return model


@pytest.mark.parametrize("make", MODELS)
def test_outputs_and_gradients_are_those_of_each_layer_alone(
    make: Callable[[], Any], passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for alone in (False, True):
        model = adapted(make, "query", "key", "value", "mlp.up")
        if alone:
            monkeypatch.setattr(shared, "alone", lambda layer: None)
        y = model(IDS)
        y.sin().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append((y.detach(), gradients))
    assert passes == [3] * len(model.blocks)
    (y, gradients), (y_alone, gradients_alone) = found
    torch.testing.assert_close(y, y_alone)
    assert gradients.keys() == gradients_alone.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient, gradients_alone[name], msg=lambda m, n=name: f"{n}: {m}"
        )


def test_two_layers_share_and_the_third_is_called(passes: list[int]) -> None:
    model = adapted(gpt_neo, "query", "value")
    model(IDS)
    assert passes == [2] * len(model.blocks)


def test_one_layer_has_nobody_to_share_with(passes: list[int]) -> None:
    adapted(gpt_neo, "query")(IDS)
    assert passes == []


def test_of_siblings_dropout_drops_the_same_inputs(passes: list[int]) -> None:
    model = adapted(gpt_neo, "query", "key", "value", dropout=0.5).train()
    attention = model.blocks[0].attention
    key, value = (getattr(attention, n) for n in ("key", "value"))
    for name in ("lora_a", "lora_b"):
        getattr(value, name).data = getattr(key, name).data
    value.layer.weight = key.layer.weight
    x = torch.randn(2, 6, model.config.hidden_size, dtype=torch.float64)
    _, k, v = attention.project(x, attention.query, key, value)
    torch.testing.assert_close(k, v)
    assert passes == [3]
    again = attention.project(x, attention.query, key, value)[1]
    assert (again - k).abs().max() > 0.1


def test_a_layer_that_is_more_or_less_than_its_lora_is_called_as_ever(passes: list[int]) -> None:
    model = adapted(gpt_neo, "query", "key", "value")
    handle = peft_lite.attach(model, LoraConfig(["query", "key"], r=2), name="other")
    layers = len(model.blocks)
    model(IDS)
    assert passes == [2] * layers  # the other steps aside in its place
    handle.switch("default")
    passes.clear()
    model(IDS)
    assert passes == [3] * layers
    passes.clear()
    with handle.rows(["default", "other"]):
        model(IDS)
    handle.merge()
    model(IDS)
    handle.unmerge()
    with handle.enabled(False):
        model(IDS)
    assert passes == []
    peft_lite.attach(model, peft_lite.IA3Config(["key"], feedforward_modules=[]), name="scaled")
    model(IDS)
    assert passes == [2] * layers
    passes.clear()
    calls: list[int] = []
    model.blocks[0].attention.query.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert calls == [1]
    assert passes == [2] * (layers - 1)


def test_after_detach_the_slot_is_the_models_own() -> None:
    model = gpt_neo()
    slots = [block.attention.project for block in model.blocks]
    handle = peft_lite.attach(model, LoraConfig(["query", "key"], r=2))
    assert not any(type(block.attention.project) is Projection for block in model.blocks)
    handle.detach()
    assert [block.attention.project for block in model.blocks] == slots
