"""Modules that stand around others: how a method changes what a layer computes, and steps aside.

    wrapper(x) = changed(x)   while the method is active
               = base(x)      otherwise

A layer may carry several wrappers, `base` within `base`.  Patterns and checkpoint names never see
them: `named_layers` lists a model as if no method had touched it.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


class Wrapper(nn.Module):
    """Stands around `base`.

    Attributes:
        active: whether it acts.
        depth: a wrapper stands inside those of greater depth.
        whole_model: whether its tensors belong to the model, not to one layer.
    """

    depth = 0
    whole_model = False
    cannot_merge: str | None = "it is no change of a weight"

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.active = True
        self.training = base.training

    def forward(self, *inputs: Any) -> Any:
        return self.changed(*inputs) if self.active else self.base(*inputs)

    def changed(self, *inputs: Any) -> Any:
        """What the method makes of the inputs."""
        raise NotImplementedError

    def begin(self) -> None:
        """Called when the wrapper stands in the model and no other method of its kind acts."""

    def trained(self) -> Iterator[nn.Parameter]:
        """The parameters that the method trains."""
        base = {id(p) for p in self.base.parameters()}
        return (p for p in self.parameters() if id(p) not in base)

    def tensors(self) -> dict[str, Tensor]:
        """What is saved, under the ends of the names in HF PEFT's files."""
        raise NotImplementedError

    def left(self) -> nn.Module:
        """What stays in the model when the method is folded into it."""
        return self.base


class WeightWrapper(Wrapper):
    """A wrapper that amounts to other weights, and so can be merged into the layer it stands at."""

    cannot_merge = None

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.merged = False
        self.tied: tuple[nn.Parameter, ...] = ()  # what an untied weight was tied to
        # the layer's own tensors while it holds the new ones; buffers, to move with the model
        self.register_buffer("original_weight", None, persistent=False)
        self.register_buffer("original_bias", None, persistent=False)

    @property
    def layer(self) -> Any:
        """The linear or embedding layer inside all wrappers."""
        return innermost(self.base)

    @property
    def acts(self) -> bool:
        return self.active and not self.merged

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.changed(x) if self.acts else self.base(x)
        return y

    def new_weights(self) -> dict[str, Tensor]:
        """`weight`, and `bias` where it changes too, that make the plain layer compute the same."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self, untie: bool) -> None:
        """Puts the new weights into the layer.  Its own are kept."""
        layer = self.layer
        if untie:
            self.tied = (layer.weight,)
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)
        for name, new in self.new_weights().items():
            p = getattr(layer, name)
            setattr(self, f"original_{name}", p.data)
            p.data = new.to(p.dtype)
        self.merged = True

    def unmerge(self) -> None:
        """Puts the layer's own weights back, to the bit."""
        for name in ("weight", "bias"):
            original = getattr(self, f"original_{name}")
            if original is not None:
                getattr(self.layer, name).data = original
                setattr(self, f"original_{name}", None)
        if self.tied:
            (self.layer.weight,) = self.tied
            self.tied = ()
        self.merged = False


class Copied(Wrapper):
    """A copy of a module that trains in its place (HF PEFT's `modules_to_save`)."""

    depth = 9
    cannot_merge = None

    copy: nn.Module

    def begin(self) -> None:
        self.copy = deepcopy(innermost(self.base)).requires_grad_(True)  # tied to nothing

    def changed(self, *inputs: Any) -> Any:
        return self.copy(*inputs)

    def tensors(self) -> dict[str, Tensor]:
        return {name: p.data for name, p in self.copy.named_parameters()}

    def left(self) -> nn.Module:
        return self.copy


def innermost(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while isinstance(module, Wrapper):
        module = module.base
    return module


def within(wrapper: WeightWrapper) -> Iterator[WeightWrapper]:
    """The wrappers inside this one that amount to other weights."""
    module = wrapper.base
    while isinstance(module, Wrapper):
        if isinstance(module, WeightWrapper):
            yield module
        module = module.base


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight of a layer as a plain matrix, in float32 or wider."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


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
        for own, p in layer.named_parameters(recurse=False):
            yield f"{name}.{own}" if name else own, p


def insert(model: nn.Module, name: str, wrapper: Wrapper) -> None:
    """Puts `wrapper` around the layer called `name`, inside the wrappers of greater depth."""
    path = _path(model, name)
    while isinstance(there := model.get_submodule(path), Wrapper) and there.depth > wrapper.depth:
        path = f"{path}.base"
    wrapper.base = there
    model.set_submodule(path, wrapper, strict=True)


def remove(model: nn.Module, name: str, wrapper: Wrapper, left: nn.Module) -> None:
    """Takes `wrapper` away from the layer called `name`; `left` stands where it stood."""
    path = _path(model, name)
    while model.get_submodule(path) is not wrapper:
        path = f"{path}.base"
    model.set_submodule(path, left, strict=True)


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
