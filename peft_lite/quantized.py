"""Linear layers that hold their weight in 4 bits, for methods to stand beside.
Dettmers et al. 2023, QLoRA, https://arxiv.org/abs/2305.14314

    y = x deq(W)^T + b                          the layer alone
    y = x deq(W)^T + b + s (drop(x) A^T) B^T    under LoRA, which needs no code for it: base(x)

The codec is minigpt_kernels/nf4.py, the product minigpt_kernels/nf4_linear.py.  A method that needs
the weight itself (DoRA's norm, merging) gets deq(W) from `dense_weight`.  Merged, the layer holds a
dense copy W' = deq(W) + s B A: to put that into 4 bits again would change it, by what
a warning says.

A layer of N x K takes about 0.516 N K bytes, against 4 N K in float32.
"""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Self, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from minigpt_kernels import nf4
from minigpt_kernels.nf4_linear import dense, nf4_linear
from peft_lite.select import head_names, nearest
from peft_lite.wrapper import Wrapper, named_layers, named_weights

CODECS = ("nf4",)
HEAD = ("head",)

logger = logging.getLogger(__name__)


class QuantizedLinear(nn.Linear):
    """A linear layer with its weight in 4 bits.

    Attributes:
        weight: the codes, uint8; while a method is merged into it, the dense weight.
        scales, scales_of_scales, offset: as in `nf4.Quantized`.
        block: numbers that share a scale.
        kind: the class of the dense layer.
        like: empty, of the dtype of the dense weight; it moves with the model.
    """

    kind: type[nn.Linear]
    scales: Tensor
    scales_of_scales: Tensor | None
    offset: Tensor | None
    like: Tensor

    def __init__(self, layer: nn.Linear, weight: nf4.Quantized) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.kind, self.block = type(layer), weight.block
        self.training = layer.training
        self.weight = nn.Parameter(weight.packed, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("scales", weight.scales)
        self.register_buffer("scales_of_scales", weight.scales_of_scales)
        self.register_buffer("offset", weight.offset)
        like = torch.empty(0, dtype=weight.dtype, device=weight.packed.device)
        self.register_buffer("like", like, persistent=False)

    @property
    def quantized(self) -> nf4.Quantized:
        """The weight in 4 bits."""
        N, K = self.out_features, self.in_features
        codes, blocks = (N * K + 1) // 2, math.ceil(N * K / self.block)
        scales, nested = self.scales, self.scales_of_scales
        return nf4.Quantized(  # the last row of `to_rows` may be longer than what it holds
            self.weight.data.view(-1)[:codes],
            scales.detach().view(-1)[:blocks],
            nested if nested is None else nested.detach(),
            *(self.offset, torch.Size((N, K)), self.dense_dtype, self.block),
        )

    def to_rows(self) -> None:
        """Stores codes and scales as parameters, in rows of 256 blocks, the last one filled up with
        zeros.  So whole rows, however they are dealt out, are whole blocks with their scales.

        weight (rows, 256 * block / 2), scales (rows, 256), scales_of_scales (rows)
        """
        rows = math.ceil(self.out_features * self.in_features / self.block / nf4.SCALE_BLOCK)
        for name in ("weight", "scales", "scales_of_scales"):
            t: Tensor | None = getattr(self, name)
            if t is None:
                continue
            width = {"weight": self.block // 2}.get(name, 1) * nf4.SCALE_BLOCK
            if name != "scales_of_scales":
                t = F.pad(t.data, (0, rows * width - t.numel())).view(rows, width)
            delattr(self, name)
            self.register_parameter(name, nn.Parameter(t, requires_grad=False))

    def to_line(self) -> None:
        """Undoes `to_rows`."""
        it = self.quantized
        self.weight = nn.Parameter(it.packed.clone(), requires_grad=False)
        for name in ("scales", "scales_of_scales"):
            t: Tensor | None = getattr(it, name)
            if t is not None:
                delattr(self, name)
                self.register_buffer(name, t.clone())

    @property
    def dense_dtype(self) -> torch.dtype:
        """Of the weight when it is dense."""
        return self.like.dtype

    def dense_weight(self) -> Tensor:
        """deq(W) (out, in), float32."""
        return dense(self.quantized, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_floating_point():  # merged
            return F.linear(x, self.weight, self.bias)
        return nf4_linear(x, self.quantized, self.bias)

    plain_linear = forward  # it computes x W^T + b

    def unpacked(self) -> nn.Module:
        """The plain layer that stays when a merged method is folded; itself where none is."""
        if not self.weight.is_floating_point():
            return self
        with torch.device("meta"):
            plain = self.kind(self.in_features, self.out_features, self.bias is not None)
        plain.weight, plain.bias = self.weight, self.bias
        return plain.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """`to` and the like; the scales stay float32, since rounded they are another weight."""
        exact = {n: b for n, b in self._buffers.items() if n != "like" and b is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, nf4 of {self.block}"


def quantize(
    model: nn.Module, codec: str = "nf4", skip: Sequence[str] = HEAD, double: bool = True
) -> list[str]:
    """Puts the weights of the linear layers into 4 bits, in place.  Embeddings, norms and biases
    stay as they are.

    Args:
        codec: "nf4".
        skip: parts of names of layers that stay dense; "head" is also the layer that gives the
            logits, whatever its name.
        double: whether the scales are stored in 8 bits.

    Returns:
        The names of the layers that are now quantized.

    Raises:
        ValueError: an unknown codec, a name to skip that no layer has, nothing to quantize, or a
            layer that cannot be: the model is unchanged.
    """
    layers = quantizable(model, codec, skip)
    for name, layer in layers.items():
        check_finite(name, layer)
    for name, layer in layers.items():
        replace(model, name, nf4.quantize(layer.weight, double=double))
    return list(layers)


def quantizable(model: nn.Module, codec: str, skip: Sequence[str] = HEAD) -> dict[str, nn.Linear]:
    """The layers that `quantize` would put into 4 bits, by name; raises as it does."""
    if codec not in CODECS:
        raise ValueError(f"codec is {codec!r}, must be {', '.join(CODECS)}{nearest(codec, CODECS)}")
    if any(isinstance(module, Wrapper) for module in model.modules()):
        raise ValueError("a method is attached: quantize first, then attach")
    modules = dict(named_layers(model))
    layers = {n: m for n, m in modules.items() if isinstance(m, nn.Linear) and not is_quantized(m)}
    skipped = head_names(model) if "head" in skip else set()
    for part in skip:
        named = {name for name in layers if f".{part}." in f".{name}."}
        if not named and part not in HEAD:
            parts = {piece for name in layers for piece in name.split(".")}
            raise ValueError(f"skip: {part!r} is part of no layer's name{nearest(part, parts)}")
        skipped |= named
    layers = {name: layer for name, layer in layers.items() if name not in skipped}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layer to quantize")
    names: dict[int, list[str]] = {}
    for name, p in named_weights(model):
        names.setdefault(id(p), []).append(name)
    for name, layer in layers.items():
        if obstacle := _obstacle(layer):
            raise ValueError(f"cannot quantize {name}: {obstacle}; skip it")
        others = [n for n in names[id(layer.weight)] if n != f"{name}.weight"]
        if others:
            raise ValueError(f"cannot quantize {name}: its weight is {others[0]}, too; skip it")
    return layers


def check_finite(name: str, layer: nn.Linear) -> None:
    """Refuses a weight with NaN or an infinite number."""
    if not bool(torch.stack(layer.weight.aminmax()).isfinite().all()):
        raise ValueError(f"{name}.weight holds NaN or an infinite number")


def _obstacle(layer: nn.Linear) -> str | None:
    kind = type(layer)
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight past the layer"
    if kind.forward not in (nn.Linear.forward, getattr(kind, "plain_linear", None)):
        return f"{kind.__name__} has a forward pass of its own"
    if "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    if layer._parameters.get("weight") is None:
        return "its weight is parametrized"
    if layer.weight.dtype not in nf4.DTYPES:
        return f"its weight is {layer.weight.dtype}"
    return None


def is_quantized(layer: nn.Module) -> TypeGuard[QuantizedLinear]:
    """Whether it holds 4 bits now."""
    return isinstance(layer, QuantizedLinear) and not layer.weight.is_floating_point()


def replace(model: nn.Module, name: str, weight: nf4.Quantized) -> None:
    """Puts a layer with this weight where a dense one stands."""
    parent, _, key = name.rpartition(".")
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    setattr(model.get_submodule(parent), key, QuantizedLinear(layer, weight))


def warn_of_copies(layers: Iterable[nn.Module]) -> None:
    """Says how large the dense copies of merged layers are, and what 4 bits would change of them:
    |deq(quantize(W')) - W'| / |W'|, all layers together.
    """
    copies = {id(m): m for m in layers if isinstance(m, QuantizedLinear) and not is_quantized(m)}
    if not copies:
        return
    error = norm = 0.0
    for layer in copies.values():
        w = layer.weight.detach().float()
        again = nf4.quantize(w, layer.block, layer.scales_of_scales is not None)
        error += (nf4.dequantize(again) - w).square().sum().item()
        norm += w.square().sum().item()
    size = sum(layer.weight.nbytes for layer in copies.values())
    logger.warning(
        "%d layers of 4 bits hold dense copies now, %.1f MB; in 4 bits again their weights would "
        "be off by %.2f %%",
        *(len(copies), size / 1e6, 100 * math.sqrt(error / norm) if norm else 0.0),
    )
