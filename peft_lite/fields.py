"""The fields of `adapter_config.json`: what methods share when they write and read them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from torch import nn

from peft_lite.select import ends_with, hf_name, nearest
from peft_lite.wrapper import named_layers

# fields of PEFT's configs that say nothing about the mathematics of a trained adapter
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
# the shape of the model that a prefix or prompt is for; `files.check_shape` compares it
SHAPES = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")


def write_all(config: Any) -> dict[str, Any]:
    """Every field of a config, for a method that HF PEFT does not have."""
    return {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in asdict(config).items()
    }


def read(
    raw: Mapping[str, Any], config: type, harmless: set[str] | frozenset[str] = frozenset()
) -> dict[str, Any]:
    """The fields of `config` that a file sets.

    Args:
        harmless: further fields of HF PEFT that do not change the mathematics.

    Raises:
        ValueError: a field that is set is not supported.
    """
    known = {f.name for f in fields(config)}
    for name, value in raw.items():
        if not (name in known | HARMLESS | harmless or _is_unset(value)):
            raise ValueError(f"{name} = {value!r} is not supported{nearest(name, known)}")
    return {name: raw[name] for name in known if raw.get(name) is not None}


def read_targeted(raw: Mapping[str, Any], config: type, harmless: set[str]) -> dict[str, Any]:
    """The same for a method that has to name its layers."""
    if not raw.get("target_modules"):
        raise ValueError("no target_modules")
    return read(raw, config, harmless)


def shortest_ends(model: nn.Module, chosen: set[str]) -> list[str]:
    """The shortest ends of names that match these layers and no other: `["q_proj", "v_proj"]`."""
    # containers as well: PEFT refuses to target one
    every = {hf_name(model, name) for name, _ in named_layers(model)}
    longest = max(name.count(".") for name in chosen) + 1
    for parts in range(1, longest + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in chosen}
        if {name for name in every for end in ends if ends_with(name, end)} == chosen:
            return sorted(ends)
    return sorted(chosen)


def _is_unset(value: object) -> bool:
    """Whether a field says that its feature is off; 0 does not: it may be the number of a layer."""
    return value is None or value is False or value in ("none", [], {})
