"""LoRA: low-rank adaptation.  Hu et al. 2021, https://arxiv.org/abs/2106.09685

    W' = W + s B A        y = x W'^T + b = x W^T + b + s (drop(x) A^T) B^T
                            = base(x) + s (drop(x) A^T) B^T

    A (R, in)   uniform in +-1/sqrt(in)         s = alpha / R, or alpha / sqrt(R) with use_rslora
    B (out, R)  zero, so that W' = W at first   (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)

An embedding table E (V, D) is the layer of the one-hot rows:

    E' = E + s (B A)^T    y = E[id] + s A^T[id] B^T     A (R, V) zero, B (D, R) normal

R (in + out) parameters for each layer.  `init_lora_weights` starts A and B elsewhere
(peft_lite/starts.py, peft_lite/loftq.py).  A and B are float32 (float64 under a float64 layer)
whatever the layer's dtype; the products run in the dtype of x, and y has it too.

Shapes:  R rank   in, out: the layer's widths   V, D: the table's
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from minigpt_kernels import lora_linear
from peft_lite import bias, fields, saved
from peft_lite.method import Method, MethodSpec
from peft_lite.options import block_numbers, option, target
from peft_lite.select import (
    Patterns,
    check_layers,
    check_patterns,
    in_layers,
    nearest,
    resolve_pattern,
    select_modules,
)
from peft_lite.starts import STARTS
from peft_lite.wrapper import WeightWrapper, Wrapper, dense_weight, is_dense, wide, without_autocast

MAX = torch.finfo(torch.float32).max
START_NAMES = (*STARTS, "loftq")

logger = logging.getLogger(__name__)


def start_named(name: str) -> str | bool:
    """The word of a command -> `init_lora_weights`."""
    return True if name == "true" else name


@dataclass(frozen=True)
class LoraConfig:
    """Fields, names and defaults of HF PEFT's LoraConfig, but for `target_modules`, which has none.

    Attributes:
        target_modules: linear and embedding layers; the ends of their names, a regular expression
            for the whole name, or "all-linear": all but the head and what trains whole.
        r, lora_alpha: rank R and the numerator of s.
        lora_dropout: probability of dropping an input of A while training (not of an embedding).
        use_rslora: s = alpha / sqrt(R).
        init_lora_weights: where A and B start.  True: as above; "pissa" or "olora": at a part of W,
            linear layers only (peft_lite/starts.py); "loftq": at what 4 bits lose of W, by
            `attach_quantized` only (peft_lite/loftq.py).
        rank_pattern, alpha_pattern: other values for the layers whose name ends in a key (a regular
            expression).
        layers_to_transform: numbers of the blocks to target; None: all.
        bias: "none", "all" the model's biases, or those of the targeted layers, "lora_only".
        modules_to_save: modules that train whole, as copies, and are saved with the adapter.
    """

    target_modules: Patterns = field(metadata=target(", or all-linear", default=("query", "value")))
    r: int = field(default=8, metadata=option("rank", "rank r", int))
    lora_alpha: float = field(
        default=8,
        metadata=option("alpha", "numerator of the scaling alpha / r", float, default=16.0),
    )
    lora_dropout: float = field(
        default=0.0, metadata=option("lora_dropout", "dropout before A", float)
    )
    use_rslora: bool = False
    init_lora_weights: bool | str = field(
        default=True,
        metadata=option(
            "init_lora_weights",
            "start of A and B: random and zero, or a part of the weight",
            str,
            shown="true",
            choices=("true", *STARTS),
            read=start_named,
        ),
    )
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: Sequence[int] | int | None = field(
        default=None,
        metadata=option(
            "layers", "in these blocks only, as in 6-11 or 0,2", str, shown="", read=block_numbers
        ),
    )
    bias: str = "none"
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_patterns("target_modules", self.target_modules)
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = getattr(self, name)
            if not isinstance(pattern, dict) or not all(isinstance(key, str) for key in pattern):
                raise ValueError(f"{name} is {pattern!r}, must be a dictionary with names as keys")
        if not isinstance(self.use_rslora, bool):
            raise ValueError(f"use_rslora is {self.use_rslora!r}, must be true or false")
        start = self.init_lora_weights
        if start is not True and start not in START_NAMES:
            names = ", ".join(map(repr, START_NAMES))
            raise ValueError(
                f"init_lora_weights is {start!r}, must be True, {names}"
                f"{nearest(start, START_NAMES)}"
            )
        for r in (self.r, *self.rank_pattern.values()):
            if not isinstance(r, int) or isinstance(r, bool) or r < 1:
                raise ValueError(f"rank r is {r!r}, must be a whole number of at least 1 (an int)")
        for alpha in (self.lora_alpha, *self.alpha_pattern.values()):
            if not _is_number(alpha) or not 0 < alpha <= MAX:
                raise ValueError(
                    f"lora_alpha is {alpha!r}, must be a positive number (an int or float)"
                )
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"lora_dropout is {self.lora_dropout!r}, must lie in [0, 1) (an int or float)"
            )
        check_layers(self.layers_to_transform)
        if self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f"bias is {self.bias!r}, must be 'none', 'all' or 'lora_only'")
        saved.check(self.modules_to_save)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class LoraLayer(WeightWrapper):
    """An update of rank R beside a layer: what linear and embedding layers share.

    Attributes:
        lora_a, lora_b: A (R, in) and B (out, R).
        start_a, start_b: A0 and B0, where W' = W + s (B A - B0 A0); None: W' = W + s B A.
        rows: inside `handle.rows`, the rows of the batch that this adapter changes and the size
            of that batch; None: it changes all.
    """

    takes_rows = True
    start_a: Tensor | None
    start_b: Tensor | None

    def __init__(
        self, base: nn.Module, inputs: int, outputs: int, r: int, alpha: float, rslora: bool
    ) -> None:
        super().__init__(base)
        weight = self.layer.weight
        dtype, device = wide(weight.dtype), weight.device
        self.lora_a = nn.Parameter(torch.zeros(r, inputs, dtype=dtype, device=device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, r, dtype=dtype, device=device))
        self.register_buffer("start_a", None)
        self.register_buffer("start_b", None)
        self.alpha = alpha
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r
        self.rows: tuple[Tensor, int] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.active or self.merged:
            y: Tensor = self.base(input)
            return y
        return self.changed(input) if self.rows is None else self.changed_rows(input)

    def take_rows(self, rows: Tensor | None, batch: int = 0) -> None:
        self.rows = None if rows is None else (rows, batch)

    def changed_rows(self, x: Tensor) -> Tensor:
        """What the base gives, and in its rows of the batch the update."""
        assert self.rows is not None
        rows, batch = self.rows
        if len(x) != batch:
            raise ValueError(f"rows were named for a batch of {batch}, a layer gets {len(x)}")
        y: Tensor = self.base(x)
        return y.index_copy(0, rows, self.add_update(y[rows], x[rows])) if len(rows) else y

    def add_update(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output, given the base's output y for the same x."""
        return y + self.update(x).to(y.dtype)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the change s B A of W, those of its file."""
        A, B, A0, B0 = self.lora_a, self.lora_b, self.start_a, self.start_b
        if A0 is None or B0 is None:
            return A, B
        # s (B A - B0 A0) = s [B, B - B0] [A - A0; A0]
        return torch.cat([A - A0, A0]), torch.cat([B, B - B0], 1)

    def update(self, x: Tensor) -> Tensor:
        """What A and B give for x."""
        raise NotImplementedError

    def delta(self) -> Tensor:
        """s B A, in the shape of the layer's weight."""
        raise NotImplementedError

    def new_weights(self) -> dict[str, Tensor]:
        """W + s B A, summed in A's dtype."""
        if self.rows is not None:
            raise ValueError("inside handle.rows each row has a weight of its own")
        return {"weight": dense_weight(self.layer) + self.delta()}


