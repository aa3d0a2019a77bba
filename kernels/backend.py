"""Which code runs an operation: Triton's kernels, or torch's."""

import importlib.util
import os

from torch import Tensor

BACKENDS = ("auto", "torch", "triton")


def resolve(backend: str, tensor: Tensor) -> str:
    """Either "triton" or "torch", for an operation on such tensors.

    "auto" is Triton on a GPU.  The interpreter of Triton, for tests, has to be asked for.

    Raises:
        ValueError: "triton" was asked for where it cannot run, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(BACKENDS)}")
    on_gpu = tensor.device.type == "cuda"
    installed = importlib.util.find_spec("triton") is not None
    if backend == "auto":
        return "triton" if on_gpu and installed else "torch"
    if backend == "triton" and not installed:
        raise ValueError("backend='triton' cannot run here: triton is not installed")
    if backend == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' cannot run here: the tensor is on {tensor.device} "
            "(with TRITON_INTERPRET=1 the kernels are interpreted there, slowly)"
        )
    return backend
