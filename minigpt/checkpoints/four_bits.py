"""Weights of 4 bits in a checkpoint, as transformers and bitsandbytes write and read them.

    X.weight                                codes, uint8 (n / 2, 1)
    X.weight.absmax                         scales, float32 (B,), or their codes, uint8 (B,)
    X.weight.quant_map                      the 16 codes' numbers
    X.weight.nested_absmax                  scales of scales, with double quantization
    X.weight.nested_quant_map               the 256 codes' numbers, likewise
    X.weight.quant_state.bitsandbytes__nf4  shape, dtype, blocksize, nested_offset: JSON in bytes

and in config.json a `quantization_config`.  The codec is minigpt_kernels/nf4.py.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minigpt_kernels.nf4 import BLOCKS, CODES, DTYPES, SCALE_BLOCK, SCALE_CODES, Quantized
from peft_lite.json_files import check_types, parse_object, printable, short

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
MAX_STATE = 2**16  # bytes
NAMES = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
HINTS = {
    "quant_type": str,
    "blocksize": int,
    "dtype": str,
    "shape": list[int],
    "nested_blocksize": int | None,
    "nested_dtype": str | None,
    "nested_offset": float | None,
}

SETTINGS = {  # of quantization_config
    "bnb_4bit_use_double_quant": bool,
    "llm_int8_skip_modules": list[str] | None,
}


def check(raw: Mapping[str, Any]) -> None:
    """Refuses a config.json whose weights are packed in another way.

    Raises:
        ValueError: the field that says so.
    """
    settings = raw.get("quantization_config")
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise ValueError(f"quantization_config is {short(settings)}, must be an object")
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for field, value in wanted.items():
        if (given := settings.get(field)) != value:
            raise ValueError(
                f"quantization_config: {field} {short(given)} is not supported, only {value!r}"
            )


def described(raw: Mapping[str, Any], layers: Iterable[str]) -> tuple[set[str], bool]:
    """What the quantization_config of a config.json says: which of the linear layers but the head,
    by their names in the checkpoint, are in 4 bits, and whether their scales are stored in 8.
    """
    check(raw)
    settings = raw["quantization_config"]
    check_types(settings, SETTINGS, "quantization_config: ")
    dense = settings.get("llm_int8_skip_modules") or ()
    packed = {n for n in layers if not any(f".{part}." in f".{n}." for part in dense)}
    return packed, settings.get("bnb_4bit_use_double_quant", False)


def gather(tensors: dict[str, Any]) -> None:
    """Puts one `Quantized` in place of the tensors of each weight of 4 bits.

    Raises:
        ValueError: parts of a weight are missing, do not fit each other, or are of another codec.
    """
    for key in [key for key in tensors if STATE in key]:
        name = key.partition(STATE)[0]
        parts = {end: tensors.pop(f"{name}{end}", None) for end in (*PARTS, "")}
        try:
            tensors[name] = _quantized(tensors.pop(key), parts)
        except ValueError as error:
            raise ValueError(f"{printable(name)}: {error}") from None


def _quantized(encoded: Tensor, parts: Mapping[str, Tensor | None]) -> Quantized:
    if encoded.dtype != torch.uint8 or not 0 < encoded.numel() <= MAX_STATE:
        raise ValueError(f"quant_state is {encoded.numel()} of {encoded.dtype}, must be bytes")
    state = parse_object(bytes(encoded.view(-1).tolist()).decode(errors="replace"), "quant_state")
    check_types(state, HINTS, "quant_state: ")
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    allowed = {"quant_type": ("nf4",), "dtype": tuple(dtypes), "blocksize": BLOCKS}
    nested = state.get("nested_offset") is not None
    if nested:
        allowed |= {"nested_blocksize": (SCALE_BLOCK,), "nested_dtype": ("float32",)}
    for field, values in allowed.items():
        if state.get(field) not in values:
            known = ", ".join(map(str, values))
            raise ValueError(f"{field} is {short(state.get(field))}, must be one of {known}")
    shape = torch.Size(state.get("shape") or ())
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"shape is {list(shape)}, must be (out, in)")
    n = math.prod(shape)
    blocks = math.ceil(n / state["blocksize"])
    wanted: dict[str, tuple[torch.dtype, int]] = {
        "": (torch.uint8, (n + 1) // 2),
        ".absmax": (torch.uint8 if nested else torch.float32, blocks),
        ".quant_map": (torch.float32, len(CODES)),
    }
    if nested:
        wanted[".nested_absmax"] = (torch.float32, math.ceil(blocks / SCALE_BLOCK))
        wanted[".nested_quant_map"] = (torch.float32, len(SCALE_CODES))
    flat: dict[str, Tensor] = {}
    for end, (dtype, size) in wanted.items():
        part, label = parts[end], end.removeprefix(".") or "weight"
        if part is None:
            raise ValueError(f"{label} is missing")
        if part.dtype != dtype or part.numel() != size:
            got = f"{part.numel()} of {part.dtype}"
            raise ValueError(f"{label} is {got}, must be {size} of {dtype}")
        flat[end] = part.reshape(-1)
    if extra := [end for end, part in parts.items() if part is not None and end not in wanted]:
        raise ValueError(f"{extra[0].removeprefix('.')} is there without nested_offset")
    for end, numbers in ((".quant_map", CODES), (".nested_quant_map", SCALE_CODES)):
        if end in flat and not torch.equal(flat[end], torch.tensor(numbers)):
            raise ValueError(f"{end.removeprefix('.')} holds other numbers than nf4's")
    offset = torch.tensor(state["nested_offset"]) if nested else None
    floats = [flat[end] for end in (".absmax", ".nested_absmax") if end in flat] + [offset]
    if not all(t is None or t.dtype == torch.uint8 or bool(t.isfinite().all()) for t in floats):
        raise ValueError("a scale is not finite")
    return Quantized(
        flat[""].clone(),  # of its own memory, where it begins at an even byte
        flat[".absmax"].clone(),
        flat[".nested_absmax"].clone() if nested else None,
        offset,
        shape,
        dtypes[state["dtype"]],
        state["blocksize"],
    )


def scatter(name: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a weight called `name` in a checkpoint."""
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": weight.block,
        "dtype": NAMES[weight.dtype],
        "shape": list(weight.shape),
    }
    tensors = {
        name: weight.packed[:, None],
        f"{name}.absmax": weight.scales,
        f"{name}.quant_map": torch.tensor(CODES),
    }
    if weight.scales_of_scales is not None and weight.offset is not None:
        state |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = weight.offset.item()
        tensors[f"{name}.nested_absmax"] = weight.scales_of_scales
        tensors[f"{name}.nested_quant_map"] = torch.tensor(SCALE_CODES)
    encoded = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**tensors, f"{name}{STATE}nf4": encoded}


def quantization_config(double: bool, dtype: torch.dtype, dense: list[str]) -> dict[str, Any]:
    """The field of config.json.

    Args:
        dense: the linear layers that are not in 4 bits, by their names in the checkpoint.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }
