"""What the figures of all studies share: a colour and a line style for each model, told apart in
black and white too; bars and marks with their intervals.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.metrics.intervals import Estimate
from minigpt.studies.report import Figure

Style = dict[str, Any]

# the two models of a comparison look the same in every figure
FULL: Style = {"color": "#1b4f8a", "linestyle": "-", "marker": "o"}
FROZEN: Style = {"color": "#d1711b", "linestyle": "--", "marker": "s"}
# further ones, in this order
OTHERS: tuple[Style, ...] = (
    {"color": "#2e7d4f", "linestyle": "-.", "marker": "^"},
    {"color": "#8b3a8f", "linestyle": ":", "marker": "D"},
    {"color": "#6b6b6b", "linestyle": (0, (5, 1, 1, 1)), "marker": "v"},
    {"color": "#b03a3a", "linestyle": (0, (1, 1)), "marker": "P"},
    {"color": "#158a8a", "linestyle": (0, (3, 1)), "marker": "X"},
    {"color": "#7a6a00", "linestyle": (0, (6, 2, 2, 2)), "marker": "*"},
    {"color": "#444488", "linestyle": (0, (8, 3)), "marker": "<"},
)
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "||")
BOX: Style = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.0}}  # behind a word


def line(style: Style) -> Style:
    """The style of a line, without its marks."""
    return {name: style[name] for name in ("color", "linestyle")}


def marks(style: Style) -> Style:
    """The style of marks, without the line."""
    return {name: style[name] for name in ("color", "marker")}


class Figures:
    """The figures of a report, drawn in `folder` one after another.

    Args:
        label: what every picture and caption says besides, such as "Q4_1 weights".
    """

    def __init__(self, folder: Path, label: str = "") -> None:
        self.folder = folder
        self.label = label
        self.drawn: list[Figure] = []

    @contextmanager
    def add(
        self, file: str, caption: str, width: float = 7.0, height: float = 4.0, **grid: Any
    ) -> Iterator[Any]:
        """Axes to draw on, `width` by `height` inches; written to `file` (PNG) on the way out."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        self.folder.mkdir(parents=True, exist_ok=True)
        with pyplot.rc_context({"legend.fontsize": "small"}):
            page, axes = pyplot.subplots(figsize=(width, height), layout="constrained", **grid)
            try:
                yield axes
                if self.label:
                    page.suptitle(self.label, x=0.99, ha="right", fontsize="small")
                    caption = f"{caption} {self.label}."
                page.savefig(self.folder / file, dpi=150)
                self.drawn.append(Figure(file, caption))
            finally:
                pyplot.close(page)


def curve(axes: Any, values: Sequence[float], style: Style, label: str | None = None) -> None:
    """A line through values at 1, 2, 3, ..."""
    axes.plot(range(1, len(values) + 1), values, label=label, **line(style))


def bar(axes: Any, x: float, height: Estimate, **style: Any) -> None:
    """A bar with its interval, where that is finite."""
    axes.bar(x, height.value, 0.36, edgecolor="black", **style)
    if math.isfinite(height.high - height.low):
        error = [[height.value - height.low], [height.high - height.value]]
        axes.errorbar(x, height.value, error, color="black", capsize=4)


def points(axes: Any, x: Sequence[float], y: Sequence[Estimate], **style: Any) -> None:
    """Marks with their intervals."""
    below = [estimate.value - estimate.low for estimate in y]
    above = [estimate.high - estimate.value for estimate in y]
    axes.errorbar(x, [estimate.value for estimate in y], yerr=[below, above], capsize=3, **style)


def smooth(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window` - 1 before it."""
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(values))
    ]
