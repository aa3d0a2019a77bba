"""Freezing: which weights train, how many, and that the others stay to the bit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import minigpt
import peft_lite
from peft_lite import FreezeConfig
from tests.peft_lite.peft_models import Picture, Plain, output, pair, tokens, twin

QKV_OF_LAST_SIX = r"^blocks\.([6-9]|1[01])\.attention\.(query|key|value)\."
# `"attn" in name or "embed" in name` of a published write-up, read on checkpoint names alone
LITERAL = r"^transformer\..*(attn|embed)"


@pytest.fixture(scope="module")
def gpt_neo_125m() -> nn.Module:
    with torch.device("meta"):
        return minigpt.GPTNeo(minigpt.GPTNeoConfig())


@pytest.fixture(scope="module")
def bert_base() -> nn.Module:
    with torch.device("meta"):
        return minigpt.Bert(minigpt.BertConfig(), "classification", 2)


def count(model: nn.Module, config: FreezeConfig) -> int:
    handle = peft_lite.attach(model, config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert handle.report().trainable == trained
    handle.detach()
    return trained


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (FreezeConfig(freeze=["attention", "embeddings"]), 56_707_584),
        (FreezeConfig(freeze=["attn", "wte", "wpe"]), 56_707_584),
        (FreezeConfig(freeze="attn|wte|wpe"), 56_707_584),
        (FreezeConfig(train=["mlp", "attention_norm", "mlp_norm", "final_norm"]), 56_707_584),
        (FreezeConfig(freeze=["attention"]), 125_198_592 - 28_320_768),
        (FreezeConfig(freeze=["attn"]), 125_198_592 - 28_320_768),
        (FreezeConfig(freeze=LITERAL), 96_877_824),
        (FreezeConfig(train=r"^(?=transformer\.)(?!.*(attn|embed))"), 96_877_824),
        (FreezeConfig(train=["embeddings.token"]), 38_597_376),
        (FreezeConfig(train=["head"]), 38_597_376),
        (FreezeConfig(train=["wpe"]), 1_572_864),
        (FreezeConfig(train=["mlp"]), 56_669_184),
        (FreezeConfig(train=r"(ln_1|ln_2|ln_f)\."), 38_400),
        (FreezeConfig(train=r"\.bias$"), 74_496),
        (FreezeConfig(train=QKV_OF_LAST_SIX), 10_616_832),
        (FreezeConfig(freeze=QKV_OF_LAST_SIX), 114_581_760),
    ],
)
def test_counts_at_the_size_of_gpt_neo_125m(
    gpt_neo_125m: nn.Module, config: FreezeConfig, trained: int
) -> None:
    assert sum(p.numel() for p in gpt_neo_125m.parameters()) == 125_198_592
    assert count(gpt_neo_125m, config) == trained


@pytest.mark.parametrize(
    ("config", "trained"),
    [
        (FreezeConfig(freeze=["attention", "embeddings"]), 57_279_746),
        (FreezeConfig(freeze="attention|embeddings"), 57_279_746),
        (FreezeConfig(train=["attention", "embeddings"]), 52_204_032),
        (FreezeConfig(train=["mlp", "mlp_norm", "pooler", "head"]), 57_279_746),
        (FreezeConfig(train=["intermediate", "output", "pooler", "classifier"]), 64_385_282),
        (FreezeConfig(train=["classifier"]), 1_538),
        (FreezeConfig(train=r"\.bias$"), 102_914),
    ],
)
def test_counts_at_the_size_of_bert_base(
    bert_base: nn.Module, config: FreezeConfig, trained: int
) -> None:
    assert sum(p.numel() for p in bert_base.parameters()) == 109_483_778
    assert count(bert_base, config) == trained


def test_attention_of_bert_takes_along_the_norm_that_its_checkpoint_keeps_there(
    bert_base: nn.Module,
) -> None:
    handle: Any = peft_lite.attach(bert_base, FreezeConfig(train=["attention"]))
    assert "blocks.3.attention_norm.weight" in handle.methods["default"].weights
    assert "blocks.3.mlp_norm.weight" not in handle.methods["default"].weights
    handle.detach()


@pytest.mark.parametrize("freeze", [["attention", "embeddings"], "attention|embeddings"])
@pytest.mark.parametrize("kind", ["bert", "transformers"])
def test_counts_agree_with_a_loop_over_the_names_of_transformers(
    kind: str, freeze: Any, tmp_path: Path
) -> None:
    theirs = twin("bert")
    expected = sum(
        p.numel()
        for n, p in theirs.named_parameters()
        if "attention" not in n and "embeddings" not in n
    )
    model = theirs if kind == "transformers" else pair("bert", tmp_path)[0]
    assert count(model, FreezeConfig(freeze=freeze)) == expected


@pytest.mark.parametrize("kind", ["gpt-neo", "bert", "transformers", "plain"])
def test_frozen_weights_stay_to_the_bit_and_all_others_move(kind: str, tmp_path: Path) -> None:
    x = tokens()
    if kind == "plain":
        model, freeze, x = Plain(), ["inner.0"], torch.randn(4, 7)
    elif kind == "transformers":
        model, freeze = twin("gpt-neo"), ["attn", "wte", "wpe"]
    else:
        model, freeze = pair(kind, tmp_path)[0], ["attention", "embeddings"]
    handle = peft_lite.attach(model, FreezeConfig(freeze=freeze))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < len(trained) < len(before)
    optimizer = torch.optim.AdamW(trained.values(), 1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output(model, x).sin().square().mean().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name
        assert (p.grad is None) == (name not in trained), name
    handle.detach()
    assert all(p.requires_grad for p in model.parameters())


def test_flags_are_set_for_what_was_frozen_before() -> None:
    model = Plain()
    model.requires_grad_(False)
    before = Picture(model)
    handle = peft_lite.attach(model, FreezeConfig(train=["out"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"out.weight"}
    handle.detach()
    assert Picture(model) == before


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"freeze": ["iner"]}, "'iner' matches no parameter .*'inner'"),
        ({"freeze": ["inner", "head"]}, "'head' matches no parameter"),
        ({"train": ["inner", "head"]}, "'head' matches no parameter"),
        ({"train": "inner["}, "not a regular expression"),
        ({"freeze": ["inner", "out"]}, "leaves nothing to train"),
        ({"freeze": "."}, "leaves nothing to train"),
        ({"train": []}, "nothing"),
        ({"train": ["inner"], "freeze": ["out"]}, "either"),
        (
            {"train": ["out"], "layers_to_transform": []},
            r"layers_to_transform is \[\], must be one",
        ),
        ({"train": ["out"], "layers_to_transform": "0"}, "is '0', must be one or more whole"),
        ({"freeze": ["out"], "layers_to_transform": [0, True]}, r"is \[0, True\], must be one"),
        ({}, "either"),
    ],
)
def test_an_error_names_the_pattern_and_changes_nothing(config: Any, reason: str) -> None:
    model = Plain()
    before = Picture(model)
    with pytest.raises(ValueError, match=reason):
        peft_lite.attach(model, FreezeConfig(**config))
    assert Picture(model) == before
    peft_lite.attach(model, FreezeConfig(train=["out"]))


def test_there_is_nothing_to_merge() -> None:
    handle = peft_lite.attach(Plain(), FreezeConfig(train=["out"]))
    for call in (handle.merge, handle.unmerge):
        with pytest.raises(ValueError, match="nothing to"):
            call()


@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_saved_weights_load_into_another_copy(kind: str, tmp_path: Path) -> None:
    model, _ = pair(kind, tmp_path / "base")
    handle = peft_lite.attach(model, FreezeConfig(freeze=["attention", "embeddings"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) / 10)
    handle.save(tmp_path / "frozen")
    assert json.loads((tmp_path / "frozen/adapter_config.json").read_text()) == {
        "peft_type": "FREEZE",
        "train": None,
        "freeze": ["attention", "embeddings"],
        "layers_to_transform": None,
    }
    other = minigpt.load(tmp_path / "base")
    unlike = output(other, tokens())
    loaded = peft_lite.load(other, tmp_path / "frozen")
    assert not torch.allclose(output(other, tokens()), unlike)
    assert torch.equal(output(other, tokens()), output(model, tokens()))
    assert loaded.report() == handle.report()


def test_a_failed_load_keeps_weights_and_flags(tmp_path: Path) -> None:
    handle = peft_lite.attach(Plain(), FreezeConfig(train=["out"]))
    handle.save(tmp_path)
    other = Plain()
    other.out = nn.Linear(5, 4, bias=False)
    before = Picture(other)
    with pytest.raises(ValueError, match=r"out\.weight is \[3, 5\], this model wants \[4, 5\]"):
        peft_lite.load(other, tmp_path)
    assert Picture(other) == before


@pytest.mark.parametrize("freeze", [["attn", "wte"], ["mlp.c_fc", "ln_1"], LITERAL])
def test_checkpoint_names_freeze_the_same_here_and_in_transformers(
    freeze: Any, tmp_path: Path
) -> None:
    ours, theirs = pair("gpt-neo", tmp_path)
    for model in (ours, theirs):
        peft_lite.attach(model, FreezeConfig(freeze=freeze))
    trained = {ours.names.to_hf(n) for n, p in ours.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in theirs.named_parameters() if p.requires_grad}
