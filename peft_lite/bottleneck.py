"""Bottleneck adapters: a small network beside or after a part of each block.

    h' = h + W_up sigma(W_down h + b_down) + b_up     h what the part gives: houlsby, pfeiffer
    h' = h + W_up sigma(W_down x + b_down) + b_up     x what the part gets:  parallel

houlsby   after attention and after the MLP   Houlsby et al. 2019, https://arxiv.org/abs/1902.00751
pfeiffer  after the MLP                       Pfeiffer et al. 2021, https://arxiv.org/abs/2005.00247
parallel  beside the MLP                      He et al. 2022, https://arxiv.org/abs/2110.04366

They act inside the block, before dropout, residual and norm.  W_up and b_up start at 0, so that
h' = h at first.  2 D R + R + D parameters each.  Not as in the papers: norms do not train along
(Houlsby's do), and the parallel form has no factor before it.

Shapes:  D width   R width of the bottleneck
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peft_lite import saved
from peft_lite.method import Method, MethodSpec
from peft_lite.options import option, target
from peft_lite.select import Patterns, check_patterns, nearest, select_modules
from peft_lite.wrapper import Wrapper, check_weight, named_layers, wide

PLACES = {
    "houlsby": ("attention.output", "mlp.down"),
    "pfeiffer": ("mlp.down",),
    "parallel": ("mlp",),
}
NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class BottleneckConfig:
    """Where the adapters stand and how wide they are.

    Attributes:
        placement: "houlsby", "pfeiffer" or "parallel".
        r: width R of the bottleneck.
        non_linearity: sigma, "relu", "gelu", "silu" or "tanh".
        target_modules: the parts they stand at, by the ends of their names or a regular expression;
            None: those of the placement in the models here.
        modules_to_save: modules that train whole, as copies, and are saved with the adapters.
    """

    placement: str = field(
        default="pfeiffer", metadata=option("placement", "where", str, choices=tuple(PLACES))
    )
    r: int = field(default=64, metadata=option("rank", "rank r", int))
    non_linearity: str = "relu"
    target_modules: Patterns | None = field(default=None, metadata=target(shown="as placed"))
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("placement", PLACES), ("non_linearity", NON_LINEARITIES)):
            if (value := getattr(self, name)) not in tuple(allowed):
                raise ValueError(
                    f"{name} is {value!r}, must be one of {', '.join(allowed)}"
                    + nearest(value, allowed)
                )
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r is {self.r!r}, must be a whole number of at least 1 (an int)")
        if self.target_modules is not None:
            check_patterns("target_modules", self.target_modules)
        saved.check(self.modules_to_save)


class Bottleneck(Wrapper):
    """A part of a block with an adapter after it."""

    depth = 2
    cannot_merge = "a network with a non-linearity does not change weights"

    def __init__(self, base: nn.Module, width: int, config: BottleneckConfig) -> None:
        super().__init__(base)
        r, like = config.r, next(base.parameters())
        check_weight(base, like)
        new, dtype = like.new_zeros, wide(like.dtype)
        self.down_weight = nn.Parameter(new(r, width, dtype=dtype))
        self.down_bias = nn.Parameter(new(r, dtype=dtype))
        self.up_weight = nn.Parameter(new(width, r, dtype=dtype))
        self.up_bias = nn.Parameter(new(width, dtype=dtype))
        self.sigma = NON_LINEARITIES[config.non_linearity]
        bound = width**-0.5
        nn.init.uniform_(self.down_weight, -bound, bound)

    def changed(self, *inputs: Any, **named: Any) -> Any:
        given = self.base(*inputs, **named)
        h, *rest = given if isinstance(given, tuple) else (given,)
        y = self.add_adapter(h, *inputs)  # of several outputs the first changes
        return (y, *rest) if isinstance(given, tuple) else y

    def add_adapter(self, h: Tensor, *inputs: Any) -> Tensor:
        return h + self.adapter(h)

    def adapter(self, h: Tensor) -> Tensor:
        """W_up sigma(W_down h + b_down) + b_up, (..., D)"""
        down, down_bias, up, up_bias = (
            p.to(h.dtype) for p in (self.down_weight, self.down_bias, self.up_weight, self.up_bias)
        )
        return F.linear(self.sigma(F.linear(h, down, down_bias)), up, up_bias)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "adapter_down.weight": self.down_weight.data,
            "adapter_down.bias": self.down_bias.data,
            "adapter_up.weight": self.up_weight.data,
            "adapter_up.bias": self.up_bias.data,
        }


class ParallelBottleneck(Bottleneck):
    """A part of a block with an adapter beside it."""

    def add_adapter(self, h: Tensor, *inputs: Any) -> Tensor:
        if not inputs:
            raise ValueError("a parallel adapter reads the first input: give it without a keyword")
        x: Tensor = inputs[0]
        return h + self.adapter(x)


def build(model: nn.Module, config: BottleneckConfig) -> Method:
    """An adapter for each part of the model that the config names."""
    patterns = PLACES[config.placement] if config.target_modules is None else config.target_modules
    parts = select_modules(model, patterns, (nn.Module,))
    parallel = config.placement == "parallel"
    wrappers: dict[str, Wrapper] = {}
    for name, part in parts.items():
        layers = [m for _, m in named_layers(part) if isinstance(m, nn.Linear)]
        if not name or not layers:
            raise ValueError(f"target {name or type(part).__name__!r} holds no linear layer")
        if isinstance(part, NonDynamicallyQuantizableLinear):
            raise ValueError(f"{name}: nn.MultiheadAttention reads the weight past the layer")
        entry, width = layers[0].in_features, layers[-1].out_features
        if parallel and entry != width:
            raise ValueError(f"{name}: a parallel adapter needs as many inputs as outputs")
        wrappers[name] = (ParallelBottleneck if parallel else Bottleneck)(part, width, config)
    return Method("bottleneck", config, saved.add(model, config.modules_to_save, wrappers))


METHOD = MethodSpec("bottleneck", BottleneckConfig, build, lr=1e-3, peft_types=("BOTTLENECK",))
