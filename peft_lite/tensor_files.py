"""Files of named tensors, opened so that nothing but tensors can come out of them."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_lite.json_files import printable


def read_named_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of an older pickle (tensors only).

    Raises:
        ValueError: the file is missing, truncated, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises whatever its machine runs into
        reason = "no file of plain tensors"  # torch's reason advises to unpickle anything
        if path.suffix == ".safetensors":
            reason = printable(str(error))
        raise ValueError(f"cannot read {path}: truncated or damaged? ({reason})") from None
    return _plain(content, path)


def _plain(content: Any, path: Path) -> dict[str, Tensor]:
    """What a pickle held, each tensor in memory of its own: there, two may be views of one."""
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()
    ):
        raise ValueError(f"cannot read {path}: it holds something else than named tensors")
    for name, t in content.items():
        if t.layout is not torch.strided or t.is_meta:
            raise ValueError(f"cannot read {path}: {printable(name)} is no plain tensor")
    if sum(t.nbytes for t in content.values()) > 2 * path.stat().st_size:
        raise ValueError(f"cannot read {path}: its tensors take more than twice its bytes")
    tensors: dict[str, Tensor] = {}
    seen = set()
    for name, t in content.items():
        storage = t.untyped_storage().data_ptr()
        tensors[name] = t.detach().clone() if storage in seen else t.detach().contiguous()
        seen.add(storage)
    return tensors
