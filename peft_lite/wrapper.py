"""Modules around other modules: how a method changes what a layer computes, and is switched off.

    wrapper(x) = changed(x)   while the method is active
               = base(x)      otherwise

A wrapper calls its base, whatever that is: a layer with hooks or with a forward pass of its own, or
another wrapper.  Patterns and checkpoint names never see wrappers: `named_layers` lists a model as
if nothing were attached.

A wrapper stands in for its base also where a model reads an attribute of the layer (`in_features`).
A `weight` that is read is the merged one, so that a product with it is right, too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy


class Wrapper(nn.Module):
    """A module around `base`.

    Attributes:
        active: whether the method is active.
        depth: a wrapper is inside those of greater depth.
        whole_model: whether its tensors belong to the model, not to one layer.
        takes_rows: whether it can change some rows of a batch only.
        cannot_merge: why the method has no merged form; None where it has one.
    """

    depth = 0
    whole_model = False
    takes_rows = False
    cannot_merge: str | None = "this method does not change weights"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        if has_global_hooks():
            raise ValueError(
                "forward hooks for all modules (register_module_forward_hook) would act on the "
                "modules that a method adds, too: remove them first"
            )
        self.base = base
        self.active = True
        self.in_place = False  # in the model
        self.training = base.training

    @property
    def acts(self) -> bool:
        """Whether its output differs from the base's."""
        return self.active

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.changed(*inputs, **named) if self.active else self.base(*inputs, **named)

    def __getattr__(self, name: str) -> Any:
        """An attribute that the wrapper lacks is the base's, unless it leads past the change."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if not self.__dict__.get("in_place", False):
                raise
            module = self.stands_for
            value = getattr(module, name)
            if self.acts and module is self.base and isinstance(value, nn.Parameter | nn.Module):
                raise AttributeError(
                    f"{name!r} of {type(innermost(module)).__name__} is read past the change that "
                    f"{type(self).__name__} makes: attach to the module that reads it"
                ) from None
            return value

    @property
    def stands_for(self) -> nn.Module:
        """The module whose attributes a model reads here."""
        return self._modules["base"]  # type: ignore[return-value]

    def changed(self, *inputs: Any, **named: Any) -> Any:
        """The layer's output with the method's change."""
        raise NotImplementedError

    def begin(self) -> None:
        """Called once the wrapper is in the model and no other method of its kind is active."""

    def take_rows(self, rows: Tensor | None, batch: int = 0) -> None:
        """Change only these rows of a batch of this size; None: all.  See `takes_rows`."""

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that the method trains."""
        base = {id(p) for p in self.base.parameters()}
        return (p for p in self.parameters() if id(p) not in base)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save, under the endings that HF PEFT's files use."""
        raise NotImplementedError

    def left(self) -> nn.Module:
        """The module that replaces the wrapper when the method is folded."""
        return self.base


