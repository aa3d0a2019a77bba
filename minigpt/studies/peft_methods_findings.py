"""What the parts of the study of methods say together: tables, three sentences, verdicts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression, median, stdev, variance

from minigpt.metrics.intervals import Estimate, mean, share
from minigpt.studies.claims import Finding, about, count, judge
from minigpt.studies.counts import lora_counts
from minigpt.studies.encoder_methods import FLOOR, FULL, METHODS
from minigpt.studies.lab import Result
from minigpt.studies.report import Table
from minigpt.studies.timing import ratio
from minigpt.studies.words import moves, percent

PEFT = tuple(method for method in METHODS if method not in (FULL, FLOOR))


@dataclass(frozen=True)
class Outcome:
    """What one method cost and gave.

    Attributes:
        trainable: number of parameters that train.
        r: the same over full tuning's.
        before, peak: bytes of memory before the model, and at most.
        file: bytes on disk.
        seconds: of a step, its median.
        time: T / T_full, median and quartiles of the rounds.
        times: T / T_full of each round.
        rows: held-out reviews.
        chance: accuracy of always giving the more frequent label.
        accuracy, fit, variance: A_s, fit_s and V_s, by seed.
    """

    trainable: int
    r: float
    before: int
    peak: int
    file: int
    seconds: float
    time: tuple[float, float, float]
    times: Sequence[float]
    rows: int
    chance: float
    accuracy: Sequence[float]
    fit: Sequence[float]
    variance: Sequence[float]

    @property
    def worth(self) -> list[float]:
        """(A - chance) / (T / T_full), by seed."""
        return [(a - self.chance) / self.time[0] for a in self.accuracy]


Found = Mapping[str, Outcome]


def outcomes(results: Mapping[str, Result], seeds: int) -> dict[str, Outcome]:
    """The outcome of each method, from the parts' results."""
    times = results["times"]
    whole = results[f"cost-{FULL}"]["trainable"]
    found = {}
    for method in METHODS:
        cost = results[f"cost-{method}"]
        runs = [results[f"{method}-seed-{seed}"] for seed in range(seeds)]
        found[method] = Outcome(
            trainable=cost["trainable"],
            r=cost["trainable"] / whole,
            before=cost["memory_before_bytes"],
            peak=cost["memory_peak_bytes"],
            file=cost["file_bytes"],
            seconds=median(times[method]),
            time=ratio(times, method, FULL),
            times=[a / b for a, b in zip(times[method], times[FULL], strict=True)],
            rows=runs[0]["rows"],
            chance=runs[0]["chance"],
            accuracy=[run["right"] / run["rows"] for run in runs],
            fit=[run["fit"] for run in runs],
            variance=variances([run["positives"] for run in runs]),
        )
    return found


def variances(positives: Sequence[Sequence[float]]) -> list[float]:
    """V_s of probabilities, S rows of X."""
    S = len(positives)
    whole = _variance(positives)
    without = (_variance([*positives[:s], *positives[s + 1 :]]) for s in range(S))
    # V_s = S V - (S - 1) V without s
    return [S * whole - (S - 1) * left for left in without]


def _variance(positives: Sequence[Sequence[float]]) -> float:
    """Over seeds, its mean over reviews."""
    return fmean(variance(column) for column in zip(*positives, strict=True))


def slope(found: Found, values: Callable[[Outcome], Sequence[float]]) -> Estimate:
    """How a value that is there for each seed changes with ten times the parameters: the mean over
    seeds of its slope over all methods.
    """
    decades = [math.log10(outcome.trainable) for outcome in found.values()]
    by_seed = zip(*(values(outcome) for outcome in found.values()), strict=True)
    return mean([linear_regression(decades, column).slope for column in by_seed])


def proportion(found: Found) -> Estimate:
    """T / (r T_full), the geometric mean over methods, then the mean over rounds."""
    logs = [[math.log(t / found[m].r) for t in found[m].times] for m in PEFT]
    return mean([math.exp(fmean(column)) for column in zip(*logs, strict=True)])


def measured_line(found: Found) -> tuple[float, float]:
    """Slope and intercept of T / T_full against r, all methods and full tuning."""
    line = linear_regression([o.r for o in found.values()], [o.time[0] for o in found.values()])
    return line.slope, line.intercept


def lead(found: Found, method: str) -> Estimate:
    """How much more accurate full tuning is, seed by seed."""
    pairs = zip(found[FULL].accuracy, found[method].accuracy, strict=True)
    return mean([full - other for full, other in pairs])


def gain(found: Found) -> Estimate:
    """Worth of the methods, their mean, less that of full tuning, seed by seed."""
    columns = zip(*(found[method].worth for method in PEFT), strict=True)
    return mean(
        [fmean(column) - full for column, full in zip(columns, found[FULL].worth, strict=True)]
    )


def answer(found: Found) -> list[str]:
    """Three sentences."""
    best = max(PEFT, key=lambda method: fmean(found[method].accuracy))
    seeds, full = len(found[FULL].accuracy), found[FULL]
    low, high = (f([100 * found[m].time[0] for m in PEFT]) for f in (min, max))
    least, most = (f([100 * found[m].r for m in PEFT]) for f in (min, max))
    b, a = measured_line(found)
    fit, spread = slope(found, lambda o: o.fit), slope(found, lambda o: o.variance)
    return [
        f"Full tuning gets {percent(mean(full.accuracy))} of {full.rows} held-out reviews right, "
        f"the best of {len(PEFT)} methods, {best}, {percent(mean(found[best].accuracy))} with "
        f"{100 * found[best].r:.2g} % of the parameters, the classifier alone "
        f"{percent(mean(found[FLOOR].accuracy))} (chance: {100 * full.chance:.1f} %, "
        f"{seeds} seeds).",
        f"A step of these methods takes {low:.0f} to {high:.0f} % of full tuning's time for "
        f"{least:.2g} to {most:.2g} % of its parameters, {proportion(found)} times what "
        f"T = r T_full says: the measured line is T / T_full = {a:.2f} + {b:.2f} r.",
        f"With ten times the parameters the loss on training reviews {moves(fit, ' nats')}; the "
        f"variance between seeds of the predicted probability {moves(spread)}.",
    ]


