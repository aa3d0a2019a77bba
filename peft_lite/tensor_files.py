"""Files of named tensors, opened so that nothing but tensors can come out of them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from peft_lite.json_files import printable

MAX_HEADER = 32 * 2**20  # bytes for the names and shapes of a safetensors file
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


def read_named_tensors(path: Path, apart: bool = False) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of an older pickle (tensors only).

    Args:
        apart: each tensor of a `.safetensors` file is mapped for itself, so that the memory of one
            that was read is free again once it is dropped.

    Raises:
        ValueError: the file is missing, truncated, or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            _check_header(path)
            return _read_apart(path) if apart else load_file(path)
        _check_stored(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises whatever its machine runs into
        reason = "no file of plain tensors"  # torch's reason advises to unpickle anything
        if path.suffix == ".safetensors":
            reason = printable(str(error))
        raise ValueError(f"cannot read {path}: truncated or damaged? ({reason})") from None
    return _plain(content, path)


def _read_apart(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    tensors = {}
    for name in names:
        with safe_open(path, "pt") as file:
            tensors[name] = file.get_tensor(name)
    return tensors


def read_outline(path: Path) -> dict[str, Tensor]:
    """The same on the meta device: names, shapes and dtypes without values.

    Of a safetensors file only the header is read, so that refusing it costs nothing.
    """
    if path.suffix != ".safetensors":
        return {name: t.to("meta") for name, t in read_named_tensors(path).items()}
    try:
        _check_header(path)
        outline = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                entry = file.get_slice(name)
                if (dtype := entry.get_dtype()) not in DTYPES:
                    raise ValueError(f"{name} holds {dtype}, must be one of {', '.join(DTYPES)}")
                outline[name] = torch.empty(entry.get_shape(), dtype=DTYPES[dtype], device="meta")
        return outline
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # as above, and shapes that no tensor can have
        reason = printable(str(error))
        raise ValueError(f"cannot read {path}: truncated or damaged? ({reason})") from None


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for the first tensor that holds NaN or an infinite number."""
    for name, t in tensors.items():
        # float8 has no isfinite
        if t.is_floating_point() and not (t.float() if t.itemsize == 1 else t).isfinite().all():
            raise ValueError(f"{name} holds NaN or an infinite number")


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > MAX_HEADER:
        raise ValueError(f"its header has {size:,} bytes, at most {MAX_HEADER:,} are read")


def _check_stored(path: Path) -> None:
    """Refuses compressed records, of which a small file can hold any amount."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as records:
            if any(r.compress_type != zipfile.ZIP_STORED for r in records.infolist()):
                raise ValueError("its records are compressed")


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
