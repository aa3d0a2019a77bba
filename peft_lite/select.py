"""Patterns -> modules and parameters.  A pattern that matches nothing is an error.

A module has a native name (`blocks.3.attention.query`) and, where the model carries a table
`names`, a checkpoint name (`transformer.h.3.attn.attention.q_proj`); either may be matched.
"""

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from peft_lite.wrapper import innermost, named_layers, named_weights

Patterns = str | Sequence[str]
V = TypeVar("V")

SECONDS = 5  # that the expressions of a file may take on the names of a model
MATCH_ALL = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for regex in map(re.compile, expressions):
    for name in names:
        regex.fullmatch(name), regex.search(name)
"""


def nearest(name: object, valid: Iterable[str]) -> str:
    """` (did you mean 'query'?)`, or nothing when no valid name is near; `name` may be anything
    that was given in place of one.
    """
    close = difflib.get_close_matches(str(name), sorted(set(valid)), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def hf_name(model: nn.Module, name: str) -> str:
    """The checkpoint's name of a module or parameter; its own where the model has no table.

    What `torch.compile` and data parallel training put around a model is no part of it.
    """
    name = uncompiled(name)
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model, name = model.module, name.removeprefix("module.")
    to_hf: Callable[[str], str] | None
    to_hf = getattr(getattr(model, "names", None), "to_hf", None)
    return name if to_hf is None else to_hf(name)


def uncompiled(name: str) -> str:
    """A name without the `_orig_mod` of `torch.compile`."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def check_expressions(model: nn.Module, expressions: Iterable[str]) -> None:
    """Refuses regular expressions of a file that are none, or would take too long on this model.

    `(a+)+$` can take years.  Another process tries the expressions on the model's names first, so
    that it can be stopped; plain names need no trial.

    Raises:
        ValueError: an expression cannot be compiled, or all take more than `SECONDS`.
    """
    tried = [e for e in expressions if not re.fullmatch(r"[\w.-]*", e)]
    if not tried:
        return
    native = [name for name, _ in named_layers(model)] + [n for n, _ in named_weights(model)]
    names = sorted({s for n in native for s in (n, hf_name(model, n))})
    command = [sys.executable, "-I", "-S", "-c", MATCH_ALL]
    try:
        result = subprocess.run(
            command, input=json.dumps([tried, names]).encode(), capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"the regular expression {max(tried, key=len)!r} takes more than {SECONDS} seconds"
        ) from None
    if result.returncode:
        reason = (result.stderr.decode(errors="replace").splitlines() or ["it crashes"])[-1]
        raise ValueError(f"one of {tried} is not a regular expression: {reason}")


