"""A method on a model: the wrappers it put around layers, and the model's own weights it trains."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from peft_lite import wrapper
from peft_lite.wrapper import Wrapper


class InPlace:
    """A weight of the model that trains where it is.

    While the method is active the parameter holds the tuned values, otherwise the original ones,
    which `keep` tells to keep.
    """

    def __init__(self, parameter: nn.Parameter, keep: bool = True) -> None:
        self.parameter, self.keep = parameter, keep
        self.other: Tensor | None = None  # the values that the parameter does not hold now

    def install(self) -> None:
        if self.keep:
            self.other = self.parameter.detach().clone()

    def tuned(self, active: bool) -> Tensor:
        """The tuned values, wherever they are now."""
        return self.parameter.data if active or self.other is None else self.other

    def swap(self) -> None:
        """Original for tuned values, or back."""
        if self.other is not None:
            p = self.parameter
            p.data, self.other = self.other.to(p.device, p.dtype), p.data


@dataclass
class Method:
    """What a config made of a model.

    Attributes:
        kind: methods of one kind are alternatives to each other.
        wrappers: by the name of the layer they stand at.
        weights: the model's own that train, by name.
    """

    kind: str
    config: Any
    wrappers: Mapping[str, Wrapper]
    weights: Mapping[str, InPlace] = field(default_factory=dict)
    active: bool = False

    def trained(self) -> list[nn.Parameter]:
        parts = [p for w in self.wrappers.values() for p in w.trained()]
        parts += [weight.parameter for weight in self.weights.values()]
        return list({id(p): p for p in parts}.values())

    def weights_once(self) -> dict[str, InPlace]:
        """Its weights, a tied one under its first name alone."""
        first: dict[int, str] = {}
        for name, weight in self.weights.items():
            first.setdefault(id(weight.parameter), name)
        return {name: self.weights[name] for name in first.values()}

    def install(self, model: nn.Module) -> None:
        for name, w in self.wrappers.items():
            wrapper.insert(model, name, w)
            w.begin()
        for weight in self.weights_once().values():
            weight.install()
        self.active = True

    def activate(self, active: bool) -> None:
        """Acts, or steps aside."""
        if active != self.active:
            for weight in self.weights_once().values():
                weight.swap()
        self.active = active
        for w in self.wrappers.values():
            w.active = active

    def uninstall(self, model: nn.Module, fold: bool) -> None:
        """Takes everything off again; with `fold` what can be kept stays in the model."""
        if not fold:
            self.activate(False)
        for name, w in self.wrappers.items():
            left = w.left() if fold else w.base
            wrapper.remove(model, name, w, left)
