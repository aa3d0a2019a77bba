"""The fields of `adapter_config.json`: what methods share when they write and read them."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar, get_type_hints

from torch import nn

from peft_lite.json_files import check_types
from peft_lite.select import ends_with, hf_name, nearest, resolve_pattern
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
# the shape of the model that a prefix or prompt is for; `files.read` compares it
V = TypeVar("V")

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
        ValueError: a field that is set is not supported, or its value is of the wrong type.
    """
    known = {f.name for f in fields(config)}
    for name, value in raw.items():
        if not (name in known | HARMLESS | harmless or _is_unset(value)):
            raise ValueError(f"{name} = {value!r} is not supported{nearest(name, known)}")
    hints = get_type_hints(config)
    required = {name for name in known if hints[name] in (int, float)}  # a null would hide a number
    given = {n: v for n, v in raw.items() if n in required or (n in known and v is not None)}
    check_types(given, hints)
    return given


def expressions(raw: Mapping[str, Any]) -> Iterator[str]:
    """The regular expressions in a file, as they are matched."""
    for name in ("target_modules", "feedforward_modules", "train", "freeze"):
        if isinstance(value := raw.get(name), str):
            yield value
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(pattern := raw.get(name), Mapping):
            yield from (rf"(.*\.)?({key})" for key in pattern if not re.fullmatch(r"[\w.]+", key))


def read_targeted(raw: Mapping[str, Any], config: type, harmless: set[str]) -> dict[str, Any]:
    """The same for a method that has to name its layers."""
    if not raw.get("target_modules"):
        raise ValueError("no target_modules")
    return read(raw, config, harmless)


def targets(model: nn.Module, chosen: Iterable[str]) -> list[str] | str:
    """`target_modules` for these layers and no other: the shortest ends of their checkpoint names,
    `["q_proj", "v_proj"]`, or an expression of whole names where each end is another layer's too.
    """
    chosen = set(chosen)
    # containers as well: PEFT refuses to target one
    every = {name: hf_name(model, name) for name, _ in named_layers(model)}
    longest = max(every[name].count(".") for name in chosen) + 1
    for parts in range(1, longest + 1):
        ends = {".".join(every[name].split(".")[-parts:]) for name in chosen}
        reached = {n for n in every for e in ends if ends_with(n, e) or ends_with(every[n], e)}
        if reached == chosen:
            return sorted(ends)
    return whole_names(every[name] for name in chosen)


def whole_names(names: Iterable[str]) -> str:
    """A regular expression that these names match and no other."""
    return "|".join(re.escape(name) for name in sorted(names))


def pattern(model: nn.Module, values: Mapping[str, V], other: V) -> dict[str, V]:
    """`rank_pattern` or `alpha_pattern`: layers whose value is not `other`, by checkpoint names.

    A name that is another layer's end too is written as `^name`.
    """
    lines: dict[str, V] = {}
    for layer, value in values.items():
        if value != other:
            name = hf_name(model, layer)
            plain = re.fullmatch(r"[\w.]+", name) is not None
            plain = plain and len(resolve_pattern(model, values, {name: value}, "")) == 1
            lines[name if plain else f"^{re.escape(name)}"] = value
    return lines


def _is_unset(value: object) -> bool:
    """Whether a field says that its feature is off; 0 does not: it may be the number of a layer."""
    return value is None or value is False or value in ("none", [], {})
