"""DoRA: weight-decomposed low-rank adaptation.  Liu et al. 2024, https://arxiv.org/abs/2402.09353

    W'_i = m_i V_i / |V_i|,   V = W + s B A          row i of the weight, the norm over the inputs
    y    = g * (x W^T + s (drop(x) A^T) B^T) + b,    g = m / |V|
         = g * (base(x) - b + s (drop(x) A^T) B^T) + b

m starts as |W|, so that W' = W at first.  The bias stays outside: m scales the weight alone.
The norm is a constant for the gradient (the paper's section 4.3), and for a second one, unless
`detach_norm` is False.
Of an embedding table (V, D) the columns are decomposed: the norm runs over the vocabulary.  Its
padding row stays.

R (in + out) + out parameters for each layer.  HF PEFT differs in training with dropout, where it
drops inputs of W too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minigpt_kernels import lora_linear
from peft_lite import lora
from peft_lite.lora import LoraConfig, LoraEmbedding, LoraLinear, plain_linear
from peft_lite.method import Method, MethodSpec
from peft_lite.wrapper import dense_weight, wide


@dataclass(frozen=True)
class DoraConfig(LoraConfig):
    """LoRA's fields; HF PEFT writes the same with `use_dora`.

    Attributes:
        detach_norm: treat |V| as a constant in the backward pass.
    """

    detach_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.detach_norm, bool):
            raise ValueError(f"detach_norm is {self.detach_norm!r}, must be true or false")


class DoraLinear(LoraLinear):
    """A linear layer whose weight has its magnitude (out,) and its direction trained apart."""

    def __init__(self, base: nn.Module, r: int, alpha: float, config: LoraConfig) -> None:
        super().__init__(base, r, alpha, config)
        self.detach_norm = getattr(config, "detach_norm", True)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(dense_weight(self.layer), dim=1))

    def norm(self) -> Tensor:
        """|W + s B A| over the inputs, (out,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            return torch.linalg.vector_norm(dense_weight(self.layer) + self.delta(), dim=1)

    def changed(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        s, p = self.scaling, self.dropout if self.training else 0.0
        W = plain_linear(self.base)
        if W is None:
            return self.add_update(self.base(x), x)
        # y = g (x W^T + s (drop(x) A^T) B^T) + b
        return self.scale(lora_linear(x, W[0], None, A, B, s, p))

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """g (y - b + s (drop(x) A^T) B^T) + b"""
        v, b = y.to(wide(y.dtype)), self.layer.bias
        v = (v if b is None else v - b) + self.update(x)
        return self.scale(v).to(y.dtype)

    def scale(self, v: Tensor) -> Tensor:
        """g v + b, (..., out)"""
        y, b = gain(self.magnitude, self.norm()) * v, self.layer.bias  # in float32
        return (y if b is None else y + b).to(v.dtype)

    def new_weights(self) -> dict[str, Tensor]:
        v = dense_weight(self.layer) + self.delta()
        return {"weight": gain(self.magnitude, self.norm())[:, None] * v}

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "lora_magnitude_vector": self.magnitude.data}


class DoraEmbedding(LoraEmbedding):
    """An embedding table whose columns have their magnitude (D,) and direction trained apart."""

    def __init__(self, base: nn.Module, r: int, alpha: float, config: LoraConfig) -> None:
        super().__init__(base, r, alpha, config)
        if self.layer.max_norm is not None:
            raise ValueError("a table that rescales its rows to max_norm has no fixed magnitude")
        self.detach_norm = getattr(config, "detach_norm", True)
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(dense_weight(self.layer), dim=0))

    def norm(self) -> Tensor:
        """|E + s (B A)^T| over the vocabulary, (D,)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            return torch.linalg.vector_norm(dense_weight(self.layer) + self.delta(), dim=0)

    def add_update(self, y: Tensor, ids: Tensor) -> Tensor:
        """g (y + s A^T[id] B^T)"""
        return (self.gain(ids) * (y + self.update(ids))).to(y.dtype)

    def gain(self, ids: Tensor) -> Tensor:
        """g (D,), for a table with a padding row (..., D): that row stays."""
        g, padding = gain(self.magnitude, self.norm()), self.layer.padding_idx
        return g if padding is None else torch.where((ids == padding)[..., None], 1, g)

    def new_weights(self) -> dict[str, Tensor]:
        v = dense_weight(self.layer) + self.delta()
        return {"weight": self.gain(torch.arange(len(v), device=v.device)) * v}

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "lora_magnitude_vector": self.magnitude.data}


def gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """g = m / |V|; 1 for a row of zeros, which has no direction."""
    zero = norm == 0
    return torch.where(zero, 1, magnitude / torch.where(zero, 1, norm))


def build(model: nn.Module, config: DoraConfig) -> Method:
    return lora.build(model, config, DoraLinear, DoraEmbedding)


def to_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """Its lines of `adapter_config.json`: LoRA's with `use_dora`."""
    through_norm = {} if method.config.detach_norm else {"detach_norm": False}
    return {**lora.to_json(model, method), "use_dora": True, **through_norm}


def from_json(raw: Mapping[str, Any]) -> LoraConfig | None:
    """The config; None for a LoRA, which has the same `peft_type`."""
    return lora.read(raw, DoraConfig) if raw.get("use_dora") else None


METHOD = MethodSpec("dora", DoraConfig, build, 1e-3, ("LORA",), to_json, from_json)