def findings(found: Found, on: str) -> list[Finding]:
    """The verdicts."""
    seeds, rounds = len(found[FULL].accuracy), len(found[FULL].times)
    trained, whole = lora_counts(1000, 1000, r=100)
    leads = {method: lead(found, method) for method in PEFT}
    verdicts = [judge(one, seeds, 0.0, above=True) for one in leads.values()]
    nearest = min(PEFT, key=lambda method: leads[method].value)
    clear = sum(one.low > 0 for one in leads.values())
    spread, fit = slope(found, lambda o: o.variance), slope(found, lambda o: o.fit)
    faster = sum(found[method].time[0] < 1 for method in PEFT)
    return [
        Finding(
            "methods.lora-count",
            f"{trained:,} against {whole:,}",
            "holds" if count(trained, 200_000) == count(whole, 1_000_000) == "holds" else "fails",
            "a 1000 x 1000 layer",
        ),
        Finding(
            "methods.time",
            f"T / (r T_full) = {proportion(found)}, geometric mean of {len(PEFT)} methods",
            about(proportion(found), rounds, 1.0),
            f"{on.rsplit(',', 1)[0]}, {rounds} rounds",
            f"A step is faster than full tuning's with {faster} of {len(PEFT)} methods: it saves "
            "gradients and updates of weights, not the forward pass and the way back through it.",
        ),
        Finding(
            "methods.accuracy",
            f"full tuning leads by {percent(leads[nearest], ' points')} over the best, {nearest}",
            all_of(verdicts),
            on,
            f"The lead is clear over {clear} of {len(PEFT)} methods; each is compared at 95 %.",
        ),
        Finding(
            "methods.variance",
            f"variance of the predicted probability: {spread} with ten times the parameters",
            judge(spread, seeds, 0.0, above=True),
            on,
            "Methods differ in kind, too, not in number alone; seeds differ in classifier, order "
            "of reviews and the adapter's start.",
        ),
        Finding(
            "methods.bias",
            f"loss on training reviews: {fit} nats with ten times the parameters",
            judge(fit, seeds, 0.0, above=False),
            on,
            "At the same number of steps, each method at its own rate.",
        ),
        Finding(
            "methods.cost",
            f"{percent(gain(found), ' points')} from full tuning's, mean of {len(PEFT)} methods",
            judge(gain(found), seeds, 0.0, above=True),
            on,
            "Accuracy above chance over T / T_full: what is no better than guessing is worth "
            "nothing, however cheap.",
        ),
    ]


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on a claim about all of several things."""
    if "fails" in verdicts:
        return "fails"
    return "holds" if set(verdicts) == {"holds"} else "undecided"


def tables(found: Found, rates: Mapping[str, float]) -> list[Table]:
    """Quality, and cost."""
    quality = [
        [
            method,
            f"{o.trainable:,}",
            f"{100 * o.r:.3g}",
            f"{rates[method]:g}",
            percent(mean(o.accuracy), ""),
            wilson(o),
            f"{100 * stdev(o.accuracy):.1f}",
            f"{mean(o.fit)}",
            f"{fmean(o.variance):.2g}",
        ]
        for method, o in found.items()
    ]
    cost = [
        [
            method,
            f"{1000 * o.seconds:.1f}",
            f"{o.time[0]:.2f} [{o.time[1]:.2f}, {o.time[2]:.2f}]",
            f"{o.r:.3g}",
            f"{o.time[0] / o.r:.3g}",
            f"{o.before / 1e6:.0f}",
            f"{o.peak / 1e6:.0f}",
            f"{o.file / 1e3:,.0f}",
            percent(mean(o.worth), ""),
        ]
        for method, o in found.items()
    ]
    return [
        Table(
            "What the methods give",
            ["method", "trains", "% of full", "rate", "accuracy, %", "by the number of reviews",
             "s.d. of seeds", "training loss, nats", "variance"],
            quality,
            "Accuracy and training loss: mean over seeds with Student's interval. By the number of "
            "reviews: Wilson's interval of that mean, what the size of the test part leaves open. "
            "Variance: of the predicted probability, between seeds.",
        ),
        Table(
            "What the methods cost",
            ["method", "step, ms", "T / T_full", "r", "T / (r T_full)", "memory before, MB",
             "at most, MB", "file, kB", "worth, points"],
            cost,
            "T / T_full: median and quartiles of rounds in which all methods make a step on the "
            "same batch in turn. Memory: before the model is there, and at most in two steps. "
            "File: what has to be kept beside the pretrained model; of full tuning, the model. "
            "Worth: accuracy above chance over T / T_full.",
        ),
    ]  # fmt: skip


def wilson(outcome: Outcome) -> str:
    """The interval that the number of reviews alone would give."""
    one = share(round(fmean(outcome.accuracy) * outcome.rows), outcome.rows)
    return f"[{100 * one.low:.1f}, {100 * one.high:.1f}]"
