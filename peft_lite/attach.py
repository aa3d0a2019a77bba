"""Putting a method on a model, and taking it off again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

from torch import Tensor, nn

from peft_lite import files, freeze, lora
from peft_lite.freeze import FreezeConfig
from peft_lite.lora import LoraConfig, LoraLinear
from peft_lite.report import Report, report

_attached: WeakSet[nn.Module] = WeakSet()  # a handle holds its model, so no handles here


class Handle(Protocol):
    """A method on a model."""

    model: nn.Module

    def report(self) -> Report:
        """Trainable and total parameters, as they are now."""

    def merge(self) -> None:
        """Folds the method into the weights, where it can be.  The original weights are kept."""

    def unmerge(self) -> None:
        """Restores the original weights to the bit."""

    def fold(self) -> None:
        """Merges for good and takes the method off: a plain model with the new weights is left."""

    def detach(self) -> None:
        """Takes the method off: modules and `requires_grad` are what they were."""

    def state(self) -> dict[str, Tensor]:
        """The method's tensors under the names of HF PEFT's files."""

    def save(self, directory: str | Path) -> None:
        """Writes `adapter_config.json` and `adapter_model.safetensors`."""


def attach(model: nn.Module, config: LoraConfig | FreezeConfig) -> Handle:
    """Puts the method of `config` on `model`: what it trains requires a gradient, nothing else.

    Raises:
        ValueError: a pattern matches nothing, or the model carries a method already.  The model is
            then as it was.
    """
    if model in _attached or any(isinstance(m, LoraLinear) for m in model.modules()):
        raise ValueError(f"{type(model).__name__} carries a method already: detach it first")
    handle: Handle
    if isinstance(config, LoraConfig):
        handle = LoraHandle(model, config)
    elif isinstance(config, FreezeConfig):
        handle = FreezeHandle(model, config)
    else:
        raise ValueError(f"{type(config).__name__} is no config: want LoraConfig or FreezeConfig")
    _attached.add(model)
    return handle


def load(model: nn.Module, directory: str | Path) -> Handle:
    """Puts a saved method on `model`, one written here or by HF PEFT.

    Raises:
        ValueError: a broken file, a setting there is no code for, or tensors that are missing,
            unexpected or of another shape.  The model is then as it was.
    """
    config, tensors = files.read(Path(directory))
    handle = attach(model, config)
    try:
        files.fill(handle.state(), tensors, Path(directory))
    except ValueError:
        handle.detach()
        raise
    return handle


class LoraHandle:
    """LoRA on the layers that its config names."""

    def __init__(self, model: nn.Module, config: LoraConfig) -> None:
        self.model, self.config = model, config
        self.layers: Mapping[str, LoraLinear] = lora.wrap(model, config)
        self.is_detached = False
        self._flags = _flags(model)
        model.requires_grad_(False)
        for name, layer in self.layers.items():
            layer.train(layer.base.training)
            model.set_submodule(name, layer, strict=True)

    def report(self) -> Report:
        return report(self.model)

    def merge(self) -> None:
        """Every W becomes W + s B A.  Raises ValueError when a weight is tied to another."""
        uses: dict[int, list[str]] = {}
        for name, p in self.model.named_parameters(remove_duplicate=False):
            uses.setdefault(id(p), []).append(name)
        for layer in self.layers.values():
            if len(names := uses[id(layer.base.weight)]) > 1:
                raise ValueError(
                    f"cannot merge into {names[-1]}: it is tied to {names[0]}, "
                    "which would change too"
                )
            if layer.original is not None:
                raise ValueError("the adapter is merged already")
        for layer in self.layers.values():
            layer.merge()

    def unmerge(self) -> None:
        for layer in self.layers.values():
            layer.unmerge()

    def fold(self) -> None:
        _check_attached(self)
        if any(layer.original is None for layer in self.layers.values()):
            self.merge()
        self._take_off()

    def detach(self) -> None:
        _check_attached(self)
        self.unmerge()
        self._take_off()

    def _take_off(self) -> None:
        for name, layer in self.layers.items():
            layer.base.train(layer.training)
            self.model.set_submodule(name, layer.base, strict=True)
        _restore(self, self._flags)

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            hf = files.peft_name(self.model, name)
            tensors[f"{hf}.lora_A.weight"] = layer.lora_a.data
            tensors[f"{hf}.lora_B.weight"] = layer.lora_b.data
        return tensors

    def save(self, directory: str | Path) -> None:
        if any(layer.original is not None for layer in self.layers.values()):
            raise ValueError("the adapter is merged into its model: unmerge it, then save")
        config = files.lora_config(self.model, self.config, self.layers)
        files.write(Path(directory), config, self.state())


class FreezeHandle:
    """Freezing: the model's own weights train, so there is nothing to merge, and `detach` restores
    which of them require gradients, not their values.
    """

    def __init__(self, model: nn.Module, config: FreezeConfig) -> None:
        self.model, self.config = model, config
        self.names = freeze.chosen(model, config)
        self.is_detached = False
        self._flags = _flags(model)
        for name, p in model.named_parameters(remove_duplicate=False):
            p.requires_grad_(name in self.names)

    def report(self) -> Report:
        return report(self.model)

    def merge(self) -> None:
        raise ValueError("freezing trains the weights themselves: there is nothing to merge")

    def unmerge(self) -> None:
        raise ValueError("freezing trains the weights themselves: there is nothing to unmerge")

    def fold(self) -> None:
        raise ValueError("freezing trains the weights themselves: there is nothing to fold")

    def detach(self) -> None:
        _check_attached(self)
        _restore(self, self._flags)

    def state(self) -> dict[str, Tensor]:
        return {
            files.peft_name(self.model, name): p.data
            for name, p in self.model.named_parameters()
            if name in self.names
        }

    def save(self, directory: str | Path) -> None:
        files.write(Path(directory), files.freeze_config(self.config), self.state())


def _flags(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


def _restore(handle: LoraHandle | FreezeHandle, flags: Mapping[str, bool]) -> None:
    for name, p in handle.model.named_parameters():
        p.requires_grad_(flags[name])
    handle.is_detached = True
    _attached.discard(handle.model)


def _check_attached(handle: LoraHandle | FreezeHandle) -> None:
    if handle.is_detached:
        raise ValueError("the method is detached already")
