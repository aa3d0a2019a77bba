"""Checks of configs.  Errors name the value, what is allowed and the nearest valid name."""

import difflib
from collections.abc import Iterable
from typing import Any

MAX_LAYERS = 1000  # the deepest published model has 126


def nearest(name: object, valid: Iterable[str]) -> str:
    """` (did you mean 'query'?)`, or an empty text when no valid name is near; `name` may be
    anything that was given in place of one.
    """
    close = difflib.get_close_matches(str(name)[:60], list(valid), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def short(value: object) -> str:
    """A value for a message, cut."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value < 1:
            raise ValueError(f"{field} is {short(value)}, must be at least 1")


def size(config: Any, *fields: str, at_most: int = 2**24) -> None:
    """A number of rows, columns or blocks, no larger than any published model has."""
    for field in fields:
        value = getattr(config, field)
        if not 1 <= value <= at_most:
            raise ValueError(f"{field} is {short(value)}, must lie in [1, {at_most:,}]")


def between(config: Any, low: float, high: float, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not low <= value <= high:
            raise ValueError(f"{field} is {short(value)}, must lie in [{low}, {high}]")


def probability(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not 0 <= value < 1:
            raise ValueError(f"{field} is {short(value)}, must lie in [0, 1)")


def one_of(config: Any, field: str, allowed: Iterable[str]) -> None:
    value, allowed = getattr(config, field), list(allowed)
    if value not in allowed:
        raise ValueError(
            f"{field} is {short(value)}, must be one of {', '.join(allowed)}"
            f"{nearest(value, allowed)}"
        )
