"""The figures of write-up 002."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from minigpt.metrics.intervals import share
from minigpt.studies.clipping_and_schedule_measured import Runs, lost, straight
from minigpt.studies.figures import FROZEN, FULL, OTHERS, figure, line, marks, smooth
from minigpt.studies.report import Figure
from minigpt.training.train import TrainConfig

STYLES: Mapping[str, dict[str, Any]] = {
    "baseline": FULL,
    "freezing": FROZEN,
    "clipping": OTHERS[0],
    "schedule": OTHERS[1],
    "delayed": OTHERS[2],
}
LABELS = {
    "baseline": "baseline",
    "freezing": "+ freezing",
    "clipping": "+ clipping",
    "schedule": "+ schedule",
    "delayed": "+ schedule, clipping delayed",
}
SMOOTHED = 10  # steps


def draw(runs: Runs, every: int, folder: Path) -> list[Figure]:
    """All figures, in `folder`; `every` so many steps the held-out reviews were measured."""
    return [
        _rate(runs.configs["schedule"], folder),
        _course(runs, every, folder),
        _norms(runs, folder),
        _lost(runs, folder),
        _measure(runs, every, folder),
    ]


def _rate(config: TrainConfig, folder: Path) -> Figure:
    updates = range(1, config.steps + 1)
    lines: list[tuple[str, list[float], dict[str, Any]]] = [
        ("optimizer first: the notebook, and here", [config.rate(n - 1) for n in updates], FULL),
        ("schedule first: section 3.4", [config.rate(n) for n in updates], FROZEN),
        ("1 - t / T_sched", [straight(config, n - 1) for n in updates], OTHERS[0]),
        ("constant: baseline, freezing, clipping", [config.lr for _ in updates], OTHERS[1]),
    ]
    begin = min(config.steps, 2 * config.warmup_steps + 2)
    with figure(folder / "rate.png", 9, 3.6, ncols=2, width_ratios=(3, 2)) as (whole, start):
        for name, rates, style in lines:
            whole.plot(updates, rates, label=name, **line(style))
            start.plot(updates[:begin], rates[:begin], **line(style), marker=".")
        whole.set(xlabel="update", ylabel="learning rate", title="all updates")
        start.set(xlabel="update", title="the first ones")
        whole.set_ylim(bottom=0)
        whole.legend(fontsize="small")
    return Figure(
        "rate.png",
        f"Learning rate of each update: warm-up over {config.warmup_steps}, then linear decay to 0 "
        f"at {config.schedule_length}, beyond the last update. The runs use the solid line, whose "
        "first update has rate 0.",
    )


def _course(runs: Runs, every: int, folder: Path) -> Figure:
    panels = (("loss", "loss, nats"), ("accuracy", "accuracy"))
    with figure(folder / "loss_accuracy.png", 9, 6.4, nrows=2, ncols=2, sharex=True) as axes:
        for (name, label), (trained, tested) in zip(panels, axes, strict=True):
            for arm, found in runs.arms.items():
                style = STYLES[arm]
                steps = _mean([run["steps"][name] for run in found])
                trained.plot(
                    range(1, len(steps) + 1),
                    smooth(steps, SMOOTHED),
                    label=LABELS[arm],
                    **line(style),
                )
                tests = _mean([run["tests"][f"test_{name}"] for run in found])
                tested.plot(_at(tests, every), tests, markersize=3, **style)
            trained.set(ylabel=label)
            tested.sharey(trained)
        axes[0][0].set(title=f"training, mean of {SMOOTHED} steps")
        axes[0][1].set(title=f"held-out, every {every} steps")
        for bottom in axes[1]:
            bottom.set(xlabel="update")
        axes[0][0].legend(fontsize="small")
    return Figure(
        "loss_accuracy.png",
        "Loss and accuracy. Training: of each step's own batch, with dropout. Held-out: of "
        "reviews that are not trained on, half of each label"
        + (f"; means over {runs.seeds} seeds." if runs.seeds > 1 else "."),
    )


def _norms(runs: Runs, folder: Path) -> Figure:
    shown = ("freezing", "schedule")
    names = (("mlp", "output weight of the MLP"), ("classifier", "weight of the classifier"))
    with figure(folder / "norms.png", 9, 3.8, ncols=2, sharey=True) as axes:
        for (name, title), panel in zip(names, axes, strict=True):
            for arm in shown:
                norms = runs.arms[arm][0]["steps"][f"gradient_norm.{name}"]
                at = range(1, len(norms) + 1)
                panel.scatter(at, norms, s=9, alpha=0.7, label=LABELS[arm], **marks(STYLES[arm]))
            panel.axhline(1, color="black", linewidth=1)
            panel.set(title=title, xlabel="update", yscale="log")
        axes[0].set(ylabel="norm of the gradient, before clipping")
        axes[1].legend(fontsize="small")
    layer = runs.arms["schedule"][0]["layer"]
    return Figure(
        "norms.png",
        f"Norm of two gradients before clipping, and the line at 1: the MLP's output weight in "
        f"block {layer}, counted from 0, and the classifier's weight; seed 0.",
    )


def _lost(runs: Runs, folder: Path) -> Figure:
    delay = runs.configs["delayed"].clip_from
    with figure(folder / "lost.png", 8, 3.8) as axes:
        for arm in ("clipping", "schedule", "delayed"):
            taken = lost(runs.arms[arm][0]["steps"]["gradient_norm"], runs.configs[arm])
            at = range(1, len(taken) + 1)
            axes.scatter(at, taken, s=9, alpha=0.7, label=LABELS[arm], **marks(STYLES[arm]))
        axes.axvline(delay + 0.5, color="black", linewidth=1, linestyle=":")
        axes.set(xlabel="update", ylabel="|g| before clipping - |g| after")
        axes.legend(fontsize="small")
    return Figure(
        "lost.png",
        "What clipping takes from the gradient, Delta g = |g| - |g'| over all trained tensors. "
        f"The delayed arm is not clipped in the first {delay} updates, left of the dotted line; "
        "seed 0.",
    )


def _measure(runs: Runs, every: int, folder: Path) -> Figure:
    bag = share(runs.unread["bag_of_words"], runs.rows).value
    with figure(folder / "measure.png", 9, 3.8, ncols=2, sharey=True) as axes:
        for arm, panel in zip(("baseline", "schedule"), axes, strict=True):
            for name, style, label in (
                ("test", FULL, "held-out reviews, half of each label"),
                ("first", FROZEN, "the course's: the same first batch"),
            ):
                values = [run["tests"][f"{name}_accuracy"] for run in runs.arms[arm]]
                seen = _mean(values)
                panel.plot(_at(seen, every), seen, markersize=3, label=label, **style)
            panel.axhline(bag, color="#6b6b6b", linewidth=1, linestyle="-.", label="bag of words")
            panel.axhline(0.5, color="#6b6b6b", linewidth=1, linestyle=":", label="one answer")
            panel.set(title=LABELS[arm], xlabel="update")
        axes[0].set(ylabel="accuracy", ylim=(-0.03, 1.03))
        axes[1].legend(fontsize="small")
    return Figure(
        "measure.png",
        "Two measures of the same models. The course's shows one class only, negatives, and swings "
        "with whatever the model says more often.",
    )


def _mean(runs: Sequence[Sequence[float]]) -> list[float]:
    """Step by step over the seeds."""
    return [fmean(values) for values in zip(*runs, strict=True)]


def _at(values: Sequence[float], every: int) -> list[int]:
    return [every * (i + 1) for i in range(len(values))]
