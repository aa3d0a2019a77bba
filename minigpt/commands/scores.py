"""Scores of many rows: their means with intervals, as text and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.metrics.intervals import Estimate, bootstrap
from minigpt.metrics.rouge import Score
from peft_lite import storage

Measured = dict[str, dict[str, Estimate]]  # kind -> precision, recall, f -> mean over the rows


def measure(rows: Sequence[Mapping[str, Any]], seed: int) -> Measured:
    """The mean of each number in the rows' `scores`, with a 95 % bootstrap interval."""
    return {
        kind: {
            name: bootstrap([row["scores"][kind][name] for row in rows], seed)
            for name in Score._fields
        }
        for kind in rows[0]["scores"]
    }


def text(measured: Measured, rows: int) -> str:
    """A line for each kind: F with its interval, precision, recall."""
    table = [["", "F", "95 % interval", "precision", "recall"]]
    for kind, parts in measured.items():
        f = parts["f"]
        interval = f"{f.low:.4f} to {f.high:.4f}"
        numbers = (parts[name].value for name in ("precision", "recall"))
        table.append([kind, f"{f.value:.4f}", interval, *(f"{number:.4f}" for number in numbers)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
    return "\n".join([f"ROUGE, mean of {rows:,} rows", "", *lines])


def draw(file: Path, rows: Sequence[Mapping[str, Any]], measured: Measured) -> None:
    """Writes a PNG: how F is spread over the rows, and its mean with the interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(1.5 + 1.3 * len(measured), 4), layout="constrained")
    values = [[row["scores"][kind]["f"] for row in rows] for kind in measured]
    axes.boxplot(values, whis=(5, 95), showfliers=False, medianprops={"color": "#6b6b6b"})
    f = [parts["f"] for parts in measured.values()]
    error = [[e.value - e.low for e in f], [e.high - e.value for e in f]]
    places = range(1, len(f) + 1)
    axes.errorbar(places, [e.value for e in f], error, fmt="o", color="#1b4f8a", capsize=5)
    axes.set_xticks(places, list(measured))
    axes.set(ylim=(-0.02, 1.02), ylabel="F")
    axes.set_title(
        f"{len(rows):,} rows: mean and 95 % interval;\nbox: quartiles, whiskers: 5 % to 95 %",
        fontsize="small",
    )
    with storage.writing(file) as partial:
        figure.savefig(partial, format="png", dpi=150)
    pyplot.close(figure)