class WeightWrapper(Wrapper):
    """A wrapper whose change equals a change of the layer's weights, so that it can be merged."""

    cannot_merge = None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        check_weight(self.layer, self.layer.weight)
        self.merged = False
        self.tied: tuple[nn.Parameter, ...] = ()  # the shared parameter, while the layer is untied
        # the layer's original tensors while it is merged; buffers, so that they move with the model
        self.register_buffer("original_weight", None, persistent=False)
        self.register_buffer("original_bias", None, persistent=False)

    @property
    def layer(self) -> Any:
        """The linear or embedding layer inside all wrappers."""
        return innermost(self.base)

    @property
    def acts(self) -> bool:
        return self.active and not self.merged

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.changed(input) if self.acts else self.base(input)
        return y

    @property
    def weight(self) -> Tensor:
        """The weight with the change in it, for a model that reads it past the layer."""
        return self._changed_weight("weight")

    @property
    def bias(self) -> Tensor | None:
        """The bias, likewise."""
        return None if self.layer.bias is None else self._changed_weight("bias")

    def _changed_weight(self, name: str) -> Tensor:
        below: Tensor = getattr(self.base, name)
        new = self.new_weights().get(name) if self.acts else None
        return below if new is None else new.to(dense_dtype(self.layer, below))

    def new_weights(self) -> dict[str, Tensor]:
        """The merged `weight`, and `bias` where it changes: with them the plain layer is equal."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, untie: bool) -> None:
        """Puts the merged weights into the layer and keeps the original ones."""
        layer = self.layer
        merged = self.new_weights()
        if untie:
            self.tied = (layer.weight,)
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        for name, new in merged.items():
            p = getattr(layer, name)
            setattr(self, f"original_{name}", p.data)
            p.data = new.to(dense_dtype(layer, p))
        self.merged = True

    def left(self) -> nn.Module:
        """The base; of a layer that held packed weights the plain one that holds the merged."""
        unpacked = getattr(type(self.base), "unpacked", None)
        return self.base if unpacked is None else unpacked(self.base)

    def unmerge(self) -> None:
        """Restores the layer's original weights to the bit."""
        for name in ("weight", "bias"):
            original = getattr(self, f"original_{name}")
            if original is not None:
                getattr(self.layer, name).data = original
                setattr(self, f"original_{name}", None)
        if self.tied:
            (shared,) = self.tied
            weight = self.layer.weight
            if (shared.dtype, shared.device) != (weight.dtype, weight.device):
                shared.data = weight.data  # the model moved, and the shared one was not in it
            self.layer.weight = shared
            self.tied = ()
        self.merged = False

    def _save_to_state_dict(self, *arguments: Any) -> None:
        self._check_unmerged()
        super()._save_to_state_dict(*arguments)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._check_unmerged()
        super()._load_from_state_dict(*arguments)

    def _check_unmerged(self) -> None:
        if self.merged:
            raise ValueError(
                "a state_dict while a method is merged would count its change twice: "
                "unmerge or fold first"
            )


class Copied(Wrapper):
    """A copy of a module that is trained and used instead of it (HF PEFT's `modules_to_save`)."""

    depth = 9
    cannot_merge = None

    copy: nn.Module

    def begin(self) -> None:
        module = innermost(self.base)
        kind = type(module).__name__
        if any("forward" in part.__dict__ for part in module.modules()):
            raise ValueError(f"modules_to_save: the forward pass of a copy of {kind} is this one's")
        try:
            self.copy = deepcopy(module).requires_grad_(True)  # tied to nothing
        except RuntimeError as error:  # a weight that a hook computes
            raise ValueError(f"modules_to_save: {kind} cannot be copied: {error}") from error

    def changed(self, *inputs: Any, **named: Any) -> Any:
        return self.copy(*inputs, **named)

    @property
    def stands_for(self) -> nn.Module:
        return self.copy if self.active else self.base

    def tensors(self) -> dict[str, Tensor]:
        module = getattr(self, "copy", innermost(self.base))  # the module itself, before `begin`
        tensors = {name: p.data for name, p in module.named_parameters()}
        return tensors | dict(named_buffers(module))

    def left(self) -> nn.Module:
        return self.copy


