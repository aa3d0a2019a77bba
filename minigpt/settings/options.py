"""Settings dataclasses as command-line options: one list of names, types, defaults and help."""

import argparse
import math
from collections.abc import Callable
from dataclasses import MISSING, Field, field, fields
from typing import Any, get_args, get_type_hints


def option(
    help: str,
    default: Any = MISSING,
    choices: tuple[str, ...] | None = None,
    free: bool = False,
) -> Any:
    """A field of a settings dataclass with its text for `--help`.

    Args:
        free: no bit of a result depends on it: a run may be continued with another value.
    """
    return field(default=default, metadata={"help": help, "choices": choices, "free": free})


def free(settings: type) -> set[str]:
    """The names of the free settings."""
    return {f.name for f in fields(settings) if f.metadata.get("free")}


def with_default(settings: type, name: str, default: Any, help: str | None = None) -> Any:
    """The option `name` of another class, with another default, and its own help where given."""
    (f,) = (f for f in fields(settings) if f.name == name)
    return option(help or f.metadata["help"], default, f.metadata["choices"], f.metadata["free"])


def add_options(parser: argparse.ArgumentParser, settings: type) -> None:
    """One option for each field that has a help text, those without a default first.  Options that
    are not given stay out of the namespace.
    """
    hints = get_type_hints(settings)
    offered = [f for f in fields(settings) if "help" in f.metadata]
    for f in sorted(offered, key=lambda f: f.default is not MISSING):
        kind = next((k for k in get_args(hints[f.name]) if k is not type(None)), hints[f.name])
        flag = "--" + f.name.replace("_", "-")
        if hints[f.name] is bool:
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
            continue
        many = hints[f.name] == list[str] or list[str] in get_args(hints[f.name])
        parser.add_argument(
            flag,
            type=str if many else READERS.get(kind, kind),
            nargs="+" if many else None,
            choices=f.metadata["choices"],
            metavar=None if f.metadata["choices"] else _metavar(str if many else kind),
            help=_help(f),
        )


def whole(text: str) -> int:
    """A whole number of 64 bits."""
    try:
        number = int(text)
    except ValueError:
        number = None
    if number is None or abs(number) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of 64 bits")
    return number


def real(text: str) -> float:
    """A number that is finite in 32 bits, in which the models compute."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no finite number of 32 bits")
    return number


LARGEST = (2 - 2**-23) * 2.0**127
READERS: dict[type, Callable[[str], Any]] = {int: whole, float: real}


def _metavar(kind: type) -> str:
    return {int: "N", float: "X"}.get(kind, "TEXT")


def _help(f: Field[Any]) -> str:
    shown = f.default is not MISSING and f.default is not None
    default = " ".join(f.default) if isinstance(f.default, tuple) else f.default
    return f.metadata["help"] + (f" (default: {default})" if shown else "")
