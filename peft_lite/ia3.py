"""IA3: infused adapter by inhibiting and amplifying activations.
Liu et al. 2022, https://arxiv.org/abs/2205.05638

    y = l * (x W^T + b)      keys and values: l (out,) scales what the layer gives
    y = (l * x) W^T + b      feed-forward:    l (in,) scales what it gets

l starts at 1.  out or in parameters for each layer.  Merged, W' = diag(l) W and b' = l * b, or
W' = W diag(l).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_lite import fields, saved
from peft_lite.method import Method, MethodSpec
from peft_lite.options import names, option, target
from peft_lite.select import Patterns, check_patterns, hf_name, select_modules
from peft_lite.wrapper import Copied, WeightWrapper, Wrapper, dense_weight, wide

PAPER, PAPER_FEEDFORWARD = ("key", "value", "mlp.down"), ("mlp.down",)


@dataclass(frozen=True)
class IA3Config:
    """Fields of HF PEFT's IA3Config.

    Attributes:
        target_modules: linear layers to scale, `["key", "value", "mlp.down"]` in the paper.
        feedforward_modules: those of them whose input is scaled, `["mlp.down"]` in the paper.
        modules_to_save: modules that train whole, as copies, and are saved with the vectors.
    """

    target_modules: Patterns = field(metadata=target(shown=" ".join(PAPER)))
    feedforward_modules: Patterns = field(
        default=(),
        metadata=option(
            "feedforward",
            "those of the targets whose input is scaled, not their output",
            list[str],
            shown=f"none; without --target: {' '.join(PAPER_FEEDFORWARD)}",
            read=names,
        ),
    )
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_patterns("target_modules", self.target_modules)
        check_patterns("feedforward_modules", self.feedforward_modules)
        saved.check(self.modules_to_save)


class IA3Output(WeightWrapper):
    """A linear layer whose outputs are scaled by l (out,)."""

    depth = 1

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.scale = ones(self.layer, self.layer.out_features)

    def changed(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return (self.scale * y).to(y.dtype)  # in float32: 1.003 is 1 in bfloat16

    def new_weights(self) -> dict[str, Tensor]:
        new = {"weight": self.scale[:, None] * dense_weight(self.base)}
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        if bias is not None:
            new["bias"] = self.scale * bias
        return new

    def tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.scale.data[:, None]}


class IA3Input(WeightWrapper):
    """A linear layer whose inputs are scaled by l (in,)."""

    depth = 1

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.scale = ones(self.layer, self.layer.in_features)

    def changed(self, x: Tensor) -> Tensor:
        y: Tensor = self.base((self.scale * x).to(x.dtype))
        return y

    def new_weights(self) -> dict[str, Tensor]:
        return {"weight": dense_weight(self.base) * self.scale}

    def tensors(self) -> dict[str, Tensor]:
        return {"ia3_l": self.scale.data[None, :]}


def ones(layer: nn.Module, width: int) -> nn.Parameter:
    """l (width,) at its start, in float32 or wider, on the layer's device."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return nn.Parameter(torch.ones(width, dtype=wide(weight.dtype), device=weight.device))


def build(model: nn.Module, config: IA3Config) -> Method:
    """A scaled layer for each layer that the config names."""
    layers = select_modules(model, config.target_modules)
    scaled_before: set[str] = set()
    if config.feedforward_modules:
        scaled_before = set(select_modules(model, config.feedforward_modules))
        if stray := sorted(scaled_before - layers.keys()):
            raise ValueError(f"feedforward_modules: {stray[0]} is none of the target_modules")
    wrappers: dict[str, Wrapper] = {
        name: IA3Input(layer) if name in scaled_before else IA3Output(layer)
        for name, layer in layers.items()
    }
    return Method("ia3", config, saved.add(model, config.modules_to_save, wrappers))


def to_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """Its lines of `adapter_config.json`."""
    layers = {n: w for n, w in method.wrappers.items() if not isinstance(w, Copied)}
    inputs = {hf_name(model, n) for n, w in layers.items() if isinstance(w, IA3Input)}
    targets = fields.targets(model, layers)
    # PEFT wants some of the targets, and matches them with no dot before
    ends = [t for t in targets if any(n.endswith(t) for n in inputs)]
    scaled = {hf_name(model, n) for n in layers if hf_name(model, n).endswith(tuple(ends))}
    listed = isinstance(targets, list) and scaled == inputs
    return {
        "peft_type": "IA3",
        "target_modules": targets,
        "feedforward_modules": ends if listed else fields.whole_names(inputs),
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def from_json(raw: Mapping[str, Any]) -> IA3Config:
    """The config."""
    return IA3Config(**fields.read_targeted(raw, IA3Config, {"init_ia3_weights"}))


def from_options(given: dict[str, Any]) -> IA3Config:
    """The config of a command's options: without targets the paper's."""
    if "target_modules" not in given:
        given = {"target_modules": PAPER, "feedforward_modules": PAPER_FEEDFORWARD, **given}
    return IA3Config(**given)


METHOD = MethodSpec("ia3", IA3Config, build, 3e-3, ("IA3",), to_json, from_json, from_options)
