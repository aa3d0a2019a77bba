"""What the figures of all studies have in common: one colour and one line style for each model,
told apart in black and white too, units on every axis.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# the two models of a comparison look the same in every figure
FULL = {"color": "#1b4f8a", "linestyle": "-", "marker": "o"}
FROZEN = {"color": "#d1711b", "linestyle": "--", "marker": "s"}
# further ones, in this order
OTHERS: tuple[dict[str, str], ...] = (
    {"color": "#2e7d4f", "linestyle": "-.", "marker": "^"},
    {"color": "#8b3a8f", "linestyle": ":", "marker": "D"},
    {"color": "#6b6b6b", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},  # type: ignore[dict-item]
    {"color": "#b03a3a", "linestyle": (0, (1, 1)), "marker": "P"},  # type: ignore[dict-item]
    {"color": "#158a8a", "linestyle": (0, (3, 1)), "marker": "X"},  # type: ignore[dict-item]
    {"color": "#7a6a00", "linestyle": (0, (6, 2, 2, 2)), "marker": "*"},  # type: ignore[dict-item]
    {"color": "#444488", "linestyle": (0, (8, 3)), "marker": "<"},  # type: ignore[dict-item]
)
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "||")


def line(style: dict[str, Any]) -> dict[str, Any]:
    """The style of a line, without its marks."""
    return {name: style[name] for name in ("color", "linestyle")}


def marks(style: dict[str, Any]) -> dict[str, Any]:
    """The style of marks, without the line."""
    return {name: style[name] for name in ("color", "marker")}


@contextmanager
def figure(path: Path, width: float = 7.0, height: float = 4.0, **grid: Any) -> Iterator[Any]:
    """Axes to draw on; written to `path` (PNG) on the way out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **grid)
    try:
        yield axes
        drawn.savefig(path, dpi=150)
    finally:
        pyplot.close(drawn)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window` - 1 before it."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))
    ]
