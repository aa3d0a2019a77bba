"""Methods of fine-tuning, by the names the command gives them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

import peft_lite
from minigpt.settings.options import option

NAMES = ("full", "freeze", "bias", "lora", "dora", "ia3", "bottleneck", "prefix", "prompt")
FREEZE = ("attention", "embeddings")
TARGET = ("query", "value")
SCALED, SCALED_BEFORE = ("key", "value", "mlp.down"), ("mlp.down",)  # ia3's, as in its paper
RANK, ALPHA, WIDTH, TOKENS = 8, 16.0, 64, 20


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What trains."""

    method: str = option(
        "what trains",
        "lora",
        choices=NAMES,
    )
    target: list[str] | None = option(
        "lora, dora, ia3, bottleneck, bias: layers, by the ends of their names or one regular "
        f"expression; lora, dora: or all-linear (default: {' '.join(TARGET)}; ia3: "
        f"{' '.join(SCALED)}; bottleneck: as placed; bias: all)",
        None,
    )
    rank: int | None = option(
        f"lora, dora, bottleneck: rank r (default: {RANK}; bottleneck: {WIDTH})", None
    )
    alpha: float | None = option(
        f"lora, dora: numerator of the scaling alpha / r (default: {ALPHA:g})", None
    )
    lora_dropout: float | None = option("lora, dora: dropout before A (default: 0)", None)
    placement: str | None = option(
        "bottleneck: where (default: pfeiffer)", None, choices=("houlsby", "pfeiffer", "parallel")
    )
    virtual_tokens: int | None = option(f"prefix, prompt: length (default: {TOKENS})", None)
    projection: int | None = option(
        "prefix: inner width of a reparametrising MLP (default: none)", None
    )
    form: str | None = option(
        "prefix: positions of real tokens stay, or move on as in HF PEFT (default: fixed)",
        None,
        choices=("fixed", "peft"),
    )
    feedforward: list[str] | None = option(
        "ia3: those of the targets whose input is scaled, not their output (default: none; "
        f"without --target: {' '.join(SCALED_BEFORE)})",
        None,
    )
    train: list[str] | None = option("freeze: parts of parameter names; only these train", None)
    freeze: list[str] | None = option(
        f"freeze: parts of parameter names; all others train (default: {' '.join(FREEZE)})",
        None,
    )
    layers: str | None = option("freeze, lora, dora: in these blocks only, as in 6-11 or 0,2", None)


def attach(model: nn.Module, options: MethodOptions) -> peft_lite.Handle | None:
    """Puts the method on the model; None for full fine-tuning, where everything trains."""
    _check(options)
    if options.method == "full":
        model.requires_grad_(True)
        return None
    return peft_lite.attach(model, METHODS[options.method](options))


def _freeze(options: MethodOptions) -> peft_lite.FreezeConfig:
    freeze = None if options.train else _patterns(options.freeze or FREEZE)
    train = None if options.train is None else _patterns(options.train)
    return peft_lite.FreezeConfig(train, freeze, _numbers(options.layers))


def _lora(options: MethodOptions) -> peft_lite.LoraConfig:
    return peft_lite.LoraConfig(**_lora_settings(options))


def _dora(options: MethodOptions) -> peft_lite.DoraConfig:
    return peft_lite.DoraConfig(**_lora_settings(options))


def _lora_settings(options: MethodOptions) -> dict[str, Any]:
    return {
        "target_modules": _patterns(options.target or TARGET),
        "r": RANK if options.rank is None else options.rank,
        "lora_alpha": ALPHA if options.alpha is None else options.alpha,
        "lora_dropout": options.lora_dropout or 0.0,
        "layers_to_transform": _numbers(options.layers),
    }


def _bias(options: MethodOptions) -> peft_lite.BiasConfig:
    return peft_lite.BiasConfig(_patterns(options.target) if options.target else None)


def _ia3(options: MethodOptions) -> peft_lite.IA3Config:
    if options.target is None:
        return peft_lite.IA3Config(SCALED, options.feedforward or SCALED_BEFORE)
    return peft_lite.IA3Config(_patterns(options.target), options.feedforward or ())


def _bottleneck(options: MethodOptions) -> peft_lite.BottleneckConfig:
    return peft_lite.BottleneckConfig(
        placement=options.placement or "pfeiffer",
        r=WIDTH if options.rank is None else options.rank,
        target_modules=_patterns(options.target) if options.target else None,
    )


def _prefix(options: MethodOptions) -> peft_lite.PrefixConfig:
    return peft_lite.PrefixConfig(
        num_virtual_tokens=_length(options),
        prefix_projection=options.projection is not None,
        encoder_hidden_size=options.projection,
        form=options.form or "fixed",
    )


def _prompt(options: MethodOptions) -> peft_lite.PromptConfig:
    return peft_lite.PromptConfig(num_virtual_tokens=_length(options))


METHODS: dict[str, Callable[[MethodOptions], Any]] = {
    "freeze": _freeze,
    "bias": _bias,
    "lora": _lora,
    "dora": _dora,
    "ia3": _ia3,
    "bottleneck": _bottleneck,
    "prefix": _prefix,
    "prompt": _prompt,
}
# the methods that an option belongs to
BELONGS = {
    "target": ("lora", "dora", "ia3", "bottleneck", "bias"),
    "rank": ("lora", "dora", "bottleneck"),
    "alpha": ("lora", "dora"),
    "lora_dropout": ("lora", "dora"),
    "placement": ("bottleneck",),
    "virtual_tokens": ("prefix", "prompt"),
    "projection": ("prefix",),
    "form": ("prefix",),
    "feedforward": ("ia3",),
    "train": ("freeze",),
    "freeze": ("freeze",),
    "layers": ("freeze", "lora", "dora"),
}


def _check(options: MethodOptions) -> None:
    """An option of another method is a mistake, not something to ignore."""
    for name, methods in BELONGS.items():
        if getattr(options, name) is not None and options.method not in methods:
            flag = name.replace("_", "-")
            owners = " or ".join(methods)
            raise ValueError(f"--{flag} belongs to --method {owners}, not {options.method}")
    if options.train is not None and options.freeze is not None:
        raise ValueError("give either --train or --freeze, not both")


def _length(options: MethodOptions) -> int:
    return TOKENS if options.virtual_tokens is None else options.virtual_tokens


def _patterns(values: Sequence[str]) -> str | list[str]:
    """One value that is no plain name is a regular expression; commas may join plain names."""
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"[\w.,-]+", values[0])):
        return values[0]
    return [name for value in values for name in value.split(",") if name]


def _numbers(layers: str | None) -> list[int] | None:
    """`6-8,11` -> [6, 7, 8, 11]"""
    if layers is None:
        return None
    numbers: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"--layers is {layers!r}, must be like 6-11 or 0,2")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers += range(first, last + 1)
    return numbers
