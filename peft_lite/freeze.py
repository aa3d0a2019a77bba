"""Targeted freezing: train some of the weights that are there, leave the rest as they are.

theta_i <- theta_i - eta g_i    for i in the chosen set;    all other theta_i stay, to the bit
"""

from dataclasses import dataclass

from torch import nn

from peft_lite.select import Patterns, select_parameters


@dataclass(frozen=True)
class FreezeConfig:
    """Either `train`, the patterns of what trains, or `freeze`, the patterns of what does not.

    A list holds whole parts of parameter names (`["attention", "embeddings"]`), a string is a
    regular expression searched in them; see `peft_lite.select.select_parameters`.
    """

    train: Patterns | None = None
    freeze: Patterns | None = None

    def __post_init__(self) -> None:
        if (self.train is None) == (self.freeze is None):
            raise ValueError("give either train= or freeze=, the patterns of one of the two")


def chosen(model: nn.Module, config: FreezeConfig) -> set[str]:
    """Native names of the parameters that train.  Raises ValueError when none would."""
    names = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    if config.train is not None:
        return select_parameters(model, config.train)
    left = names - select_parameters(model, config.freeze or ())
    if not left:
        raise ValueError(f"freeze={config.freeze!r} leaves nothing to train")
    return left