class LoraLinear(LoraLayer):
    """A linear layer with an update of rank R beside it."""

    def __init__(self, base: nn.Module, r: int, alpha: float, config: LoraConfig) -> None:
        out_features, in_features = dense_shape(base)
        super().__init__(base, in_features, out_features, r, alpha, config.use_rslora)
        self.dropout = config.lora_dropout
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.lora_a, -bound, bound)
        if start := STARTS.get(str(config.init_lora_weights)):
            with torch.no_grad():
                A0, B0 = start(dense_weight(self.layer), r, self.scaling)
                self.start_a, self.start_b = A0, B0
                self.lora_a.copy_(A0)
                self.lora_b.copy_(B0)

    def changed(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)"""
        A, B = self.factors()
        s, p = self.scaling, self.dropout if self.training else 0.0
        W = plain_linear(self.base)
        # y = base(x) + s (drop(x) A^T) B^T, in one fused product where base(x) is x W^T + b
        return lora_linear(x, *W, A, B, s, p) if W else self.add_update(self.base(x), x)

    def update(self, x: Tensor) -> Tensor:
        """s (drop(x) A^T) B^T"""
        A, B = (factor.to(x.dtype) for factor in self.factors())
        return self.scaling * (F.dropout(x, self.dropout, self.training) @ A.T @ B.T)

    def delta(self) -> Tensor:
        A, B = self.factors()
        return self.scaling * product(B, A)

    def tensors(self) -> dict[str, Tensor]:
        A, B = self.factors()
        return {"lora_A.weight": A.data, "lora_B.weight": B.data}


class LoraEmbedding(LoraLayer):
    """An embedding table with an update of rank R beside it."""

    def __init__(self, base: nn.Module, r: int, alpha: float, config: LoraConfig) -> None:
        V, D = dense_shape(base)
        super().__init__(base, V, D, r, alpha, config.use_rslora)
        nn.init.normal_(self.lora_b)

    def changed(self, ids: Tensor) -> Tensor:
        """(...) -> (..., D)"""
        # y = base(id) + s A^T[id] B^T
        return self.add_update(self.base(ids), ids)

    def update(self, ids: Tensor) -> Tensor:
        """s A^T[id] B^T; a padding row of A^T gets no gradient and stays zero.

        A table that scales its rows, as Gemma's does, scales these, too.
        """
        rows = F.embedding(ids, self.lora_a.T, self.layer.padding_idx)
        return self.scaling * (rows @ self.lora_b.T) * getattr(self.layer, "embed_scale", 1.0)

    def delta(self) -> Tensor:
        return self.scaling * product(self.lora_b, self.lora_a).T

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_embedding_A": self.lora_a.data, "lora_embedding_B": self.lora_b.data}


def product(b: Tensor, a: Tensor) -> Tensor:
    """B A in their own dtype, inside autocast, too: a merged weight keeps its digits."""
    with without_autocast(a):
        return b @ a


def build(
    model: nn.Module,
    config: LoraConfig,
    linear: type[LoraLinear] = LoraLinear,
    embedding: type[LoraEmbedding] = LoraEmbedding,
) -> Method:
    """A LoRA layer for each layer that the config names; the model itself is not touched."""
    if config.init_lora_weights == "loftq":
        raise ValueError(
            "init_lora_weights 'loftq' puts the base into 4 bits: call attach_quantized instead"
        )
    layers = select_modules(model, config.target_modules, (nn.Linear, nn.Embedding))
    if config.target_modules == "all-linear":
        layers = saved.beside(model, config.modules_to_save, layers)
    layers = in_layers(layers, config.layers_to_transform)
    for name, layer in layers.items():
        if not name:
            raise ValueError("the model is itself a layer: put it into a module of its own")
        if isinstance(layer, NonDynamicallyQuantizableLinear) and config.lora_dropout:
            raise ValueError(
                f"{name}: nn.MultiheadAttention reads the weight past the layer, so that "
                f"lora_dropout, which is {config.lora_dropout}, would not act: must be 0"
            )
    ranks = resolve_pattern(model, layers, config.rank_pattern, "rank_pattern")
    alphas = resolve_pattern(model, layers, config.alpha_pattern, "alpha_pattern")
    wrappers: dict[str, Wrapper] = {}
    for name, layer in layers.items():
        r, alpha = ranks.get(name, config.r), alphas.get(name, config.lora_alpha)
        if config.init_lora_weights is not True:
            check_start(name, layer, r, config.init_lora_weights)
        elif r > min(dense_shape(layer)):
            logger.warning("%s: rank %d is above what its %s can use", name, r, layer)
        kind = linear if isinstance(layer, nn.Linear) else embedding
        wrappers[name] = kind(layer, r, alpha, config)
    weights = {}
    if config.bias == "all":
        weights = bias.select(model, None)
    elif config.bias == "lora_only":
        weights = bias.of_layers(layers)
    wrappers = saved.add(model, config.modules_to_save, wrappers)
    return Method("lora", config, wrappers, saved.outside(weights, wrappers))


def check_start(name: str, layer: nn.Module, r: int, start: bool | str) -> None:
    """Refuses a layer whose weight cannot give A and B their start."""
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{name} is no linear layer: init_lora_weights {start!r} cannot start it")
    if r > (most := min(dense_shape(layer))):
        raise ValueError(
            f"{name}: rank r is {r}, must be at most {most}, the rank of the weight that "
            f"init_lora_weights {start!r} takes apart"
        )
    W = dense_weight(layer)
    if not (W.is_meta or W.isfinite().all()):
        raise ValueError(f"{name}.weight holds NaN or an infinite number")


def plain_linear(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """W and b where base(x) is x W^T + b and nothing more, so that a fused product can compute it.

    None where the base has to be called: a class with a forward pass of its own, hooks, a weight
    that is parametrized, pruned or packed (int8, 4-bit), or another method that acts.  A class
    states that its forward pass is x W^T + b by `plain_linear = forward`.
    """
    if _has_any_global_hook():
        return None
    while True:
        if base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__:
            return None
        if base._backward_hooks or base._backward_pre_hooks:
            return None
        if not isinstance(base, Wrapper):
            break
        if base.acts:
            return None
        base = base.base
    kind, weight, bias = type(base), base._parameters.get("weight"), base._parameters.get("bias")
    if kind.forward not in (nn.Linear.forward, getattr(kind, "plain_linear", None)):
        return None
    return None if weight is None or not is_dense(weight) else (weight, bias)


def dense_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer, (V, D) of an embedding table."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, nn.Embedding)
    return layer.num_embeddings, layer.embedding_dim


# starts in files that leave W as it was, so that W + s B A is right however A and B started
PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
HARMLESS = {"ensure_weight_tying", "eva_config", "megatron_core", "qalora_group_size"}
HARMLESS |= {
    "fan_in_fan_out"
}  # how the base holds its weight; PEFT itself goes by the layer's class


def to_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """Its lines of `adapter_config.json`."""
    config = method.config
    layers = {n: w for n, w in method.wrappers.items() if isinstance(w, LoraLayer)}
    # B A - B0 A0 has rank 2 R; its alpha gives the same s
    ranks_up = 1 if config.init_lora_weights is True else 2
    alphas_up = math.sqrt(ranks_up) if config.use_rslora else ranks_up
    r, alpha = ranks_up * config.r, alphas_up * config.lora_alpha
    ranks = {name: ranks_up * len(layer.lora_a) for name, layer in layers.items()}
    alphas = {name: alphas_up * layer.alpha for name, layer in layers.items()}
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": False,
        "target_modules": fields.targets(model, layers),
        "rank_pattern": fields.pattern(model, ranks, r),
        "alpha_pattern": fields.pattern(model, alphas, alpha),
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def read(raw: Mapping[str, Any], config: type[LoraConfig]) -> LoraConfig:
    """A LoRA's or DoRA's config from `adapter_config.json`."""
    if (start := raw.get("init_lora_weights")) not in PLAIN_STARTS:
        raise ValueError(
            f"init_lora_weights = {start!r} is not supported: such a file is for a base that HF "
            "PEFT changed, and does not hold it; let PEFT convert it to a plain LoRA"
        )
    raw = {name: value for name, value in raw.items() if name != "init_lora_weights"}
    return config(**fields.read_targeted(raw, config, HARMLESS | {"use_dora"}))


def from_json(raw: Mapping[str, Any]) -> LoraConfig | None:
    """The config; None for a DoRA, which has the same `peft_type`."""
    return None if raw.get("use_dora") else read(raw, LoraConfig)


METHOD = MethodSpec("lora", LoraConfig, build, 1e-3, ("LORA",), to_json, from_json)
