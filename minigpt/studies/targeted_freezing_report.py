"""What the runs of targeted freezing say (minigpt/studies/targeted_freezing.py).

A model's final loss is the mean over the last tenth of its batches.  "Nearly coincides" means: the
inverse's final loss differs from full training's by less than 5 % of what full training gained.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from minigpt.metrics.intervals import difference, share
from minigpt.studies import targeted_freezing_figures as figures
from minigpt.studies.claims import Finding, count, judge
from minigpt.studies.lab import Result
from minigpt.studies.report import Report, Table
from minigpt.studies.targeted_freezing import ARMS, TITLE, Settings, rule
from minigpt.studies.timing import Seconds
from minigpt.studies.tuning import published_model, train_only, trainable
from minigpt.studies.words import name, over_seeds, percent, ran_on, shown, side

NEAR = 0.05  # of what full training gained


@dataclass(frozen=True)
class Measured:
    """Of each seed, and of each round of the times.

    Attributes:
        first: loss of the first batch, before any update.
        final: model -> final losses.
        norms: frozen model's mean weight change over the full one's.
        savings: r of each round in turn.
        run_savings: r of the sums over the runs.
    """

    first: list[float]
    final: Mapping[str, list[float]]
    norms: list[float]
    savings: list[float]
    run_savings: list[float]

    def gap(self, arm: str) -> list[float]:
        """Final loss less the full model's."""
        return [a - b for a, b in zip(self.final[arm], self.final["full"], strict=True)]

    def gain(self, arm: str) -> list[float]:
        """How far the loss fell."""
        return [a - b for a, b in zip(self.first, self.final[arm], strict=True)]

    def inverse_share(self) -> list[float]:
        """Distance of the inverse from full training, as a share of what that gained."""
        pairs = zip(self.gap("inverse"), self.gain("full"), strict=True)
        return [abs(gap / gain) for gap, gain in pairs]


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Figures, tables and verdicts.

    Raises:
        ValueError: the models of a seed did not start from the same weights.
    """
    runs = {arm: [results[f"{arm}-{seed}"] for seed in range(settings.seeds)] for arm in ARMS}
    if len({result["start"] for results in runs.values() for result in results}) > 1:
        raise ValueError("the models did not start from the same weights: nothing can be compared")
    turns = results["time"]["seconds"]
    found = measure(runs, turns)
    bars = popularity(runs, settings.starts * settings.tokens)
    saving = over_seeds(found.savings)
    first = {arm: runs[arm][0] for arm in ARMS}
    sums = {arm: over_seeds([result["seconds"] for result in runs[arm]]) for arm in ARMS}
    folder = out / "figures"
    drawn = [
        figures.losses(folder, first),
        figures.popular(folder, bars, first["full"]["text"]),
        figures.weight_changes(folder, first),
        figures.times(folder, sums, turns, percent(saving)),
        figures.inverse(folder, first),
    ]
    return Report(
        TITLE,
        answer(settings, found, runs),
        drawn,
        [loss_table(settings, found, runs), cost_table(runs, turns), popular_table(runs, bars)],
        findings(settings, found, runs),
        {
            "final_loss": found.final,
            "first_loss": found.first,
            "weight_change_ratio": found.norms,
            "saving_in_turn": found.savings,
            "saving_of_runs": found.run_savings,
            "inverse_share": found.inverse_share(),
        },
    )


def measure(runs: Mapping[str, list[Result]], turns: Seconds) -> Measured:
    """The figures that the claims are about."""

    def both(field: str) -> list[tuple[Any, Any]]:
        pairs = zip(runs["frozen"], runs["full"], strict=True)
        return [(frozen[field], full[field]) for frozen, full in pairs]

    return Measured(
        first=[result["loss"][0] for result in runs["full"]],
        final={arm: [fmean(_last(result["loss"])) for result in runs[arm]] for arm in ARMS},
        norms=[fmean(frozen) / fmean(full) for frozen, full in both("weight_change")],
        # r = (T_full - T_frozen) / T_full
        savings=[1 - b / a for a, b in zip(turns["full"], turns["frozen"], strict=True)],
        run_savings=[1 - frozen / full for frozen, full in both("seconds")],
    )


def popularity(runs: Mapping[str, list[Result]], n: int) -> figures.Bars:
    """P before and after and their difference, the n tokens of each seed taken together."""
    bars = {}
    for arm in ARMS:
        sides = {
            side: share(round(sum(r[side] for r in runs[arm]) * n), n * len(runs[arm]))
            for side in ("before", "after")
        }
        bars[arm] = {**sides, "change": difference(sides["after"], sides["before"])}
    return bars


def answer(
    settings: Settings, found: Measured, runs: Mapping[str, list[Result]]
) -> tuple[str, str, str]:
    """Three sentences."""
    full, frozen = (fmean(found.final[arm]) for arm in ("full", "frozen"))
    gap = over_seeds(found.gap("frozen"))
    one = runs["frozen"][0]
    part = 100 * one["trainable"] / one["total"]
    further = side(
        gap, 0, "full training fell further", "full training fell less far",
        "which fell further is not decided",
    )  # fmt: skip
    norms, saving = over_seeds(found.norms), over_seeds(found.savings)
    near = over_seeds(found.inverse_share())
    fresh = [100 * r["fresh"] for arm in ARMS for r in runs[arm]]
    before = [100 * r["before"] for r in runs["full"]]
    same = "give the same samples" if _same_before(runs) else "give different samples"
    return (
        f"After {settings.steps} batches of {name(settings.text)} the loss is {frozen:.3f} where "
        f"only query, key and value of the upper blocks train ({part:.2f} % of the parameters) and "
        f"{full:.3f} where everything does, from {fmean(found.first):.3f}: "
        f"{further}; the gap is {shown(gap)} nats a token.",
        f"With the rest frozen each step moves the key weight of block {one['block']} by "
        f"{shown(norms, '.2f')} times what it does in full training, and the saving of time is "
        f"r = {percent(saving)}.",
        f"With exactly those tensors frozen instead, the loss ends {percent(near)} of full "
        f"training's gain away from it; before training the same weights {same} "
        f"(p = {min(before):.1f} to {max(before):.1f} % over seeds), while other starts each time "
        f"move p from {min(fresh):.1f} to {max(fresh):.1f} %.",
    )


def loss_table(settings: Settings, found: Measured, runs: Mapping[str, list[Result]]) -> Table:
    """What the models reach, and how unsteadily at first."""
    early = max(2, settings.steps // 5)
    rows = []
    for arm in ARMS:
        cut = [result["loss"][:early] for result in runs[arm]]
        rows.append(
            [
                arm,
                shown(over_seeds(found.final[arm])),
                shown(over_seeds(found.gain(arm))),
                shown(over_seeds([variance(losses) for losses in cut]), ".4f"),
                shown(over_seeds([_successive(losses) for losses in cut]), ".4f"),
            ]
        )
    return Table(
        "Losses in nats a token, means over seeds",
        ("model", "final loss", "fell by", "early variance", "without trend"),
        rows,
        f"Final: mean of the last tenth of the batches. Early variance: of the losses of the first "
        f"{early} batches; without trend: half the mean square of the differences between "
        f"neighbours, which a falling loss hardly raises.",
    )


def cost_table(runs: Mapping[str, list[Result]], turns: Seconds) -> Table:
    """What trains and how long it takes."""
    rows = []
    for arm in ARMS:
        one = runs[arm][0]
        rows.append(
            [
                arm,
                f"{one['tensors']}",
                f"{one['trainable']:,}",
                f"{100 * one['trainable'] / one['total']:.2f} %",
                shown(over_seeds([result["seconds"] for result in runs[arm]]), ".1f"),
                f"{median(turns[arm]):.3f}",
            ]
        )
    columns = ("model", "tensors", "parameters that train", "share")
    return Table(
        "What trains, and seconds",
        (*columns, "sum over a run", "a step in turn, median"),
        rows,
    )


def popular_table(runs: Mapping[str, list[Result]], bars: figures.Bars) -> Table:
    """P of the models and of the text."""
    rows = []
    for arm in ARMS:
        pooled = [percent(bars[arm][kind], "") for kind in ("before", "after", "change")]
        change = over_seeds([r["after"] - r["before"] for r in runs[arm]])
        fresh = over_seeds([r["fresh"] for r in runs[arm]])
        rows.append([arm, *pooled, percent(change, ""), percent(fresh, "")])
    text = 100 * runs["full"][0]["text"]
    return Table(
        "Share of popular tokens in %",
        ("model", "before", "after", "change, tokens together", "change, by seeds", "fresh"),
        rows,
        f"The text itself: {text:.1f} %. Before and after: the same starts and random numbers for "
        "all models. Fresh: before training too, but with other starts and random numbers for "
        "each model, as in the write-up: how far p moves by chance.",
    )


def findings(
    settings: Settings, found: Measured, runs: Mapping[str, list[Result]]
) -> list[Finding]:
    """A verdict on each claim of write-up 000."""
    n = settings.seeds
    on = ran_on(settings.model, [settings.text], n)
    gap, falls = over_seeds(found.gap("frozen")), over_seeds(found.gain("frozen"))
    norms, saving = over_seeds(found.norms), over_seeds(found.savings)
    near = over_seeds(found.inverse_share())
    runs_saving = percent(over_seeds(found.run_savings))
    ends = f"{fmean(found.first):.3f} to {fmean(found.final['frozen']):.3f}"
    before = [100 * r["before"] for arm in ARMS for r in runs[arm]]
    fresh = [100 * r["fresh"] for arm in ARMS for r in runs[arm]]
    same = _same_before(runs)  # which 0 % tells nothing about
    rounds = len(found.savings)
    return [
        *counts(),
        Finding(
            "freezing.loss", f"{shown(gap)} nats a token further",
            judge(gap, n, 0.0, above=True), on),
        Finding(
            "freezing.loss-falls", f"{ends}, by {shown(falls)}",
            judge(falls, n, 0.0, above=True, quoted=3.78 - 2.65), on,
            "the quoted fall is GPT-Neo-125M's on Moby-Dick"),
        Finding(
            "freezing.norm", f"{shown(norms, '.2f')} times as far",
            judge(norms, n, 1.0, above=True), on, "mean over all steps"),
        Finding(
            "freezing.time", percent(saving),
            judge(saving, rounds, 0.0, above=True, quoted=0.25),
            f"{name(settings.model)}, {rounds} rounds in turn",
            f"an interval over rounds, not seeds; sums over the runs: {runs_saving}"),
        Finding(
            "freezing.popular",
            f"{min(before):.1f} to {max(before):.1f} % over seeds, the same for all models"
            if same else "equal weights sample different tokens",
            ("fails" if max(before) > 0 else "undecided") if same else "holds", on,
            "equal weights with equal starts give equal samples; with other starts each time p "
            f"is {min(fresh):.1f} to {max(fresh):.1f} %: the difference is that of the draws"),
        Finding(
            "freezing.inverse-loss", f"{percent(near)} of the gain apart",
            judge(near, n, NEAR, above=False), on,
            f"nearly: less than {100 * NEAR:g} % of what full training gained"),
    ]  # fmt: skip


def counts() -> list[Finding]:
    """What the rule picks in GPT-Neo-125M."""
    model, on = published_model(), "GPT-Neo-125M's config"
    total = trainable(model)
    tensors, chosen = train_only(model, rule(model, "frozen")), trainable(model)
    train_only(model, rule(model, "inverse"))
    rest = trainable(model)
    return [
        Finding(
            "freezing.count",
            f"{tensors} tensors, {chosen:,} parameters, {100 * chosen / total:.2f} %",
            count(1000 * chosen + tensors, 1000 * 10_616_832 + 18), on),
        Finding(
            "freezing.inverse-count", f"{rest:,} parameters, {100 * rest / total:.2f} %",
            count(rest, 114_581_760), on),
    ]  # fmt: skip


def _last(losses: list[float]) -> list[float]:
    """The last tenth."""
    return losses[-max(1, len(losses) // 10) :]


def _successive(losses: list[float]) -> float:
    """The variance about a slow trend: half the mean square of successive differences."""
    steps = [b - a for a, b in pairwise(losses)]
    return fmean(step**2 for step in steps) / 2


def _same_before(runs: Mapping[str, list[Result]]) -> bool:
    sides = zip(*(runs[arm] for arm in ARMS), strict=True)
    return all(len({result["before"] for result in results}) == 1 for results in sides)
