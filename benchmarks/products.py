"""The matrix products of a training step alone: what is left of it when all else takes no time.

A step is recorded once, with the tensors that its products read; then those products run again, in
the same order.  Attention's own products are not among them: they never leave its kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


class Products(TorchDispatchMode):
    """Records the products that run inside `with`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket.__name__ in KINDS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def run(self) -> None:
        """All of them, once again."""
        for function, args, kwargs in self.calls:
            function(*args, **kwargs)
