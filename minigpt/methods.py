"""Methods of fine-tuning, by the names the command gives them."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

import peft_lite
from minigpt.options import option

FREEZE = ("attention", "embeddings")
TARGET = ("query", "value")
RANK, ALPHA = 8, 16.0


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What trains."""

    method: str = option("what trains", "lora", choices=("full", "freeze", "lora"))
    target: list[str] | None = option(
        "lora: layers, by the ends of their names, one regular expression, or all-linear "
        f"(default: {' '.join(TARGET)})",
        None,
    )
    rank: int | None = option(f"lora: rank r (default: {RANK})", None)
    alpha: float | None = option(
        f"lora: numerator of the scaling alpha / r (default: {ALPHA:g})", None
    )
    lora_dropout: float | None = option("lora: dropout before A (default: 0)", None)
    train: list[str] | None = option("freeze: parts of parameter names; only these train", None)
    freeze: list[str] | None = option(
        f"freeze: parts of parameter names; all others train (default: {' '.join(FREEZE)})",
        None,
    )


def attach(model: nn.Module, options: MethodOptions) -> peft_lite.Handle | None:
    """Puts the method on the model; None for full fine-tuning, where everything trains."""
    _check(options)
    return METHODS[options.method](model, options)


def _full(model: nn.Module, options: MethodOptions) -> None:
    model.requires_grad_(True)


def _freeze(model: nn.Module, options: MethodOptions) -> peft_lite.Handle:
    freeze = None if options.train else _patterns(options.freeze or FREEZE)
    train = None if options.train is None else _patterns(options.train)
    return peft_lite.attach(model, peft_lite.FreezeConfig(train=train, freeze=freeze))


def _lora(model: nn.Module, options: MethodOptions) -> peft_lite.Handle:
    config = peft_lite.LoraConfig(
        target_modules=_patterns(options.target or TARGET),
        r=RANK if options.rank is None else options.rank,
        lora_alpha=ALPHA if options.alpha is None else options.alpha,
        lora_dropout=options.lora_dropout or 0.0,
    )
    return peft_lite.attach(model, config)


METHODS: dict[str, Callable[[nn.Module, MethodOptions], peft_lite.Handle | None]] = {
    "full": _full,
    "freeze": _freeze,
    "lora": _lora,
}


def _check(options: MethodOptions) -> None:
    """An option of another method is a mistake, not something to ignore."""
    of_method = {
        "lora": ("target", "rank", "alpha", "lora_dropout"),
        "freeze": ("train", "freeze"),
    }
    for method, names in of_method.items():
        for name in names:
            if getattr(options, name) is not None and options.method != method:
                name = name.replace("_", "-")
                raise ValueError(f"--{name} belongs to --method {method}, not {options.method}")
    if options.train is not None and options.freeze is not None:
        raise ValueError("give either --train or --freeze, not both")


def _patterns(values: Sequence[str]) -> str | list[str]:
    """One value that is no plain name is a regular expression; commas may join plain names."""
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"[\w.,-]+", values[0])):
        return values[0]
    return [name for value in values for name in value.split(",") if name]
