"""Files of named tensors, opened so that nothing but tensors can come out of them."""

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def read_named_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of an older pickle (tensors only).

    Raises:
        ValueError: the file is missing, truncated, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError,
        EOFError,
        OSError,
        RuntimeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        reason = (str(error).strip().splitlines() or ["it ends too early"])[0]
        raise ValueError(f"cannot read {path}: truncated or damaged? ({reason})") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in tensors.items()
    ):
        raise ValueError(f"cannot read {path}: it holds something else than named tensors")
    return tensors
