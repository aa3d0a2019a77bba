"""The figures of write-up 001 (minigpt/studies/partial_freezing.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.metrics.intervals import Estimate
from minigpt.studies.figures import FROZEN, FULL, HATCHES, OTHERS, figure, line
from minigpt.studies.lab import Result
from minigpt.studies.report import Figure

STYLES = {"full": FULL, "intended": FROZEN, "literal": OTHERS[0]}
LABELS = {
    "full": "full: everything trains",
    "intended": "intended: attention and embeddings frozen",
    "literal": "literal: the name test, embeddings train",
}


def losses(path: Path, runs: Mapping[str, Mapping[str, Result]], names: Sequence[str]) -> Figure:
    """Loss lines, one panel for each text; `runs` is text -> rule -> result."""
    with figure(path / "losses.png", 10, 4, ncols=2, sharey=True) as panels:
        for axes, (own, results), name in zip(panels, runs.items(), names, strict=True):
            for arm, result in results.items():
                batches = range(1, len(result["loss"]) + 1)
                axes.plot(batches, result["loss"], **line(STYLES[arm]), label=LABELS[arm])
            axes.set(xlabel="batch", title=f"tuned on {name}")
            if own == "text":
                axes.set_ylabel("loss (nats a token)")
                axes.legend(fontsize="small")
    return Figure("losses.png", "Loss of each batch, before its update, of the first seed.")


def popular(
    path: Path,
    shares: Mapping[str, Mapping[str, Mapping[str, Estimate]]],
    texts: Mapping[str, Mapping[str, float]],
    names: Mapping[str, str],
) -> Figure:
    """Cross measure: `shares` is set -> bar -> "before", "after"; bars are named by what the model
    was tuned on.
    """
    with figure(path / "popular.png", 10, 4.2, ncols=2, sharey=True) as panels:
        for axes, (chosen, bars) in zip(panels, shares.items(), strict=True):
            for i, (own, found) in enumerate(bars.items()):
                for side, shift, alpha in (("before", -0.2, 0.4), ("after", 0.2, 1.0)):
                    _bar(axes, i + shift, found[side], FROZEN["color"], HATCHES[i], alpha)
                    axes.text(i + shift, 0.004, side, ha="center", fontsize="small", **BOX)
                ceiling = texts[own][chosen]
                axes.plot([i - 0.45, i + 0.45], [ceiling] * 2, color="black", linestyle=":")
            axes.set_xticks(range(len(bars)), [f"tuned on {names[own]}" for own in bars])
            axes.set_title(f"popular tokens of {names[chosen]}")
        panels[0].set_ylabel("p, share of popular tokens")
    caption = (
        "Share of popular tokens among those sampled from the models with attention and embeddings "
        "frozen, all seeds together, 95 % intervals. Dotted: the share in the text that the model "
        "was tuned on, which an imitator approaches."
    )
    return Figure("popular.png", caption)


def costs(path: Path, relative: Mapping[str, Mapping[str, Estimate]]) -> Figure:
    """What the rules cost against full tuning; `relative` is cost -> rule -> ratio."""
    with figure(path / "costs.png", 10, 4) as axes:
        for i, cost in enumerate(relative):
            for k, (arm, ratio) in enumerate(relative[cost].items()):
                colour = STYLES[arm]["color"]
                label = LABELS[arm] if i == 0 else None
                _bar(axes, i + 0.38 * (k - 0.5), ratio, colour, HATCHES[k + 1], 1.0, label)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xticks(range(len(relative)), list(relative))
        axes.set(ylabel="times that of full tuning", ylim=(0, 1.3))
        axes.legend(fontsize="small", ncols=2, loc="upper left")
    caption = (
        "Costs against full tuning's, at the line. Memory above what the process held before the "
        "model, mean over seeds; time of steps in turn, mean over rounds; 95 % intervals."
    )
    return Figure("costs.png", caption)


def forgetting(
    path: Path, rises: Mapping[str, Mapping[str, Estimate]], names: Mapping[str, str]
) -> Figure:
    """How much the losses changed; `rises` is text -> rule -> change of the loss."""
    with figure(path / "forgetting.png", 10, 4) as axes:
        for i, text in enumerate(rises):
            for k, (arm, rise) in enumerate(rises[text].items()):
                colour = STYLES[arm]["color"]
                label = LABELS[arm] if i == 0 else None
                _bar(axes, i + 0.38 * (k - 0.5), rise, colour, HATCHES[k], 1.0, label)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(rises)), [names[text] for text in rises])
        axes.set(ylabel="loss after - before (nats a token)")
        axes.legend(fontsize="small")
    caption = (
        "Change of the loss by tuning, both models of a rule together, mean over seeds with 95 % "
        "intervals: above the line something was forgotten, below it learned."
    )
    return Figure("forgetting.png", caption)


BOX = {"bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.0}}


def _bar(
    axes: Any,
    x: float,
    value: Estimate,
    colour: str,
    hatch: str,
    alpha: float,
    label: str | None = None,
) -> None:
    """A bar with its interval, where that is finite."""
    style = {"color": colour, "hatch": hatch, "edgecolor": "black", "alpha": alpha}
    axes.bar(x, value.value, 0.36, label=label, **style)
    if value.high - value.low < float("inf"):
        error = [[value.value - value.low], [value.high - value.value]]
        axes.errorbar(x, value.value, error, color="black", capsize=4)