def select_modules(
    model: nn.Module, patterns: Patterns, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> dict[str, nn.Module]:
    """The modules of the given kinds that `target_modules` names, by native name.

    HF PEFT's rule: a list matches a whole name or its end after a dot; a string is a regular
    expression over the whole name; `all-linear` is every linear layer but the head.
    """
    modules = {name: m for name, m in named_layers(model) if isinstance(m, kinds)}
    if patterns == "all-linear":
        head = head_names(model)
        linear: dict[str, nn.Module] = {
            n: m for n, m in modules.items() if isinstance(m, nn.Linear) and n not in head
        }
        if not linear:
            kind = type(model).__name__
            raise ValueError(f"'all-linear' matches no layer of {kind} but the head")
        return linear
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hit = _regex(pattern).fullmatch if isinstance(patterns, str) else _ends_with(pattern)
        matched = {n for n in modules if _any(hit, model, n)}
        if not matched:
            ends = {s.rsplit(".", 1)[-1] for n in modules for s in (n, hf_name(model, n))}
            hint = nearest(pattern, ends)
            if isinstance(patterns, str) and pattern in ends:
                hint = f" (a string matches whole names, a list as [{pattern!r}] their ends)"
            raise ValueError(
                f"target {pattern!r} matches no {'/'.join(k.__name__ for k in kinds)} layer of "
                f"{type(model).__name__}{hint}; layers end in "
                f"{', '.join(sorted(e for e in ends if not e.isdecimal()))}"
            )
        chosen |= matched
    if not chosen:
        raise ValueError("target_modules is empty: name at least one layer, or 'all-linear'")
    return {n: m for n, m in modules.items() if n in chosen}


def select_parameters(model: nn.Module, patterns: Patterns) -> set[str]:
    """Native names of the parameters that `patterns` name, tied ones under every name they have.

    An entry of a list is a run of whole parts of a name: `attention` names all that lies within
    modules called so, and not `attention_norm`.  A string is a regular expression that is searched
    in the name.
    """
    parameters = [n for n, _ in named_weights(model)]
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hit = _regex(pattern).search if isinstance(patterns, str) else _has_part(pattern)
        matched = {n for n in parameters if _any(hit, model, n)}
        if not matched:
            parts = {p for n in parameters for s in (n, hf_name(model, n)) for p in s.split(".")}
            raise ValueError(
                f"pattern {pattern!r} matches no parameter of "
                f"{type(model).__name__}{nearest(pattern, parts)}"
            )
        chosen |= matched
    if not chosen:
        raise ValueError("no pattern given, so nothing is named: name at least one parameter")
    same = {id(p) for n, p in named_weights(model) if n in chosen}
    return {n for n, p in named_weights(model) if id(p) in same}


def in_layers(layers: Mapping[str, V], numbers: Sequence[int] | int | None) -> dict[str, V]:
    """Those that lie in the blocks of these numbers (HF PEFT's `layers_to_transform`); None: all.

    The block's number is the first in a name: 3 in `blocks.3.attention.query`.
    """
    if numbers is None:
        return dict(layers)
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    block = {n: next((int(p) for p in n.split(".")[:-1] if p.isdecimal()), None) for n in layers}
    if absent := wanted - set(block.values()):
        valid = sorted(b for b in set(block.values()) if b is not None)
        raise ValueError(f"layers_to_transform: {min(absent)} is not a block of {valid}")
    return {name: value for name, value in layers.items() if block[name] in wanted}


def check_patterns(field: str, patterns: object) -> None:
    """A string, or a sequence of strings."""
    if not isinstance(patterns, str) and not (
        isinstance(patterns, Sequence) and all(isinstance(name, str) for name in patterns)
    ):
        raise ValueError(f"{field} is {patterns!r}, must be names or a string")


def check_layers(numbers: object) -> None:
    """None, the number of a block, or some of them."""
    several = [numbers] if isinstance(numbers, int) else numbers
    if numbers is not None and not (
        isinstance(several, Sequence)
        and several
        and all(isinstance(n, int) and not isinstance(n, bool) for n in several)
    ):
        raise ValueError(f"layers_to_transform is {numbers!r}, must be one or more whole numbers")


def resolve_pattern(
    model: nn.Module, layers: Iterable[str], pattern: Mapping[str, V], field: str
) -> dict[str, V]:
    """Layer name -> value, for HF PEFT's `rank_pattern` and `alpha_pattern`: each key is a regular
    expression for the end of a name after a dot, and the first that matches counts.
    """
    values: dict[str, V] = {}
    layers = list(layers)
    for key, value in pattern.items():
        regex = _regex(rf"(.*\.)?({key})")
        matched = [n for n in layers if _any(regex.fullmatch, model, n)]
        if not matched:
            ends = {s.rsplit(".", 1)[-1] for n in layers for s in (n, hf_name(model, n))}
            raise ValueError(f"{field} {key!r} matches no targeted layer{nearest(key, ends)}")
        values = {**dict.fromkeys(matched, value), **values}
    return values


def ends_with(name: str, pattern: str) -> bool:
    """`output.dense` is `encoder.layer.0.output.dense`'s end, `put.dense` is not.

    `^output.dense` is a whole name.
    """
    return f"^{name}" == pattern or f".{name}".endswith(f".{pattern}")


def _ends_with(pattern: str) -> Callable[[str], object]:
    return lambda name: ends_with(name, pattern)


def _has_part(pattern: str) -> Callable[[str], object]:
    return lambda name: f".{pattern}." in f".{name}."


def _any(matches: Callable[[str], object], model: nn.Module, name: str) -> bool:
    """Whether the native or the checkpoint name matches."""
    return bool(matches(name) or matches(hf_name(model, name)))


def _regex(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def head_names(model: nn.Module) -> set[str]:
    """Names of the layer that gives the logits: ours is called `head` or lies in it, that of
    `transformers` is what `get_output_embeddings` gives.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    innermost_output = None if output is None else innermost(output)
    ours = ("head", "head.decoder", "head.classifier")
    return {n for n, m in named_layers(model) if n in ours or m is innermost_output}
