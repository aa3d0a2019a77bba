"""Targeted freezing: train some of the weights that are there, leave the rest as they are.

theta_i <- theta_i - eta g_i    for i in the chosen set;    all other theta_i stay, to the bit
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peft_lite.method import InPlace, Method
from peft_lite.select import (
    Patterns,
    check_layers,
    check_patterns,
    in_layers,
    select_parameters,
)
from peft_lite.wrapper import named_weights


@dataclass(frozen=True)
class FreezeConfig:
    """Either `train`, the patterns of what trains, or `freeze`, the patterns of what does not.

    A list holds whole parts of parameter names (`["attention", "embeddings"]`), a string is a
    regular expression searched in them; see `peft_lite.select.select_parameters`.  With
    `layers_to_transform` they name what lies in the blocks of these numbers alone.
    """

    train: Patterns | None = None
    freeze: Patterns | None = None
    layers_to_transform: Sequence[int] | int | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.freeze is None):
            raise ValueError("give either train= or freeze=, the patterns of one of the two")
        for field in ("train", "freeze"):
            if getattr(self, field) is not None:
                check_patterns(field, getattr(self, field))
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
