"""How many bytes of tensors live at once: a test's own count, of no allocator."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes that operations have made inside and that live at once.

    What was there before, and what a file is mapped to, is not counted, nor is the meta device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Any, int]] = {}  # a storage, and its bytes
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _counts(t)}
        for t in tree_leaves(out):
            if _counts(t) and (storage := t.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = (weakref.ref(storage), storage.nbytes())
        self.made = {key: pair for key, pair in self.made.items() if pair[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.made.values()))
        return out


def _counts(t: object) -> bool:
    return isinstance(t, Tensor) and not t.is_meta
