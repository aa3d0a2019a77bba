"""The figures of write-up 000, and one of the inverse (minigpt/studies/targeted_freezing.py)."""

from collections.abc import Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

from minigpt.metrics.intervals import Estimate
from minigpt.studies.figures import FROZEN, FULL, HATCHES, OTHERS, figure, line, marks, smooth
from minigpt.studies.lab import Result
from minigpt.studies.report import Figure
from minigpt.studies.timing import Seconds

STYLES = {"full": FULL, "frozen": FROZEN, "inverse": OTHERS[0]}
LABELS = {
    "full": "full: everything trains",
    "frozen": "frozen: only q, k, v of the upper blocks train",
    "inverse": "inverse: only those are frozen",
}
SIDES = ("before", "after")
BOX = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.0}}
Bars = Mapping[str, Mapping[str, Estimate]]  # model -> "before", "after", "change"


def losses(path: Path, runs: Mapping[str, Result]) -> Figure:
    """Loss lines, and the frozen model's loss against the full one's."""
    full, frozen = runs["full"]["loss"], runs["frozen"]["loss"]
    with figure(path / "losses.png", 10, 4.2, ncols=2) as (left, right):
        for arm in ("full", "frozen"):
            batches = range(1, len(full) + 1)
            left.plot(batches, runs[arm]["loss"], **line(STYLES[arm]), label=LABELS[arm])
        left.set(xlabel="batch", ylabel="loss (nats a token)")
        left.legend(fontsize="small")
        ends = [min(*full, *frozen), max(*full, *frozen)]
        right.plot(ends, ends, color="black", linewidth=0.8, label="y = x")
        right.scatter(frozen, full, s=14, **marks(FROZEN), label="one batch")
        right.set(xlabel="loss, frozen (nats a token)", ylabel="loss, full (nats a token)")
        right.set_aspect("equal", adjustable="datalim")
        right.legend(fontsize="small")
    caption = (
        "Loss of each batch, before its update, of the first seed. Right: a mark below the line "
        "is a batch on which full training has the lower loss."
    )
    return Figure("losses.png", caption)


def popular(path: Path, bars: Bars, text: float) -> Figure:
    """Shares of popular tokens before and after, and their change."""
    with figure(path / "popular.png", 10, 4.2, ncols=2, width_ratios=(3, 2)) as (left, right):
        for i, (arm, found) in enumerate(bars.items()):
            style, hatch = STYLES[arm], HATCHES[i]
            for side, shift, alpha in zip(SIDES, (-0.2, 0.2), (0.45, 1.0), strict=True):
                _bar(left, i + shift, found[side], style["color"], hatch, alpha)
                left.text(i + shift, 0.02, side, ha="center", fontsize="small", **BOX)
            _bar(right, i, found["change"], style["color"], hatch, 1.0)
        left.axhline(text, color="black", linestyle=":", label="the text itself")
        highest = max(text, *(found[side].high for found in bars.values() for side in SIDES))
        left.set(ylabel="p, share of popular tokens", ylim=(0, 1.2 * highest))
        left.legend(fontsize="small")
        right.axhline(0, color="black", linewidth=0.8)
        right.set(ylabel="Delta p = p after - p before")
        for axes in (left, right):
            axes.set_xticks(range(len(bars)), list(bars))
    caption = (
        "Share of popular tokens among the sampled ones, all seeds together, with 95 % intervals "
        "(Wilson; Newcombe for the difference; tokens taken as independent)."
    )
    return Figure("popular.png", caption)


def weight_changes(path: Path, runs: Mapping[str, Result]) -> Figure:
    """How far each step moves the key weight of the first block of the upper half."""
    with figure(path / "weight_change.png", 10, 4) as axes:
        for arm in ("full", "frozen"):
            norms = runs[arm]["weight_change"]
            axes.plot(range(1, len(norms) + 1), norms, **line(STYLES[arm]), label=LABELS[arm])
        axes.set(xlabel="batch", ylabel="Frobenius norm of W_t - W_(t-1)", ylim=(0, None))
        axes.legend(fontsize="small")
    block = runs["full"]["block"]
    caption = f"Change of the key weight of block {block} in each step, of the first seed."
    return Figure("weight_change.png", caption)


def times(path: Path, sums: Mapping[str, Estimate], turns: Seconds, saving: str) -> Figure:
    """Seconds of the runs, and of a step taken in turn."""
    with figure(path / "times.png", 10, 4, ncols=2) as (left, right):
        for i, (arm, total) in enumerate(sums.items()):
            colour, hatch = STYLES[arm]["color"], HATCHES[i]
            left.bar(i, total.value, 0.6, color=colour, hatch=hatch, edgecolor="black")
            low, median, high = quantiles(turns[arm], n=4)
            error = [[median - low], [high - median]]
            right.bar(i, median, 0.6, color=colour, hatch=hatch, edgecolor="black")
            right.errorbar(i, median, error, color="black", capsize=4)
        left.set(ylabel="seconds of a run, sum over its steps")
        right.set(ylabel="seconds of a step", title=f"frozen against full: r = {saving}")
        for axes in (left, right):
            axes.set_xticks(range(len(sums)), list(sums))
    caption = (
        "Left: sums over the steps of a run, mean over seeds; the runs came one after another, so "
        "that what else the machine did is in them. Right: steps of the three models taken in "
        "turn, median and quartiles."
    )
    return Figure("times.png", caption)


def inverse(path: Path, runs: Mapping[str, Result]) -> Figure:
    """Losses of the frozen and the inverse model above full training's."""
    with figure(path / "inverse.png", 10, 4) as axes:
        axes.axhline(0, color="black", linewidth=0.8)
        for arm in ("frozen", "inverse"):
            pairs = zip(runs[arm]["loss"], runs["full"]["loss"], strict=True)
            gaps = smooth([a - b for a, b in pairs], 5)
            axes.plot(range(1, len(gaps) + 1), gaps, **line(STYLES[arm]), label=LABELS[arm])
        axes.set(xlabel="batch", ylabel="loss - full's loss (nats a token)")
        axes.legend(fontsize="small")
    caption = (
        "Losses less full training's on the same batch, mean of five batches, of the first seed: "
        "on the line a model learns as the full one does."
    )
    return Figure("inverse.png", caption)


def _bar(axes: Any, x: float, value: Estimate, colour: str, hatch: str, alpha: float) -> None:
    """A bar with its interval."""
    error = [[value.value - value.low], [value.high - value.value]]
    axes.bar(x, value.value, 0.36, color=colour, alpha=alpha, hatch=hatch, edgecolor="black")
    axes.errorbar(x, value.value, error, color="black", capsize=4)
