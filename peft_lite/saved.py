"""Modules that train whole beside a method (HF PEFT's `modules_to_save`): a classifier, mostly.

Each is replaced by a copy that trains; the original module is kept unchanged.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from peft_lite.method import InPlace, check_trains
from peft_lite.select import select_modules
from peft_lite.wrapper import Copied, Wrapper


def check(modules_to_save: Sequence[str] | None) -> None:
    if modules_to_save is not None and not (
        isinstance(modules_to_save, Sequence)
        and not isinstance(modules_to_save, str)
        and all(isinstance(name, str) for name in modules_to_save)
    ):
        raise ValueError(f"modules_to_save is {modules_to_save!r}, must be a list of names")


def beside(
    model: nn.Module, modules_to_save: Sequence[str] | None, layers: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The layers that are not, and are not within, a module that trains whole."""
    whole = select_modules(model, modules_to_save, (nn.Module,)) if modules_to_save else {}
    tops = tuple(f"{name}." for name in whole)
    return {n: layer for n, layer in layers.items() if not f"{n}.".startswith(tops)}


def add(
    model: nn.Module, modules_to_save: Sequence[str] | None, wrappers: Mapping[str, Wrapper]
) -> dict[str, Wrapper]:
    """The wrappers of a method and those of the modules that train beside it."""
    if not modules_to_save:
        return dict(wrappers)
    modules = select_modules(model, modules_to_save, (nn.Module,))
    for name, module in modules.items():
        if name in wrappers:
            raise ValueError(f"modules_to_save: {name} is a target, too: it cannot be both")
        if not any(True for _ in module.parameters()):
            raise ValueError(f"modules_to_save: {name} has no parameter to train")
        for end, p in module.named_parameters():
            check_trains(f"{name}.{end}", p)
        if any(isinstance(part, Wrapper) for part in module.modules()):
            raise ValueError(
                f"modules_to_save: within {name} another method stands around a layer: "
                "detach it before a copy is made"
            )
    return {**wrappers, **{name: Copied(module) for name, module in modules.items()}}


def outside(weights: Mapping[str, InPlace], wrappers: Mapping[str, Wrapper]) -> dict[str, InPlace]:
    """The weights that lie outside the copied modules."""
    copied = tuple(f"{name}." for name, w in wrappers.items() if isinstance(w, Copied))
    return {name: weight for name, weight in weights.items() if not name.startswith(copied)}
