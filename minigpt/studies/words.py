"""Measured figures in words: values with intervals, percentages, sides of an alternative."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.metrics.intervals import Estimate
from minigpt.studies.claims import SEEDS


def shown(estimate: Estimate, form: str = ".3f", unit: str = "") -> str:
    """`2.650 [2.601, 2.699]`, or the value alone where there is no interval."""
    value = f"{estimate.value:{form}}{unit}"
    if math.isinf(estimate.high):
        return value
    return f"{value} [{estimate.low:{form}}, {estimate.high:{form}}]"


def percent(estimate: Estimate, unit: str = " %") -> str:
    """0.25 -> `25.0 % [22.1, 27.9]`."""
    scaled = Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high)
    return shown(scaled, ".1f", unit)


def side(
    estimate: Estimate, n: int, above: str, below: str, neither: str, alternative: float = 0.0
) -> str:
    """One of three wordings: the interval lies above or below the alternative; or around it, or
    comes from too few seeds, n.
    """
    if n >= SEEDS and estimate.low > alternative:
        return above
    return below if n >= SEEDS and estimate.high < alternative else neither


def moves(change: Estimate, n: int, unit: str = "") -> str:
    """A change in words, of n seeds: the figure rises, falls, or does neither clearly."""
    fall = Estimate(-change.value, -change.high, -change.low)
    rises, falls = f"rises by {change}{unit}", f"falls by {fall}{unit}"
    return side(change, n, rises, falls, f"changes by {change}{unit}, not clearly")


def name(source: str) -> str:
    """The last part of the path, or of the hub id, of a model or a text."""
    return Path(source).name


def weights(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What the parts of a study say about the model's weights: "Q4_1 weights", or ""."""
    return next((part["weights"] for part in parts.values() if "weights" in part), "")


def model_name(model: str, weights: str = "") -> str:
    """`smollm2, Q4_1 weights`, or the name alone."""
    return f"{name(model)}, {weights}" if weights else name(model)


def ran_on(model: str, texts: Sequence[str], seeds: int, weights: str = "") -> str:
    """Model, data and number of seeds of a finding."""
    return ", ".join([model_name(model, weights), *map(name, texts), enough(seeds, "seed")])


def enough(n: int, what: str) -> str:
    """`2 seeds, 5 needed`, or the number alone where it is enough for a verdict."""
    return f"{n} {what}{'s' if n > 1 else ''}{'' if n >= SEEDS else f', {SEEDS} needed'}"
