"""Measured figures in words: values with intervals, percentages, sides of an alternative."""

import math
from collections.abc import Sequence
from pathlib import Path

from minigpt.metrics.intervals import Estimate


def shown(estimate: Estimate, form: str = ".3f", unit: str = "") -> str:
    """`2.650 [2.601, 2.699]`, or the value alone where there is no interval."""
    value = f"{estimate.value:{form}}{unit}"
    if math.isinf(estimate.low):
        return value
    return f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"


def percent(estimate: Estimate, unit: str = " %") -> str:
    """0.25 -> `25.0 % [22.1, 27.9]`."""
    scaled = Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)
    return shown(scaled, ".1f", unit)


def side(estimate: Estimate, above: str, below: str, neither: str, alternative: float = 0.0) -> str:
    """One of three wordings: the interval lies above, below, or around the alternative."""
    if estimate.low > alternative:
        return above
    return below if estimate.high < alternative else neither


def moves(change: Estimate, unit: str = "") -> str:
    """A change in words: the figure rises, falls, or does neither clearly."""
    if change.low > 0:
        return f"rises by {change}{unit}"
    if change.high < 0:
        return f"falls by {Estimate(-change.value, -change.high, -change.low)}{unit}"
    return f"changes by {change}{unit}, not clearly"


def name(source: str) -> str:
    """The last part of the path, or of the hub id, of a model or a text."""
    return Path(source).name


def ran_on(model: str, texts: Sequence[str], seeds: int) -> str:
    """Model, data and number of seeds of a finding."""
    return ", ".join([name(model), *map(name, texts), f"{seeds} seed{'s' if seeds > 1 else ''}"])
