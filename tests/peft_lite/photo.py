"""All that a model with methods is, to compare before and after a call that must change nothing."""

from typing import Any

from torch import Tensor, nn

from peft_lite.handle import handle_of


def bits(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.detach().numpy().tobytes()


def frozen(value: Any) -> Any:
    """A value as it is now: tensors to the bit, parameters and modules as the objects they are."""
    if isinstance(value, dict):
        return [(key, frozen(part)) for key, part in value.items()] if value else ()
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, nn.Parameter):
        return id(value), value.requires_grad, bits(value)
    if isinstance(value, Tensor):
        return bits(value)
    return [frozen(part) for part in value] if isinstance(value, tuple) else id(value)


def photo(model: nn.Module) -> Any:
    """Every attribute of every module, of the handle, and of what the methods keep elsewhere."""
    modules = [
        (name, id(module), frozen(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    handle = handle_of(model)
    methods = [
        (name, id(method), method.active, [frozen(vars(w)) for w in method.weights.values()])
        for name, method in handle.methods.items()
    ]
    return modules, methods, handle.active, handle.flags
