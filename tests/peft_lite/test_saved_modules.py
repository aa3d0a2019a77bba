"""Modules that train whole beside a method: copies that are the model's own until it goes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import minigpt
import peft_lite
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)
from tests.peft_lite.peft_methods import fresh, of, same, shake, steps, trained
from tests.peft_lite.peft_models import Picture, live, tokens

SAVED: dict[str, Any] = {
    "lora": LoraConfig(["query"], r=3, modules_to_save=["classifier"]),
    "dora": DoraConfig(["query"], r=3, modules_to_save=["classifier"]),
    "ia3": IA3Config(["key"], modules_to_save=["classifier"]),
    "bottleneck": BottleneckConfig("pfeiffer", 4, modules_to_save=["classifier"]),
    "prefix": PrefixConfig(3, modules_to_save=["classifier"]),
    "prompt": PromptConfig(3, modules_to_save=["classifier"]),
    "bias": BiasConfig(["mlp"], modules_to_save=["classifier"]),
}
every = pytest.mark.parametrize("config", SAVED.values(), ids=SAVED)
OWN = ("head.classifier.weight", "head.classifier.bias")


@every
def test_the_copy_trains_and_the_models_own_stays_to_the_bit(config: Any) -> None:
    model = fresh("bert")
    classifier = model.head.classifier
    values = {n: p.detach().clone() for n, p in classifier.named_parameters()}
    handle = peft_lite.attach(model, config)
    assert not any(p.requires_grad for p in classifier.parameters())
    copies = [p for p in handle.methods["default"].trained() if p.size(0) == 3 and p.dim() < 3]
    weight = next(p for p in copies if p.shape == (3, 24) and torch.equal(p, classifier.weight))
    bias = next(p for p in copies if p.shape == (3,))
    assert weight is not classifier.weight
    assert weight.data_ptr() != classifier.weight.data_ptr()
    steps(model, "bert")
    assert same(values, {n: p.detach() for n, p in classifier.named_parameters()})
    assert not torch.equal(weight, classifier.weight)
    assert not torch.equal(bias, classifier.bias)
    assert classifier.weight.grad is None
    handle.detach()
    assert model.head.classifier is classifier


@every
def test_the_output_is_that_of_the_copy_alone(config: Any) -> None:
    model = fresh("bert")
    handle = peft_lite.attach(model, config)
    state = {n.rsplit("classifier.", 1)[-1]: t for n, t in live(handle).items()}
    before = of(model, tokens())
    model.head.classifier.base.weight.data.fill_(torch.nan)
    assert torch.equal(of(model, tokens()), before)
    state["bias"].add_(5)
    torch.testing.assert_close(of(model, tokens()), before + 5)


@every
def test_the_copy_is_saved_whole_under_the_name_of_its_checkpoint(
    config: Any, tmp_path: Path
) -> None:
    model = fresh("bert")
    handle = peft_lite.attach(model, config)
    shake(trained(model).values())
    handle.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = {n: t for n, t in tensors.items() if "classifier" in n}
    whole = (
        "base_model." if isinstance(config, PrefixConfig | PromptConfig) else "base_model.model."
    )
    assert saved.keys() == {f"{whole}classifier.weight", f"{whole}classifier.bias"}
    copy = {n: p for n, p in model.named_parameters() if n.startswith("head.classifier.copy")}
    assert {t.shape for t in saved.values()} == {(3, 24), (3,)}
    assert all(any(torch.equal(t, p) for p in copy.values()) for t in saved.values())
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["modules_to_save"] == ["classifier"]
    other = fresh("bert")
    peft_lite.load(other, tmp_path)
    torch.testing.assert_close(of(other, tokens()), of(model, tokens()), rtol=0, atol=1e-6)


@every
def test_a_classifier_of_another_number_of_classes_is_refused(config: Any, tmp_path: Path) -> None:
    peft_lite.attach(fresh("bert"), config).save(tmp_path)
    base = fresh("bert")
    torch.manual_seed(0)
    other = minigpt.Bert(base.config, "classification", 5).eval()
    before = Picture(other)
    with pytest.raises(ValueError, match=r"classifier\.(weight|bias) is \[3.*this model wants \[5"):
        peft_lite.load(other, tmp_path)
    assert Picture(other) == before


def test_fold_keeps_the_copy_in_the_place_of_the_models_own(tmp_path: Path) -> None:
    for name in ("lora", "dora", "ia3", "bias"):
        model = fresh("bert")
        classifier = model.head.classifier
        handle = peft_lite.attach(model, SAVED[name])
        shake(trained(model).values())
        tuned = of(model, tokens())
        handle.fold()
        assert type(model.head.classifier) is type(classifier)
        assert model.head.classifier is not classifier
        torch.testing.assert_close(of(model, tokens()), tuned, rtol=0, atol=1e-5)
        minigpt.save(model, tmp_path / name)
        assert same(minigpt.load(tmp_path / name).state_dict(), model.state_dict())


def test_the_copy_of_a_tied_head_is_tied_to_nothing() -> None:
    model = fresh("gpt-neo")
    table = model.embeddings.token.weight
    values = table.detach().clone()
    handle = peft_lite.attach(model, LoraConfig(["query"], r=3, modules_to_save=["head"]))
    steps(model, "gpt-neo")
    assert torch.equal(table, values)
    assert any(n.endswith("lm_head.weight") for n in handle.state())
    assert not torch.equal(handle.state()["base_model.model.lm_head.weight"], values)
    handle.detach()
    assert model.head.weight is table


def test_a_copy_of_a_whole_part_runs_in_the_mode_of_the_model() -> None:
    model = fresh("bert")
    model.head.dropout.p = 0.5
    peft_lite.attach(model, LoraConfig(["query"], modules_to_save=["head"]))
    assert not model.head.copy.training
    assert torch.equal(of(model, tokens()), of(model, tokens()))
    model.train()
    assert model.head.copy.dropout.training
    model.eval()
    assert not any(m.training for m in model.modules())


def test_two_adapters_have_each_a_classifier_of_its_own() -> None:
    model, x = fresh("bert"), tokens()
    base = of(model, x)
    handle = peft_lite.attach(model, SAVED["lora"], "a")
    live(handle, "a")["base_model.model.classifier.bias"].add_(1)
    peft_lite.attach(model, SAVED["dora"], "b")
    assert torch.allclose(of(model, x), base, atol=1e-6)  # it began at the model's own
    live(handle, "b")["base_model.model.classifier.bias"].add_(2)
    torch.testing.assert_close(of(model, x), base + 2)
    handle.switch("a")
    torch.testing.assert_close(of(model, x), base + 1)
    with handle.enabled(False):
        assert torch.equal(of(model, x), base)
    handle.detach("b")
    torch.testing.assert_close(of(model, x), base + 1)
    handle.detach()
    assert torch.equal(of(model, x), base)


def test_biases_within_a_copy_train_in_the_copy_only() -> None:
    for config in (
        LoraConfig(["query"], bias="all", modules_to_save=["classifier"]),
        BiasConfig(modules_to_save=["classifier"]),
    ):
        model = fresh("bert")
        bias = model.head.classifier.bias
        handle = peft_lite.attach(model, config)
        names = {n for n in handle.state() if "classifier" in n}
        assert len(names) == 2
        assert not bias.requires_grad
        assert model.pooler.bias.requires_grad


def test_all_linear_leaves_out_what_trains_whole() -> None:
    targets = {}
    for whole in (None, ["classifier"], ["pooler", "classifier"]):
        model = fresh("bert")
        config = LoraConfig("all-linear", r=3, modules_to_save=whole)
        wrappers = peft_lite.attach(model, config).methods["default"].wrappers
        targets[str(whole)] = {n for n, w in wrappers.items() if hasattr(w, "lora_a")}
    assert "pooler" in targets["None"]
    assert targets["None"] == targets["['classifier']"]
    assert targets["None"] - targets["['pooler', 'classifier']"] == {"pooler"}
