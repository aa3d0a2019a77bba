"""What a method would allocate, without allocating it: shapes and names on the meta device."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peft_lite.method import Method, MethodSpec

MADE_NEW = (
    torch.zeros,
    torch.ones,
    torch.empty,
    torch.full,
    torch.rand,
    torch.randn,
    torch.zeros_like,
    torch.ones_like,
    torch.empty_like,
    torch.rand_like,
    torch.randn_like,
    Tensor.new_zeros,
    Tensor.new_ones,
    Tensor.new_empty,
    Tensor.new_full,
)


class OnMeta(TorchFunctionMode):
    """New tensors get no memory, whatever device was asked for."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **({**kwargs, "device": "meta"} if func in MADE_NEW else kwargs))


def outline(model: nn.Module, method: MethodSpec, config: Any) -> Method:
    """The method of a config as it would be built for `model`.

    Raises:
        ValueError: what `build` refuses, or sizes beyond what a tensor can have.
    """
    try:
        with OnMeta():
            return method.build(model, config)
    except (RuntimeError, OverflowError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{method.name} cannot be built: {reason}") from None
