"""LoRA: low-rank adaptation.  Hu et al. 2021, https://arxiv.org/abs/2106.09685

    W' = W + s B A        y = x W'^T + b = x W^T + b + s (drop(x) A^T) B^T

    A (R, in)   uniform in +-1/sqrt(in)         s = alpha / R, or alpha / sqrt(R) with use_rslora
    B (out, R)  zero, so that W' = W at first   (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)

R (in + out) parameters for each layer.  A and B are float32 (float64 under a float64 layer)
whatever the layer's dtype; the products run in the dtype of x, and y has it too.

Shapes:  R rank   in, out: the layer's widths
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from kernels import lora_linear
from peft_lite.select import Patterns, resolve_pattern, select_modules


@dataclass(frozen=True)
class LoraConfig:
    """Fields, names and defaults of HF PEFT's LoraConfig, but for `target_modules`, which has none.

    Attributes:
        target_modules: a list of names or their ends, a regular expression over the whole name, or
            "all-linear".
        r, lora_alpha: rank R and the numerator of s.
        lora_dropout: probability of dropping an input of A while training.
        use_rslora: s = alpha / sqrt(R).
        rank_pattern, alpha_pattern: other values for the layers whose name ends in a key (a regular
            expression).
    """

    target_modules: Patterns
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.target_modules, str) and not (
            isinstance(self.target_modules, Sequence)
            and all(isinstance(name, str) for name in self.target_modules)
        ):
            raise ValueError(
                f"target_modules is {self.target_modules!r}, must be names or a string"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} is {getattr(self, name)!r}, must be a dictionary")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora is {self.use_rslora!r}, must be true or false")
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"rank r is {r}, must be a whole number of at least 1")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                raise ValueError(f"lora_alpha is {alpha}, must be a positive number")
        p = self.lora_dropout
        if not isinstance(p, int | float) or not 0 <= p < 1:
            raise ValueError(f"lora_dropout is {self.lora_dropout}, must lie in [0, 1)")


class LoraLinear(nn.Module):
    """A linear layer with an update of rank R beside it."""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float, rslora: bool) -> None:
        super().__init__()
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        new = base.weight.new_zeros
        self.base = base
        self.lora_a = nn.Parameter(new(r, base.in_features, dtype=dtype))
        self.lora_b = nn.Parameter(new(base.out_features, r, dtype=dtype))
        self.alpha = alpha
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.dropout = dropout
        self.original: Tensor | None  # W, while the base holds W'; a buffer, to move with the model
        self.register_buffer("original", None, persistent=False)
        bound = 1 / math.sqrt(base.in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        if self.original is not None:
            return self.base(x)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(
            x, self.base.weight, self.base.bias, self.lora_a, self.lora_b, self.scaling, dropout
        )

    @torch.no_grad()
    def delta(self) -> Tensor:
        """S B A, (out, in)."""
        return self.scaling * (self.lora_b @ self.lora_a)

    @torch.no_grad()
    def merge(self) -> None:
        """W <- W + s B A, summed in A's dtype.  W itself is kept."""
        self.original = self.base.weight.data
        merged = self.original.to(self.lora_a.dtype) + self.delta()
        self.base.weight.data = merged.to(self.original.dtype)

    def unmerge(self) -> None:
        """Puts W back, to the bit."""
        if self.original is not None:
            self.base.weight.data = self.original
            self.original = None


def wrap(model: nn.Module, config: LoraConfig) -> dict[str, LoraLinear]:
    """A LoraLinear for each layer that the config names; the model itself is not touched."""
    layers = select_modules(model, config.target_modules)
    for name, layer in layers.items():
        if not name:
            raise ValueError("the model is itself a linear layer: put it into a module of its own")
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            raise ValueError(f"{name}: nn.MultiheadAttention reads the weight past the layer")
    ranks = resolve_pattern(model, layers, config.rank_pattern, "rank_pattern")
    alphas = resolve_pattern(model, layers, config.alpha_pattern, "alpha_pattern")
    return {
        name: LoraLinear(
            layer,
            ranks.get(name, config.r),
            alphas.get(name, config.lora_alpha),
            config.lora_dropout,
            config.use_rslora,
        )
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear)
    }
