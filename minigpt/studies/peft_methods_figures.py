"""The figures of the study of methods; a method looks the same in all of them."""

from pathlib import Path
from typing import Any

from minigpt.metrics.intervals import Estimate, mean
from minigpt.studies.encoder_methods import FULL, METHODS
from minigpt.studies.figures import FROZEN, HATCHES, OTHERS, figure, marks
from minigpt.studies.figures import FULL as FULL_STYLE
from minigpt.studies.peft_methods_findings import Found, measured_line
from minigpt.studies.report import Figure

BLACK = {"color": "#000000", "linestyle": "-", "marker": "x"}
STYLES = dict(zip(METHODS, (FULL_STYLE, FROZEN, *OTHERS, BLACK), strict=True))


def draw(found: Found, folder: Path) -> list[Figure]:
    """All figures of the study."""
    _time(found, folder / "time.png")
    _accuracy(found, folder / "accuracy.png")
    _variance_and_fit(found, folder / "variance_and_fit.png")
    _worth(found, folder / "worth.png")
    return [
        Figure(
            "time.png",
            "Time of a step against the number of parameters that train, both over full tuning's; "
            "bars are quartiles. T = r T_full is what the write-up says.",
        ),
        Figure(
            "accuracy.png",
            "Accuracy on held-out reviews against the number of parameters that train; bars are "
            "95 % intervals over seeds.",
        ),
        Figure(
            "variance_and_fit.png",
            "Left: variance of the predicted probability between seeds. Right: loss on training "
            "reviews. Bars are 95 % intervals over seeds.",
        ),
        Figure(
            "worth.png",
            "Accuracy above chance for the time of one step of full tuning; lines are 95 % "
            "intervals over seeds.",
        ),
    ]


def _time(found: Found, path: Path) -> None:
    with figure(path) as axes:
        r = sorted(outcome.r for outcome in found.values())
        b, a = measured_line(found)
        grid = [r[0] * (1 / r[0]) ** (i / 99) for i in range(100)]
        axes.plot(grid, grid, color="#444444", linestyle="-", label="T = r T_full")
        axes.plot(
            grid,
            [a + b * x for x in grid],
            color="#444444",
            linestyle="--",
            label=f"{a:.2f} + {b:.2f} r",
        )
        axes.axhline(1, color="#aaaaaa", linewidth=0.8)
        for method, outcome in found.items():
            middle, low, high = outcome.time
            _point(axes, method, outcome.r, Estimate(middle, low, high))
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="r = trained parameters / all parameters",
            ylabel="T / T_full",
        )
        axes.legend(fontsize="small", ncols=2)


def _accuracy(found: Found, path: Path) -> None:
    with figure(path) as axes:
        for method, outcome in found.items():
            accuracy = mean([100 * a for a in outcome.accuracy])
            _point(axes, method, outcome.trainable, accuracy)
        chance = 100 * found[FULL].chance
        axes.axhline(chance, color="#444444", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="parameters that train", ylabel="accuracy (%)")
        axes.legend(fontsize="small", ncols=3)


def _variance_and_fit(found: Found, path: Path) -> None:
    with figure(path, width=9, ncols=2) as (left, right):
        for method, outcome in found.items():
            _point(left, method, outcome.trainable, mean(outcome.variance))
            _point(right, method, outcome.trainable, mean(outcome.fit))
        left.set(ylabel="variance of the predicted probability")
        right.set(ylabel="loss on training reviews (nats)")
        for axes in (left, right):
            axes.set(xscale="log", xlabel="parameters that train")
        left.figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _worth(found: Found, path: Path) -> None:
    with figure(path) as axes:
        for i, (method, outcome) in enumerate(found.items()):
            points = mean([100 * worth for worth in outcome.worth])
            axes.bar(
                i,
                points.value,
                yerr=points.high - points.value,
                color=STYLES[method]["color"],
                hatch=(*HATCHES, "**")[i],
                edgecolor="white",
                capsize=3,
            )
        axes.set_xticks(range(len(found)), list(found), rotation=30, ha="right")
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set(ylabel="points above chance / (T / T_full)")


def _point(axes: Any, method: str, x: float, y: Estimate) -> None:
    """A mark with its interval."""
    axes.errorbar(
        x,
        y.value,
        yerr=[[y.value - y.low], [y.high - y.value]],
        linestyle="none",
        capsize=3,
        label=method,
        **marks(STYLES[method]),
    )
