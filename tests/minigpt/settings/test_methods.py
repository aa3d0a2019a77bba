"""A command's options for the methods: what each gives, and what belongs to which method."""

from dataclasses import fields
from typing import Any

import pytest
from torch import nn

from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions
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

# method, options given -> the config
CONFIGS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "lora": ("lora", {}, LoraConfig(("query", "value"), r=8, lora_alpha=16.0)),
    "dora": ("dora", {}, DoraConfig(("query", "value"), r=8, lora_alpha=16.0)),
    "ia3": ("ia3", {}, IA3Config(("key", "value", "mlp.down"), ("mlp.down",))),
    "bottleneck": ("bottleneck", {}, BottleneckConfig("pfeiffer", r=64)),
    "prefix": ("prefix", {}, PrefixConfig(20, form="fixed")),
    "prompt": ("prompt", {}, PromptConfig(20)),
    "bias": ("bias", {}, BiasConfig()),
    "freeze": ("freeze", {}, FreezeConfig(freeze=("attention", "embeddings"))),
    "lora, all": (
        "lora",
        {"target": ["key,mlp.up"], "rank": 3, "alpha": 6.0, "lora_dropout": 0.1, "layers": "0-1,3"},
        LoraConfig(["key", "mlp.up"], 3, 6.0, 0.1, layers_to_transform=[0, 1, 3]),
    ),
    "lora, expression": (
        "lora",
        {"target": [r".*\.query"]},
        LoraConfig(r".*\.query", r=8, lora_alpha=16.0),
    ),
    "dora, all-linear": (
        "dora",
        {"target": ["all-linear"], "rank": 2},
        DoraConfig("all-linear", r=2, lora_alpha=16.0),
    ),
    "lora, from the weight": (
        "lora",
        {"init_lora_weights": "pissa"},
        LoraConfig(("query", "value"), r=8, lora_alpha=16.0, init_lora_weights="pissa"),
    ),
    "dora, as by default": (
        "dora",
        {"init_lora_weights": "true"},
        DoraConfig(("query", "value"), r=8, lora_alpha=16.0),
    ),
    "ia3, targets": ("ia3", {"target": ["key", "value"]}, IA3Config(["key", "value"])),
    "ia3, feedforward alone": (
        "ia3",
        {"feedforward": ["value"]},
        IA3Config(("key", "value", "mlp.down"), ["value"]),
    ),
    "bottleneck, all": (
        "bottleneck",
        {"placement": "parallel", "rank": 5, "target": ["mlp"]},
        BottleneckConfig("parallel", 5, target_modules=["mlp"]),
    ),
    "prefix, all": (
        "prefix",
        {"virtual_tokens": 7, "projection": 12, "form": "peft"},
        PrefixConfig(7, prefix_projection=True, encoder_hidden_size=12, form="peft"),
    ),
    "prompt, length": ("prompt", {"virtual_tokens": 7}, PromptConfig(7)),
    "bias, target": ("bias", {"target": ["mlp"]}, BiasConfig(["mlp"])),
    "freeze, train": (
        "freeze",
        {"train": ["mlp"], "layers": "2"},
        FreezeConfig(train=["mlp"], layers_to_transform=[2]),
    ),
    "freeze, freeze": ("freeze", {"freeze": ["mlp"]}, FreezeConfig(freeze=["mlp"])),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_config_of_what_a_command_was_given(name: str) -> None:
    method, options, expected = CONFIGS[name]
    config = methods.config(MethodOptions(method=method, **options))
    assert type(config) is type(expected)
    assert config == expected


def test_the_default_peak_rates() -> None:
    assert methods.LR == {
        "full": 5e-5,
        "freeze": 5e-5,
        "bias": 1e-3,
        "lora": 1e-3,
        "dora": 1e-3,
        "ia3": 3e-3,
        "bottleneck": 1e-3,
        "prefix": 1e-2,
        "prompt": 1e-2,
    }


def test_help_names_the_methods_of_an_option_and_their_defaults() -> None:
    help = {f.name: f.metadata["help"] for f in fields(MethodOptions)}
    for text in ("lora, dora", "bottleneck", "rank r", "8", "64"):
        assert text in help["rank"]
    for text in ("bias, ia3, bottleneck", "all-linear", "query value", "key value mlp.down"):
        assert text in help["target"]
    assert help["alpha"].endswith("(default: 16)")


# option, a method that does not have it, the methods that have it
FOREIGN = [
    ("target", "prefix", "bias or lora or dora or ia3 or bottleneck"),
    ("rank", "ia3", "lora or dora or bottleneck"),
    ("alpha", "bottleneck", "lora or dora"),
    ("lora_dropout", "freeze", "lora or dora"),
    ("init_lora_weights", "ia3", "lora or dora"),
    ("placement", "lora", "bottleneck"),
    ("virtual_tokens", "full", "prefix or prompt"),
    ("projection", "prompt", "prefix"),
    ("form", "prompt", "prefix"),
    ("feedforward", "lora", "ia3"),
    ("train", "bias", "freeze"),
    ("freeze", "lora", "freeze"),
    ("layers", "bias", "freeze or lora or dora"),
]


@pytest.mark.parametrize(("option", "method", "owners"), FOREIGN)
def test_an_option_of_another_method_is_refused(option: str, method: str, owners: str) -> None:
    flag = option.replace("_", "-")
    expected = f"--{flag} belongs to --method {owners}, not {method}"
    with pytest.raises(ValueError, match=expected):
        methods.attach(nn.Linear(2, 2), MethodOptions(method=method, **{option: "1"}))


def test_every_option_is_in_the_list_above() -> None:
    assert {f.name for f in fields(MethodOptions)} == {"method", *(o for o, _, _ in FOREIGN)}
