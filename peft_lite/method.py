"""What a method is (`MethodSpec`), and a method on a model (`Method`): the wrappers it put around
layers, and the model's own weights that it trains.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peft_lite import wrapper
from peft_lite.wrapper import Wrapper


def check_trains(name: str, p: Tensor) -> None:
    """Refuses a parameter that holds codes (int8, 4-bit, float8): steps would be lost."""
    if p.dtype.itemsize == 1 or not (p.is_floating_point() or p.is_complex()):
        raise ValueError(f"{name} is packed as {p.dtype}: it cannot train")


class InPlace:
    """A weight of the model that trains in place.

    While the method is active the parameter holds the tuned values, otherwise the original ones.

    Args:
        keep: whether to keep a copy of the original values.
    """

    def __init__(self, parameter: nn.Parameter, keep: bool = True) -> None:
        self.parameter, self.keep = parameter, keep
        self.other: Tensor | None = None  # the values not in the parameter
        self.active = True

    def install(self) -> None:
        """The tuned values start as a copy, the original tensor is kept."""
        if self.keep:
            self.other, self.parameter.data = self.parameter.data, self.parameter.data.clone()

    def tuned(self, active: bool) -> Tensor:
        """The tuned values."""
        return self.parameter.data if active or self.other is None else self.other

    def activate(self, active: bool) -> None:
        """Puts the tuned or the original values into the parameter."""
        if active != self.active and self.other is not None:
            p = self.parameter
            p.data, self.other = self.other.to(p.device, p.dtype), p.data
        self.active = active


@dataclass
class Method:
    """A method on a model.

    Attributes:
        kind: of the methods of one kind, one is active at a time.
        wrappers: by the name of the layer they are around.
        weights: the model's own weights that train, by name.
        buffers: the model's own as they were when it was attached; training changes statistics.
    """

    kind: str
    config: Any
    wrappers: Mapping[str, Wrapper]
    weights: Mapping[str, InPlace] = field(default_factory=dict)
    active: bool = False
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            check_trains(name, weight.parameter)

    def trained(self) -> list[nn.Parameter]:
        parts = [p for w in self.wrappers.values() for p in w.trained()]
        parts += [weight.parameter for weight in self.weights.values()]
        return list({id(p): p for p in parts}.values())

    def weights_once(self) -> dict[str, InPlace]:
        """Its weights, a tied one only under its first name."""
        first: dict[int, str] = {}
        for name, weight in self.weights.items():
            first.setdefault(id(weight.parameter), name)
        return {name: self.weights[name] for name in first.values()}

    def install(self, model: nn.Module) -> None:
        self.buffers = {
            name: b.detach().clone()
            for name, b in wrapper.named_buffers(model)
            if b.is_floating_point() or b.numel() == 1  # else packed weights
        }
        for name, w in self.wrappers.items():
            wrapper.insert(model, name, w)
            w.begin()
            w.in_place = True
        for weight in self.weights_once().values():
            weight.install()
        self.active = True

    def activate(self, active: bool) -> None:
        """Switches it on or off."""
        for weight in self.weights_once().values():
            weight.activate(active)
        self.active = active
        for w in self.wrappers.values():
            w.active = active

    def uninstall(self, model: nn.Module, fold: bool) -> None:
        """Removes the method from the model; `fold` leaves its result in the model."""
        if not fold:
            self.activate(False)
        for w in self.wrappers.values():
            wrapper.remove(model, w, w.left() if fold else w.base)


@dataclass(frozen=True)
class MethodSpec:
    """All that the rest of the library and a command need to know of a method.

    Attributes:
        name: of the method in a command.
        config: class of its config; a field may carry an `option` (peft_lite/options.py).
        build: makes the method for a model, without touching the model.
        lr: peak learning rate by default.
        peft_types: `peft_type` of the files it reads; the first is written where there is no
            `to_json`.
        to_json: model and method -> its lines of `adapter_config.json`; None: all of the config.
        from_json: those lines -> the config, or None where another method of the same `peft_type`
            wrote them; None: the config's fields.
        from_options: the fields that a command gives -> the config; None: the config as it is.
    """

    name: str
    config: Any
    build: Callable[[nn.Module, Any], Method]
    lr: float
    peft_types: tuple[str, ...]
    to_json: Callable[[nn.Module, Method], dict[str, Any]] | None = None
    from_json: Callable[[Mapping[str, Any]], Any] | None = None
    from_options: Callable[[dict[str, Any]], Any] | None = None
