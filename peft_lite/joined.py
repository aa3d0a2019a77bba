"""Adapters of a layer that the model holds in parts.

GPT-2's checkpoints have one layer `c_attn` where the model has query, key and value, and a LoRA of
HF PEFT is one for all three:

    W' = W + s B A        W (3 D, D)    B (3 D, R)    A (R, D)

A row of B A is that row of B times A.  So it equals three LoRAs with the same A, and a third of B's
rows each.  All else that has a row an output, a bias or DoRA's magnitudes, is cut in the same way.
They go on as three: when they train, each has an A and a dropout of its own.  A file has them as
one again, of the sum of their ranks, or of one's where A is still the same:

    A = [A_q; A_k; A_v]    B = diag(B_q, B_k, B_v)    zeros for a part that has no LoRA

The model's table of names tells which layers these are: `joined`, the last part of a checkpoint's
name -> the last parts of those that the model has.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
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


def join(
    model: nn.Module,
    lines: dict[str, Any],
    tensors: dict[str, Tensor],
    scalings: Mapping[str, float],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The lines and tensors of a file of HF PEFT with one layer in the place of its parts.

    Args:
        scalings: beginning of a LoRA's tensor names -> its s.

    Raises:
        ValueError: what is on the parts has no form on the whole.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for whole, parts in _joined(model).items():
        for layer in _layers_of(tensors, parts):
            old = [f"{layer}.{part}" for part in parts]
            given = [_pop(tensors, beginning) for beginning in old]
            new = f"{layer}.{whole}"
            s = [scalings.get(beginning) for beginning in old]
            tensors |= {f"{new}.{end}": t for end, t in _as_one(new, given, s).items()}
            if (A := tensors.get(f"{new}.lora_A.weight")) is not None:
                scaling, R = next(x for x in s if x is not None), len(A)
                name = new.removeprefix("base_model.model.")
                ranks[name] = R
                alphas[name] = scaling * (math.sqrt(R) if lines.get("use_rslora") else R)
        lines = _lines_as_one(lines, whole, parts)
    for field, values, usual in (
        ("rank_pattern", ranks, lines.get("r")),
        ("alpha_pattern", alphas, lines.get("lora_alpha")),
    ):
        if values:
            lines[field] = {**lines[field], **{n: v for n, v in values.items() if v != usual}}
    return lines, tensors


def _layers_of(tensors: Mapping[str, Tensor], parts: tuple[str, ...]) -> list[str]:
    """What stands before `.q_proj.` and the like in the tensors' names."""
    pattern = re.compile(rf"(.+)\.(?:{'|'.join(parts)})\..+")
    found = (pattern.fullmatch(name) for name in tensors)
    return list(dict.fromkeys(match[1] for match in found if match))


def _pop(tensors: dict[str, Tensor], beginning: str) -> dict[str, Tensor]:
    """Takes the tensors of a layer out; their names' ends, as on a layer that has no method, -> the
    tensors.
    """
    names = [name for name in tensors if name.startswith(f"{beginning}.")]
    ends = {name.removeprefix(f"{beginning}."): tensors.pop(name) for name in names}
    return {end.removeprefix("base_layer."): t for end, t in ends.items()}


def _as_one(
    name: str, given: Sequence[Mapping[str, Tensor]], scalings: Sequence[float | None]
) -> dict[str, Tensor]:
    """The tensors of the whole, out of those of each part; a part that has none is {}."""
    one: dict[str, Tensor] = {}
    for end in dict.fromkeys(end for part in given for end in part):
        tensors = [part.get(end) for part in given]
        there = [t for t in tensors if t is not None]
        if end in WHOLE or (end == "ia3_l" and there[0].size(1) > 1):
            raise ValueError(f"{end} of a part of {name} has no form in a file of HF PEFT")
        if end in SHARED:
            same = all(torch.equal(t, there[0]) for t in there)
            one[end] = there[0] if same else torch.cat(there)
        elif end == "lora_B.weight":
            one[end] = _diagonal(given, scalings)
        elif end == "ia3_l":
            one[end] = torch.cat([torch.ones_like(there[0]) if t is None else t for t in tensors])
        elif len(there) < len(tensors):
            raise ValueError(
                f"{end} of some parts of {name} alone has no form in a file of HF PEFT"
            )
        else:
            one[end] = torch.cat(there)
    if "lora_A.weight" in one and "bias" in one:
        one["base_layer.bias"] = one.pop("bias")
    return one


def _diagonal(given: Sequence[Mapping[str, Tensor]], scalings: Sequence[float | None]) -> Tensor:
    """B of the whole, for the scaling of the first part that has one."""
    first = next(s for s in scalings if s is not None)
    A = [part["lora_A.weight"] for part in given if "lora_A.weight" in part]
    same = all(torch.equal(a, A[0]) for a in A)
    rows = next(len(part["lora_B.weight"]) for part in given if "lora_B.weight" in part)
    width, column = len(A[0]) if same else sum(map(len, A)), 0
    blocks = []
    for part, s in zip(given, scalings, strict=True):
        block = A[0].new_zeros(rows, width)
        if s is not None:
            B = part["lora_B.weight"]
            block[:, column : column + B.size(1)] = s / first * B
            column += 0 if same else B.size(1)
        blocks.append(block)
    return torch.cat(blocks)


def _lines_as_one(lines: dict[str, Any], whole: str, parts: tuple[str, ...]) -> dict[str, Any]:
    """The lines with the whole's name in the place of its parts', each once."""
    part = re.compile(rf"\b(?:{'|'.join(parts)})(?!\w)")

    def once(names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(part.sub(whole, name) for name in names))

    lines = dict(lines)
    for field in ("target_modules", "feedforward_modules"):
        if isinstance(names := lines.get(field), list):
            lines[field] = sorted(once(names))
        elif isinstance(names, str):
            lines[field] = "|".join(once(names.split("|")))
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(pattern := lines.get(field), dict):
            lines[field] = {key: v for key, v in pattern.items() if not part.search(key)}
    return lines


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
