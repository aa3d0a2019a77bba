"""Targeted freezing: train some of the model's weights and leave the others unchanged.

theta_i <- theta_i - eta g_i    for i in the chosen set;    all other theta_i stay, to the bit
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from peft_lite.method import InPlace, Method, MethodSpec
from peft_lite.options import block_numbers, names, option
from peft_lite.select import (
    Patterns,
    check_layers,
    check_patterns,
    in_layers,
    select_parameters,
)
from peft_lite.wrapper import named_weights

FROZEN = ("attention", "embeddings")  # by a command that is given no names


@dataclass(frozen=True)
class FreezeConfig:
    """Either `train`, patterns of the parameters that train, or `freeze`, of those that do not.

    A list holds whole parts of parameter names (`["attention", "embeddings"]`), a string is a
    regular expression searched in them; see `peft_lite.select.select_parameters`.  With
    `layers_to_transform` they match only parameters in the blocks of these numbers.
    """

    train: Patterns | None = field(
        default=None,
        metadata=option(
            "train",
            "parts of parameter names; only these train",
            list[str],
            shown="",
            read=names,
        ),
    )
    freeze: Patterns | None = field(
        default=None,
        metadata=option(
            "freeze",
            "parts of parameter names; all others train",
            list[str],
            shown=" ".join(FROZEN),
            read=names,
        ),
    )
    layers_to_transform: Sequence[int] | int | None = field(
        default=None,
        metadata=option(
            "layers", "in these blocks only, as in 6-11 or 0,2", str, shown="", read=block_numbers
        ),
    )

    def __post_init__(self) -> None:
        if (self.train is None) == (self.freeze is None):
            raise ValueError("give either train= or freeze=, the patterns of one of the two")
        for name in ("train", "freeze"):
            if getattr(self, name) is not None:
                check_patterns(name, getattr(self, name))
        check_layers(self.layers_to_transform)


def chosen(model: nn.Module, config: FreezeConfig) -> set[str]:
    """Native names of the parameters that train.  Raises ValueError when none would."""
    weights = dict(named_weights(model))
    named = select_parameters(
        model, (config.freeze if config.train is None else config.train) or ()
    )
    within = {name: weights[name] for name in named}
    within = in_layers(within, config.layers_to_transform)
    if config.train is not None:
        return set(within)
    frozen = {id(p) for p in within.values()}
    left = {name for name, p in weights.items() if id(p) not in frozen}
    if not left:
        raise ValueError(f"freeze={config.freeze!r} leaves nothing to train")
    return left


def build(model: nn.Module, config: FreezeConfig) -> Method:
    names = chosen(model, config)
    weights = {name: InPlace(p, keep=False) for name, p in named_weights(model) if name in names}
    return Method("freeze", config, {}, weights)


def from_options(given: dict[str, Any]) -> FreezeConfig:
    """The config of a command's options."""
    if "train" in given and "freeze" in given:
        raise ValueError("give either --train or --freeze, not both")
    return FreezeConfig(**given if "train" in given else {"freeze": FROZEN, **given})


METHOD = MethodSpec(
    "freeze",
    FreezeConfig,
    build,
    lr=5e-5,
    peft_types=("FREEZE",),
    from_options=from_options,
)
