"""Adapters of a layer that the model holds in parts.

GPT-2's checkpoints have one layer `c_attn` where the model has query, key and value, and a LoRA of
HF PEFT is one for all three:

    W' = W + s B A        W (3 D, D)    B (3 D, R)    A (R, D)

A row of B A is that row of B times A.  So it equals three LoRAs with the same A, and a third of B's
rows each.  All else that has a row an output, a bias or DoRA's magnitudes, is cut in the same way.
They go on as three: when they train, each has an A and a dropout of its own.

The model's table of names tells which layers these are: `joined`, the last part of a checkpoint's
name -> the last parts of those that the model has.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

WHOLE = ("weight", "base_layer.weight", "modules_to_save.weight")
SHARED = ("lora_A.weight",)


def split_config(model: nn.Module, raw: Mapping[str, Any]) -> dict[str, Any]:
    """The lines of `adapter_config.json` with the parts in the place of each joined layer."""
    changed = dict(raw)
    for whole, parts in _joined(model).items():
        if isinstance(targets := changed.get("target_modules"), list):
            changed["target_modules"] = [
                name for target in targets for name in _variants(target, whole, parts)
            ]
        elif isinstance(targets, str):
            changed["target_modules"] = _expression(targets, whole, parts)
        for field in ("rank_pattern", "alpha_pattern"):
            if isinstance(pattern := changed.get(field), dict):
                changed[field] = {_expression(k, whole, parts): v for k, v in pattern.items()}
    return changed


def split_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, those of a joined layer cut into its parts'.

    Raises:
        ValueError: one is the layer's own weight, or cannot be cut.
    """
    joined = _joined(model)
    split: dict[str, Tensor] = {}
    for name, t in tensors.items():
        layer, _, end = next(
            (name.partition(f".{whole}.") for whole in joined if f".{whole}." in name), ("", "", "")
        )
        if not end:
            split[name] = t
            continue
        whole = name.removeprefix(f"{layer}.").removesuffix(f".{end}")
        parts = joined[whole]
        if end in WHOLE:
            raise ValueError(
                f"{name} is all of a layer that this model holds as {', '.join(parts)}: only what "
                "a method adds to it can be read"
            )
        if end not in SHARED and (t.dim() == 0 or len(t) % len(parts)):
            raise ValueError(f"{name} is {list(t.shape)}, its rows must be those of {parts}")
        pieces = [t] * len(parts) if end in SHARED else t.chunk(len(parts))
        split |= {f"{layer}.{part}.{end}": x for part, x in zip(parts, pieces, strict=True)}
    return split


def is_turned(model: nn.Module, name: str, weight: Tensor) -> bool:
    """Whether the checkpoint has a weight of this name as (in, out), where the model's is
    (out, in): `turned` of the table of names, the last parts of such layers' names.
    """
    layer, _, end = name.rpartition(".")
    turned = getattr(_names(model), "turned", ())
    return end == "weight" and weight.dim() == 2 and layer.rpartition(".")[2] in turned


def _joined(model: nn.Module) -> Mapping[str, tuple[str, ...]]:
    joined: Mapping[str, tuple[str, ...]] = getattr(_names(model), "joined", {})
    return joined


def _names(model: nn.Module) -> Any:
    """The model's table of names, if it has one."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    return getattr(model, "names", None)


def _variants(target: Any, whole: str, parts: tuple[str, ...]) -> list[Any]:
    """`attn.c_attn` -> `attn.q_proj`, `attn.k_proj`, `attn.v_proj`"""
    if not isinstance(target, str) or target.rpartition(".")[2] != whole:
        return [target]
    return [target.removesuffix(whole) + part for part in parts]


def _expression(regex: str, whole: str, parts: tuple[str, ...]) -> str:
    """A regular expression that matches the parts where it matched the whole."""
    return re.sub(rf"\b{whole}\b", f"(?:{'|'.join(parts)})", regex)
