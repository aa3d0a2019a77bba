"""Checks of configs.  Errors name the value, what is allowed and the nearest valid name."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(name: str, valid: Iterable[str]) -> str:
    """` (did you mean 'query'?)`, or an empty text when no valid name is near."""
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def positive(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if value < 1:
            raise ValueError(f"{field} is {value}, must be at least 1")


def probability(config: Any, *fields: str) -> None:
    for field in fields:
        value = getattr(config, field)
        if not 0 <= value < 1:
            raise ValueError(f"{field} is {value}, must lie in [0, 1)")


def one_of(config: Any, field: str, allowed: Iterable[str]) -> None:
    value, allowed = getattr(config, field), list(allowed)
    if value not in allowed:
        raise ValueError(
            f"{field} is {value!r}, must be one of {', '.join(allowed)}{nearest(value, allowed)}"
        )
