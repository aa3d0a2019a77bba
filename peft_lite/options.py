"""Options of a command for the fields of a config, declared at the field itself.

    r: int = field(default=8, metadata=option("rank", "rank r", int))

A command collects them over the methods (minigpt/settings/methods.py).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Option:
    """A command's option for one field of a config.

    Attributes:
        name: without dashes, with underscores.
        help: what the option sets.
        type: of the value on the command line; `list[str]` takes several words.
        default: the field's value where the option is not given; None: the config's own default.
        shown: the default as help shows it; None: the default itself, "": help shows none.
        choices: the values allowed, None: any.
        read: turns the value on the command line into the field's value.
    """

    name: str
    help: str
    type: Any
    default: Any = None
    shown: str | None = None
    choices: tuple[str, ...] | None = None
    read: Callable[[Any], Any] = lambda value: value


def option(name: str, help: str, type: Any, **settings: Any) -> dict[str, Option]:
    """The metadata of a field that a command offers."""
    return {"option": Option(name, help, type, **settings)}


def options_of(config: type) -> dict[str, Option]:
    """Field name -> option, for the fields of a config that a command offers."""
    return {f.name: f.metadata["option"] for f in fields(config) if "option" in f.metadata}


def shown_default(config: type, field: str) -> str:
    """The default of a field's option as help shows it, "" for none."""
    choice = options_of(config)[field]
    if choice.shown is not None:
        return choice.shown
    defaults = {f.name: f.default for f in fields(config)}
    value = defaults[field] if choice.default is None else choice.default
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def target(help: str = "", **settings: Any) -> dict[str, Option]:
    """The metadata of `target_modules`, the same option `--target` for every method."""
    text = f"layers, by the ends of their names or one regular expression{help}"
    return option("target", text, list[str], read=names, **settings)


def names(values: Sequence[str]) -> str | list[str]:
    """Words of a command line -> patterns of module names.

    A single word that is no plain name is a regular expression, or `all-linear`; commas may join
    plain names.
    """
    if len(values) == 1 and (values[0] == "all-linear" or not re.fullmatch(r"[\w.,-]+", values[0])):
        return values[0]
    return [name for value in values for name in value.split(",") if name]


def block_numbers(layers: str) -> list[int]:
    """`6-8,11` -> [6, 7, 8, 11]"""
    numbers: list[int] = []
    for part in layers.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise ValueError(f"--layers is {layers!r}, must be like 6-11 or 0,2")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers += range(first, last + 1)
    return numbers
