"""Adapters on disk, in HF PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor is called `base_model.model.` + the layer's checkpoint name + `.lora_A.weight` (R, in) or
`.lora_B.weight` (out, R).  A setting that changes the mathematics and has no code here is an error.
Freezing, which PEFT does not have, is kept the same way under `"peft_type": "FREEZE"`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from peft_lite.freeze import FreezeConfig
from peft_lite.lora import LoraConfig, LoraLinear
from peft_lite.select import ends_with, hf_name, nearest
from peft_lite.tensor_files import read_named_tensors

PREFIX = "base_model.model."

# fields of PEFT's LoRA that say nothing about the mathematics of a trained adapter
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
}
# ways to begin: those that leave W as it was, so that W + s B A is right however B and A began
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def peft_name(model: nn.Module, name: str) -> str:
    return PREFIX + hf_name(model, name)


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "adapter.partial"
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(partial, directory / "adapter_model.safetensors")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, directory / "adapter_config.json")


def read(directory: Path) -> tuple[LoraConfig | FreezeConfig, dict[str, Tensor]]:
    """The config and the tensors of an adapter directory."""
    path = directory / "adapter_config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind == "LORA":
        config: LoraConfig | FreezeConfig = _read_lora(path, raw)
    elif kind == "FREEZE":
        config = FreezeConfig(train=raw.get("train"), freeze=raw.get("freeze"))
    else:
        raise ValueError(f"{path}: peft_type {kind!r} has no code here, must be LORA or FREEZE")
    return config, _read_tensors(directory)


def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Copies the tensors to their places, all or none."""
    for word, names in (
        ("missing", places.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - places.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:4])
            raise ValueError(f"{directory}: {len(names)} tensors are {word}: {some}")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            raise ValueError(
                f"{directory}: {name} is {list(tensors[name].shape)}, "
                f"this model wants {list(place.shape)}"
            )
    for name, place in places.items():
        place.copy_(tensors[name])


def lora_config(
    model: nn.Module, config: LoraConfig, layers: Mapping[str, LoraLinear]
) -> dict[str, Any]:
    """What PEFT needs to build the same adapter, with the layers under their checkpoint names."""
    names = {hf_name(model, name): layer for name, layer in layers.items()}
    ranks = {name: len(layer.lora_a) for name, layer in names.items()}
    alphas = {name: layer.alpha for name, layer in names.items()}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _shortest_ends(model, set(names)),
        "rank_pattern": {n: r for n, r in ranks.items() if r != config.r},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != config.lora_alpha},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }


def freeze_config(config: FreezeConfig) -> dict[str, Any]:
    return {"peft_type": "FREEZE", "train": config.train, "freeze": config.freeze}


def _shortest_ends(model: nn.Module, chosen: set[str]) -> list[str]:
    """The shortest ends of names that name these layers and no other: `["q_proj", "v_proj"]`."""
    # containers as well: PEFT refuses to target one
    every = {hf_name(model, name.removesuffix(".base")) for name, _ in model.named_modules()}
    longest = max(name.count(".") for name in chosen) + 1
    for parts in range(1, longest + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in chosen}
        if {name for name in every for end in ends if ends_with(name, end)} == chosen:
            return sorted(ends)
    return sorted(chosen)


def _read_lora(path: Path, raw: Mapping[str, Any]) -> LoraConfig:
    fields = set(LoraConfig.__dataclass_fields__)
    for name, value in raw.items():
        if name in fields or name in HARMLESS or _is_unset(value):
            continue
        if name == "init_lora_weights" and value in STARTS:
            continue
        raise ValueError(f"{path}: {name} = {value!r} has no code here{nearest(name, fields)}")
    if not raw.get("target_modules"):
        raise ValueError(f"{path}: no target_modules")
    settings = {n: raw[n] for n in fields if raw.get(n) is not None}
    try:
        return LoraConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _is_unset(value: object) -> bool:
    """Whether a field says that its feature is off; 0 does not: it may be the number of a layer."""
    return value is None or value is False or value in ("none", [], {})


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    safe, old = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    return read_named_tensors(safe if safe.exists() or not old.exists() else old)
