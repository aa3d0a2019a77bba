"""Bias tuning (BitFit).  Ben Zaken et al. 2022, https://arxiv.org/abs/2106.10199

    y = W x + b        b <- b - eta dL/db,    dL/db = sum over rows of dL/dy;    W stays

The model's own biases train, those of linear layers and of norms; nothing is added to a forward
pass.  The parameters are all biases: 0.06 % of GPT-Neo-125M, 0.09 % of BERT-base.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from peft_lite import saved
from peft_lite.method import InPlace, Method, MethodSpec
from peft_lite.options import target
from peft_lite.select import Patterns, check_patterns, select_parameters
from peft_lite.wrapper import named_weights


@dataclass(frozen=True)
class BiasConfig:
    """Which biases train.

    Attributes:
        target_modules: parts of the names of the modules whose biases train, or a regular
            expression searched in the names of biases; None: all biases.
        modules_to_save: modules that train whole beside them, a classifier for instance.
    """

    target_modules: Patterns | None = field(default=None, metadata=target(shown="all"))
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.target_modules is not None:
            check_patterns("target_modules", self.target_modules)
        saved.check(self.modules_to_save)


def build(model: nn.Module, config: BiasConfig) -> Method:
    wrappers = saved.add(model, config.modules_to_save, {})
    weights = select(model, config.target_modules)
    return Method("bias", config, wrappers, saved.outside(weights, wrappers))


def select(model: nn.Module, patterns: Patterns | None) -> dict[str, InPlace]:
    """The model's biases that the patterns name, all with None."""
    biases = {name: p for name, p in named_weights(model) if name.rsplit(".", 1)[-1] == "bias"}
    if patterns is not None:
        chosen = select_parameters(model, patterns)
        biases = {name: p for name, p in biases.items() if name in chosen}
    if not biases:
        what = "no bias" if patterns is None else f"no bias that {patterns!r} names"
        raise ValueError(f"{type(model).__name__} has {what}")
    return {name: InPlace(p) for name, p in biases.items()}


def of_layers(layers: Mapping[str, nn.Module]) -> dict[str, InPlace]:
    """The biases of these layers."""
    biases = {f"{name}.bias": getattr(layer, "bias", None) for name, layer in layers.items()}
    return {name: InPlace(p) for name, p in biases.items() if isinstance(p, nn.Parameter)}


METHOD = MethodSpec("bias", BiasConfig, build, lr=1e-3, peft_types=("BIAS",))
