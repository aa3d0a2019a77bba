"""All or nothing: a call that fails half way leaves the model as it was, to the bit.

What the methods change are references: which module stands where, which tensor a parameter holds,
which method is active.  A picture of them, taken before the call, undoes it.  Values of tensors
that are there already are written by `files.fill` alone.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft_lite.handle import Handle

PARTS = (
    "_modules",
    "_parameters",
    "_buffers",
    "_state_dict_pre_hooks",
)  # dicts of a module that change in place


@contextmanager
def all_or_nothing(handle: "Handle") -> Iterator[None]:
    """Undoes what happened to the model and its methods where the block raises anything."""
    undo = [*_modules(handle.model), *_methods(handle)]
    try:
        yield
    except BaseException:
        for step in undo:
            step()
        raise


def _modules(model: nn.Module) -> Iterator[Callable[[], None]]:
    for module in model.modules():
        parts = {name: dict(module.__dict__[name]) for name in PARTS}
        yield partial(_module, module, dict(module.__dict__), parts)
    for p in model.parameters():
        yield partial(_parameter, p, p.data, p.requires_grad)


def _module(
    module: nn.Module, attributes: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]
) -> None:
    module.__dict__.clear()
    module.__dict__.update(attributes)
    for name, content in parts.items():
        module.__dict__[name].clear()
        module.__dict__[name].update(content)


def _parameter(p: nn.Parameter, data: Tensor, requires_grad: bool) -> None:
    p.data = data
    p.requires_grad_(requires_grad)


def _methods(handle: "Handle") -> Iterator[Callable[[], None]]:
    yield partial(handle.__dict__.update, methods=dict(handle.methods), flags=dict(handle.flags))
    for method in handle.methods.values():
        yield partial(setattr, method, "active", method.active)
        for weight in method.weights.values():
            yield partial(weight.__dict__.update, other=weight.other, active=weight.active)