def innermost(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def within(wrapper: WeightWrapper) -> Iterator[WeightWrapper]:
    """The wrappers inside this one that can be merged."""
    module = wrapper.base
    while isinstance(module, Wrapper):
        if isinstance(module, WeightWrapper):
            yield module
        module = module.base


def wide(dtype: torch.dtype) -> torch.dtype:
    """Of what a method computes and trains beside a weight: float64 beside that, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(t: Tensor) -> AbstractContextManager[object]:
    """Inside it products have the dtype of their factors, such as t; the meta device has none."""
    device = t.device.type
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def check_weight(module: nn.Module, weight: Tensor) -> None:
    """Refuses a module that nothing of real numbers can be put beside."""
    if is_lazy(weight) or weight.is_complex():
        what = "no shape yet" if is_lazy(weight) else "complex numbers"
        raise ValueError(f"the weight of {type(innermost(module)).__name__} has {what}")


def is_dense(weight: Tensor) -> bool:
    """Whether its numbers are the weights, and not codes of them (int8, 4-bit, float8)."""
    plain = type(weight) in (nn.Parameter, Tensor, FakeTensor)  # the last stands for the others
    return plain and weight.is_floating_point() and weight.dtype.itemsize > 1


def dense_dtype(layer: nn.Module, weight: Tensor) -> torch.dtype:
    """The dtype of a weight of the layer where it is dense."""
    return weight.dtype if is_dense(weight) else getattr(layer, "dense_dtype", weight.dtype)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as a plain matrix, in float32 or float64.

    Raises:
        ValueError: the weight is packed, so its numbers are codes, and no `dense_weight` of its
            class unpacks them.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if is_dense(weight):
        return weight.to(wide(weight.dtype))
    unpack = getattr(innermost(layer), "dense_weight", None)  # no wrapper around it acts
    if unpack is None:
        raise ValueError(
            f"the weight of {type(innermost(layer)).__name__} is packed as {weight.dtype}, must be "
            "floating point: dequantize the layer first"
        )
    dense: Tensor = unpack()
    return dense


def merge_obstacle(layer: nn.Module) -> str | None:
    """Why other weights in the layer would not have the effect of the wrapper around it, or None.

    Merging needs a layer that computes x W^T + b or looks up E[id], and W itself to change.
    """
    kind, weight = type(layer), layer._parameters.get("weight")
    plain = (nn.Linear.forward, nn.Embedding.forward, getattr(kind, "plain_linear", None))
    if kind.forward not in plain or "forward" in layer.__dict__:
        return f"{kind.__name__} has a forward pass of its own"
    if weight is None:
        return f"the weight of {kind.__name__} is parametrized or pruned"
    if weight.is_meta:
        return f"the weight of {kind.__name__} has no values: it lies on the meta device"
    if not is_dense(weight) and not hasattr(kind, "dense_weight"):
        return f"the weight of {kind.__name__} is packed as {weight.dtype}"
    if layer._forward_hooks or layer._forward_pre_hooks or has_global_hooks():
        return f"{kind.__name__} has forward hooks, which can change what it computes"
    if getattr(layer, "max_norm", None) is not None:
        return f"{kind.__name__} rescales its rows to max_norm"
    return None


def has_global_hooks() -> bool:
    """Whether there are forward hooks that torch calls for every module."""
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks)


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`model.named_modules()` as if nothing were attached."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        layer = innermost(module)
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield name, layer
        for child, part in layer.named_children():
            yield from walk(f"{name}.{child}" if name else child, part)

    return walk("", model)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """`model.named_parameters(remove_duplicate=False)` as if nothing were attached."""
    for name, layer in named_layers(model):
        for end, p in layer.named_parameters(recurse=False):
            yield f"{name}.{end}" if name else end, p


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers that a checkpoint of the model holds, as if nothing were attached."""
    for name, layer in named_layers(model):
        for end, b in layer.named_buffers(recurse=False):
            if end not in layer._non_persistent_buffers_set:
                yield f"{name}.{end}" if name else end, b


def insert(model: nn.Module, name: str, wrapper: Wrapper) -> None:
    """Puts `wrapper` around the layer at `name`, inside the wrappers of greater depth; where the
    layer has other names, at these, too.
    """
    base = model.get_submodule(_path(model, name))
    while isinstance(base, Wrapper) and base.depth > wrapper.depth:
        base = base.base
    places = _places(model, base)
    wrapper.base = base
    for parent, key in places:
        parent._modules[key] = wrapper


def remove(model: nn.Module, wrapper: Wrapper, left: nn.Module) -> None:
    """Replaces `wrapper` by `left`."""
    for parent, key in _places(model, wrapper):
        parent._modules[key] = left


def _places(model: nn.Module, module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every place of the model where this module stands."""
    return [
        (parent, key)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is module
    ]


def _path(model: nn.Module, name: str) -> str:
    """The layer's path with the wrappers around what contains it."""
    path: list[str] = []
    module = model
    for part in name.split("."):
        while isinstance(module, Wrapper):
            path.append("base")
            module = module.base
        path.append(part)
        module = module.get_submodule(part)
    return ".".join(path)
