"""Write-up 003: what does each method of fine-tuning cost, and what does it give?

An encoder with a classifier learns sentiment under every method of `peft_lite`, under full tuning,
and with the classifier alone, the floor.  With r the share of the parameters that train, the
write-up says, and has no experiment for it:

    T = r T_full        time of a step
    A <= A_full         accuracy, while A for the cost is higher
    fewer parameters:   less variance between seeds, more bias

Here p_s(x) is the probability of "positive" that the model of seed s gives a held-out review x, and
over X reviews and S seeds

    A_s   = share of reviews where p_s is on the label's side of 1/2
    V     = 1/X sum_x variance over s of p_s(x)
    V_s   = S V - (S - 1) V without seed s         jackknife (Tukey 1958): their mean is V
    fit_s = mean loss over training reviews at the end, without dropout: the bias
    worth = (A - chance) / (T / T_full)                           accuracy for the cost

Quality: one part for each seed and method; of one seed all methods have the same reviews, batches
and first classifier.  Cost: peak memory, parameters and bytes on disk, one process for each method;
the time of a step, all methods in one process, in turn on one batch.

Every method trains the classifier too, and the pooler where it is new (encoder_methods.py), and has
the command's defaults (settings/methods.py).  The peak rates by method are for a small encoder;
peft_rates.py searches for them on reviews held out of the training part, never on the test part.
The schedule is linear after a tenth of the steps of warm-up; gradients are clipped to norm 1.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, linear_regression, median, stdev, variance
from typing import Any

import torch

import peft_lite
from minigpt.checkpoints.directory import save
from minigpt.metrics.intervals import Estimate, mean, positive_mean, share
from minigpt.models.architecture import Model
from minigpt.models.config import nearest, positive
from minigpt.objectives.classify import (
    ShuffledExamples,
    classification_loss,
    consecutive_examples,
    new_modules,
    predict,
)
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies import figures as styles
from minigpt.studies.claims import Finding, about, above, all_of, below, count
from minigpt.studies.counts import lora_counts
from minigpt.studies.encoder_methods import FLOOR, FULL, LR, METHODS, attach
from minigpt.studies.encoders import (
    EVALUATED,
    Encoder,
    Sentiment,
    check_encoder,
    data_name,
)
from minigpt.studies.figures import Figures, marks, points
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import differences, middle_half, ratios
from minigpt.studies.report import Report, Table, table
from minigpt.studies.training import Step, at_least, in_turn, learn
from minigpt.studies.words import enough, moves, name, percent, ran_on
from minigpt.training import memory
from minigpt.training.train import TrainConfig, evaluate

TITLE = "Methods of fine-tuning (write-up 003)"
PEFT = tuple(method for method in METHODS if method not in (FULL, FLOOR))
# those of write-up 002, since 003 names none; rates as in the papers
SOURCES = {"model": "bert-base-uncased", "data": "the IMDB reviews"}
PUBLISHED = {
    "steps": 300,
    "batch_size": 64,
    "sequence_length": 492,  # 512 positions, of which prompts take 20
    "lr": [
        *("full=1e-5", "freeze=1e-5", "bias=1e-3", "lora=5e-4", "dora=5e-4"),
        *("ia3=3e-3", "bottleneck=3e-4", "prefix=1e-2", "prompt=3e-2", "classifier=1e-3"),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Settings(Sentiment):
    """The study's settings."""

    model: str = option('an encoder: a directory, a hub id, or "bundled-bert"', "bundled-bert")
    data: str = option(
        'folder with train and test, .jsonl or .csv, perhaps .gz; or "bundled"', "bundled"
    )
    seeds: int = option("runs of each method; below five nothing is decided", 3)
    steps: int = with_default(TrainingOptions, "steps", 100)
    batch_size: int = option("reviews in a batch", 16)
    sequence_length: int = option("tokens of a review, the rest is cut", 64)
    lr: list[str] | None = option(
        "peak rates that are not the default, as in full=5e-5 lora=1e-3 (default: "
        + " ".join(f"{method}={lr:g}" for method, lr in LR.items())
        + ")",
        None,
    )
    train_rows: int | None = option(
        "reviews to learn from, half of each label (default: all)", None
    )
    test_rows: int | None = option("held-out reviews, half of each label (default: all)", None)
    rounds: int = option("times that a step of each method is timed", 10)

    def rates(self) -> dict[str, float]:
        """The peak rate of each method."""
        rates = dict(LR)
        for pair in self.lr or ():
            method, _, value = pair.partition("=")
            if method not in LR:
                raise ValueError(
                    f"--lr {pair}: {method!r} must be one of {', '.join(LR)}{nearest(method, LR)}"
                )
            try:
                rates[method] = float(value)
            except ValueError:
                raise ValueError(f"--lr {pair}: want a number, as in {method}=1e-3") from None
        return rates

    def training(self, method: str) -> TrainConfig:
        """How a method trains."""
        return TrainConfig(
            steps=self.steps,
            lr=self.rates()[method],
            warmup_steps=self.steps // 10,
            snapshot_every=100,
        )


# --- runs ---------------------------------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """Costs, times, then the qualities, seed by seed."""
    positive(settings, "batch_size")
    at_least(settings, 3, "seeds")  # of which each is left out in turn
    at_least(settings, 2, "rounds")
    for method in METHODS:
        settings.training(method)
    longest = peft_lite.PrefixConfig().num_virtual_tokens
    check_encoder(settings.model, settings.sequence_length, longest)
    settings.rows(seed=0)
    costs = [Part(f"cost-{method}", cost, (settings, method)) for method in METHODS]
    qualities = [
        Part(f"{method}-seed-{seed}", quality, (settings, method, seed))
        for seed in range(settings.seeds)
        for method in METHODS
    ]
    return [*costs, Part("times", times, (settings,)), *qualities]


def quality(folder: Path, settings: Settings, method: str, seed: int) -> Result:
    """Trains a method, and measures what was learned."""
    encoder = settings.encoder(seed)
    model = encoder.model
    torch.manual_seed(seed)
    attach(model, method, new_modules(model))
    batches = ShuffledExamples(encoder.train, settings.batch_size, seed, encoder.pad)
    config, title = settings.training(method), f"{method}, seed {seed}"
    tokens = settings.batch_size * settings.sequence_length
    learn(folder, title, model, classification_loss, batches, config, tokens)
    logits, labels = predict(model, encoder.test_batches())
    positives = logits.softmax(-1)[:, 1]
    learned = encoder.train[: len(labels)]
    return {
        # A_s: p_s is on the label's side of 1/2
        "right": int(((positives > 0.5) == labels).sum()),
        "rows": len(labels),
        "chance": labels.bincount().max().item() / len(labels),
        "fit": evaluate(
            model, classification_loss, consecutive_examples(learned, EVALUATED, encoder.pad)
        ),
        "positives": [round(p, 5) for p in positives.tolist()],
    }


def cost(folder: Path, settings: Settings, method: str) -> Result:
    """Parameters of a method, memory of two training steps, and bytes on disk."""
    before = memory.resident()
    encoder = settings.encoder(0)
    model = encoder.model
    handle = attach(model, method, new_modules(model))
    counts = peft_lite.report(model)
    step = first_batch_again(settings, encoder, model)
    for _ in range(2):  # in the second the optimizer's state is there
        step()
    peak, saved = memory.peak(), folder / "saved"
    if handle is None:
        save(model, saved)
    else:
        handle.save(saved)
    size = sum(file.stat().st_size for file in saved.glob("*.safetensors"))
    shutil.rmtree(saved)
    return {
        "trainable": counts.trainable,
        "total": counts.total,
        "memory_before_bytes": before,
        "memory_peak_bytes": peak,
        "file_bytes": size,
    }


def times(folder: Path, settings: Settings) -> Result:
    """Seconds of a step of each method, in turn on the same batch."""
    encoder = settings.encoder(0)
    new = new_modules(encoder.model)
    sides = {}
    for method in METHODS:
        model = deepcopy(encoder.model)
        attach(model, method, new)
        sides[method] = first_batch_again(settings, encoder, model)
    return in_turn(sides, settings.rounds)


def first_batch_again(settings: Settings, encoder: Encoder, model: Model) -> Step:
    """The step that all costs are measured on."""
    batch = ShuffledExamples(encoder.train, settings.batch_size, 0, encoder.pad)(0)
    return Step(model, classification_loss, lambda i: batch, TrainConfig(steps=1, lr=1e-6))


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The cost and the quality of one method.

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


@dataclass(frozen=True)
class Measured:
    """The outcomes of all methods, and the measured quantities behind the claims."""

    settings: Settings
    outcomes: Mapping[str, Outcome]

    @property
    def full(self) -> Outcome:
        return self.outcomes[FULL]

    def slope(self, values: Callable[[Outcome], Sequence[float]]) -> Estimate:
        """How a value that each seed has changes with ten times the parameters: the mean over seeds
        of its slope over all methods.
        """
        outcomes = self.outcomes.values()
        decades = [math.log10(outcome.trainable) for outcome in outcomes]
        by_seed = zip(*(values(outcome) for outcome in outcomes), strict=True)
        return mean([linear_regression(decades, column).slope for column in by_seed])

    def fit(self) -> Estimate:
        return self.slope(lambda outcome: outcome.fit)

    def spread(self) -> Estimate:
        return self.slope(lambda outcome: outcome.variance)

    def proportion(self) -> Estimate:
        """T / (r T_full), the geometric mean over methods, then the mean over rounds."""
        outcomes = [self.outcomes[method] for method in PEFT]
        logs = [[math.log(t / outcome.r) for t in outcome.times] for outcome in outcomes]
        return mean([math.exp(fmean(column)) for column in zip(*logs, strict=True)])

    def line(self) -> tuple[float, float]:
        """Slope and intercept of T / T_full against r, all methods and full tuning."""
        outcomes = self.outcomes.values()
        line = linear_regression([o.r for o in outcomes], [o.time[0] for o in outcomes])
        return line.slope, line.intercept

    def lead(self, method: str) -> Estimate:
        """How much more accurate full tuning is, seed by seed."""
        return mean(differences(self.full.accuracy, self.outcomes[method].accuracy))

    def gain(self) -> Estimate:
        """Worth of the methods, their mean, less that of full tuning, seed by seed."""
        by_seed = zip(*(self.outcomes[method].worth for method in PEFT), strict=True)
        return mean(differences([fmean(worths) for worths in by_seed], self.full.worth))


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    seconds = results["times"]
    total = results[f"cost-{FULL}"]["trainable"]
    outcomes = {}
    for method in METHODS:
        cost, times = results[f"cost-{method}"], ratios(seconds[method], seconds[FULL])
        runs = [results[f"{method}-seed-{seed}"] for seed in range(settings.seeds)]
        outcomes[method] = Outcome(
            trainable=cost["trainable"],
            r=cost["trainable"] / total,
            before=cost["memory_before_bytes"],
            peak=cost["memory_peak_bytes"],
            file=cost["file_bytes"],
            seconds=median(seconds[method]),
            time=middle_half(times),
            times=times,
            rows=runs[0]["rows"],
            chance=runs[0]["chance"],
            accuracy=[run["right"] / run["rows"] for run in runs],
            fit=[run["fit"] for run in runs],
            variance=variances([run["positives"] for run in runs]),
        )
    return Measured(settings, outcomes)


def variances(positives: Sequence[Sequence[float]]) -> list[float]:
    """V_s of probabilities, S rows of X."""
    S = len(positives)
    V = mean_variance(positives)
    without = (mean_variance([*positives[:s], *positives[s + 1 :]]) for s in range(S))
    # V_s = S V - (S - 1) V without s
    return [S * V - (S - 1) * V_without for V_without in without]


def mean_variance(positives: Sequence[Sequence[float]]) -> float:
    """V: the variance over seeds, its mean over reviews."""
    return fmean(variance(column) for column in zip(*positives, strict=True))


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    numbers = {method: asdict(outcome) for method, outcome in m.outcomes.items()}
    return Report(TITLE, answer(m), tables(m), findings(m), numbers)


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    full, floor = m.full, m.outcomes[FLOOR]
    peft = {method: m.outcomes[method] for method in PEFT}
    best = max(peft, key=lambda method: fmean(peft[method].accuracy))
    times = [100 * outcome.time[0] for outcome in peft.values()]
    sizes = [100 * outcome.r for outcome in peft.values()]
    seeds, (slope, intercept) = m.settings.seeds, m.line()
    return [
        f"Full tuning gets {percent(mean(full.accuracy))} of {full.rows} held-out reviews right, "
        f"the best of {len(PEFT)} methods, {best}, {percent(mean(peft[best].accuracy))} with "
        f"{100 * peft[best].r:.2g} % of the parameters, the classifier alone "
        f"{percent(mean(floor.accuracy))} (chance: {100 * full.chance:.1f} %, "
        f"{seeds} seeds).",
        f"A step of these methods takes {min(times):.0f} to {max(times):.0f} % of full tuning's "
        f"time for {min(sizes):.2g} to {max(sizes):.2g} % of its parameters, {m.proportion()} "
        f"times what T = r T_full says: the measured line is T / T_full = {intercept:.2f} + "
        f"{slope:.2f} r.",
        f"With ten times the parameters the loss on training reviews "
        f"{moves(m.fit(), seeds, ' nats')}; the variance between seeds of the predicted "
        f"probability {moves(m.spread(), seeds)}.",
    ]


def findings(m: Measured) -> list[Finding]:
    """The verdicts."""
    seeds, rounds = m.settings.seeds, m.settings.rounds
    on = ran_on(m.settings.model, [data_name(m.settings.data)], seeds)
    trained, full = lora_counts(1000, 1000, r=100)
    leads = {method: m.lead(method) for method in PEFT}
    verdicts = [above(lead, seeds) for lead in leads.values()]
    nearest = min(PEFT, key=lambda method: leads[method].value)
    clear = sum(lead.low > 0 for lead in leads.values())
    faster = sum(m.outcomes[method].time[0] < 1 for method in PEFT)
    return [
        Finding(
            "methods.lora-count",
            f"{trained:,} against {full:,}",
            count((trained, full), (200_000, 1_000_000)),
            "a 1000 x 1000 layer",
        ),
        Finding(
            "methods.time",
            f"T / (r T_full) = {m.proportion()}, geometric mean of {len(PEFT)} methods",
            about(m.proportion(), rounds, 1.0),
            f"{name(m.settings.model)}, {name(data_name(m.settings.data))}, "
            + enough(rounds, "round"),
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
            f"variance of the predicted probability: {m.spread()} with ten times the parameters",
            above(m.spread(), seeds),
            on,
            "Methods differ in kind, too, not in number alone; seeds differ in classifier, order "
            "of reviews and the adapter's start.",
        ),
        Finding(
            "methods.bias",
            f"loss on training reviews: {m.fit()} nats with ten times the parameters",
            below(m.fit(), seeds),
            on,
            "At the same number of steps, each method at its own rate.",
        ),
        Finding(
            "methods.cost",
            f"{percent(m.gain(), ' points')} from full tuning's, mean of {len(PEFT)} methods",
            above(m.gain(), seeds),
            on,
            "Accuracy above chance over T / T_full: what is no better than guessing is worth "
            "nothing, however cheap.",
        ),
    ]


def tables(m: Measured) -> list[Table]:
    """Quality, and cost."""
    rates, by = m.settings.rates(), m.outcomes
    return [
        table(
            "What the methods give",
            "method",
            METHODS,
            {
                "trains": lambda method: f"{by[method].trainable:,}",
                "% of full": lambda method: f"{100 * by[method].r:.3g}",
                "rate": lambda method: f"{rates[method]:g}",
                "accuracy, %": lambda method: percent(mean(by[method].accuracy), ""),
                "by the number of reviews": lambda method: wilson(by[method]),
                "s.d. of seeds": lambda method: f"{100 * stdev(by[method].accuracy):.1f}",
                "training loss, nats": lambda method: f"{mean(by[method].fit)}",
                "variance": lambda method: f"{fmean(by[method].variance):.2g}",
            },
            "Accuracy and training loss: mean over seeds with Student's interval. By the number of "
            "reviews: Wilson's interval of that mean, what the size of the test part leaves open. "
            "Variance: of the predicted probability, between seeds.",
        ),
        table(
            "What the methods cost",
            "method",
            METHODS,
            {
                "step, ms": lambda method: f"{1000 * by[method].seconds:.1f}",
                "T / T_full": lambda method: "{:.2f} [{:.2f}, {:.2f}]".format(*by[method].time),
                "r": lambda method: f"{by[method].r:.3g}",
                "T / (r T_full)": lambda method: f"{by[method].time[0] / by[method].r:.3g}",
                "memory before, MB": lambda method: f"{by[method].before / 1e6:.0f}",
                "at most, MB": lambda method: f"{by[method].peak / 1e6:.0f}",
                "file, kB": lambda method: f"{by[method].file / 1e3:,.0f}",
                "worth, points": lambda method: percent(mean(by[method].worth), ""),
            },
            "T / T_full: median and quartiles of rounds in which all methods make a step on the "
            "same batch in turn. Memory: before the model is there, and at most in two steps. "
            "File: what has to be kept beside the pretrained model; of full tuning, the model. "
            "Worth: accuracy above chance over T / T_full.",
        ),
    ]


def wilson(outcome: Outcome) -> str:
    """The interval that the number of reviews alone would give."""
    interval = share(round(fmean(outcome.accuracy) * outcome.rows), outcome.rows)
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


# --- figures ------------------------------------------------------------------------------------

BLACK = {"color": "#000000", "linestyle": "-", "marker": "x"}
STYLES = dict(zip(METHODS, (styles.FULL, styles.FROZEN, *styles.OTHERS, BLACK), strict=True))
HATCHES = dict(zip(METHODS, (*styles.HATCHES, "**"), strict=True))


def draw(m: Measured, figures: Figures) -> None:
    """All figures; a method looks the same in all of them."""
    draw_times(m, figures)
    with figures.add(
        "accuracy.png",
        "Accuracy on held-out reviews against the number of parameters that train; bars are "
        "95 % intervals over seeds.",
    ) as axes:
        for method, outcome in m.outcomes.items():
            accuracy = mean([100 * a for a in outcome.accuracy])
            mark(axes, method, outcome.trainable, accuracy)
        chance = 100 * m.full.chance
        axes.axhline(chance, color="#444444", linestyle=":", label="chance")
        axes.set(xscale="log", xlabel="parameters that train", ylabel="accuracy (%)")
        axes.legend(ncols=3)
    with figures.add(
        "variance_and_fit.png",
        "Left: variance of the predicted probability between seeds. Right: loss on training "
        "reviews. Bars are 95 % intervals over seeds, those of the variance on a log scale.",
        width=9,
        ncols=2,
    ) as (left, right):
        for method, outcome in m.outcomes.items():
            mark(left, method, outcome.trainable, positive_mean(outcome.variance))
            mark(right, method, outcome.trainable, mean(outcome.fit))
        left.set(ylabel="variance of the predicted probability")
        right.set(ylabel="loss on training reviews (nats)")
        for axes in (left, right):
            axes.set(xscale="log", xlabel="parameters that train")
        place = {"loc": "outside lower center", "ncols": 5, "fontsize": "medium"}
        left.figure.legend(*right.get_legend_handles_labels(), **place)
    with figures.add(
        "worth.png",
        "Accuracy above chance for the time of one step of full tuning; lines are 95 % "
        "intervals over seeds.",
    ) as axes:
        for i, (method, outcome) in enumerate(m.outcomes.items()):
            worth = mean([100 * worth for worth in outcome.worth])
            style = {"color": STYLES[method]["color"], "hatch": HATCHES[method]}
            error = worth.high - worth.value
            axes.bar(i, worth.value, yerr=error, edgecolor="white", capsize=3, **style)
        axes.set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right")
        axes.axhline(0, color="#444444", linewidth=0.8)
        axes.set(ylabel="points above chance / (T / T_full)")


def draw_times(m: Measured, figures: Figures) -> None:
    """T / T_full against r, the write-up's line and the measured one."""
    caption = (
        "Time of a step against the number of parameters that train, both over full tuning's; "
        "bars are quartiles. T = r T_full is what the write-up says."
    )
    slope, intercept = m.line()
    least = min(outcome.r for outcome in m.outcomes.values())
    grid = [least * (1 / least) ** (i / 99) for i in range(100)]
    line = [intercept + slope * r for r in grid]
    with figures.add("time.png", caption) as axes:
        axes.plot(grid, grid, color="#444444", linestyle="-", label="T = r T_full")
        label = f"{intercept:.2f} + {slope:.2f} r"
        axes.plot(grid, line, color="#444444", linestyle="--", label=label)
        axes.axhline(1, color="#aaaaaa", linewidth=0.8)
        for method, outcome in m.outcomes.items():
            mark(axes, method, outcome.r, Estimate(*outcome.time))
        axes.set(xscale="log", yscale="log", ylabel="T / T_full")
        axes.set(xlabel="r = trained parameters / all parameters")
        axes.legend(ncols=2)


def mark(axes: Any, method: str, x: float, y: Estimate) -> None:
    """The mark of a method, with its interval."""
    points(axes, [x], [y], linestyle="none", label=method, **marks(STYLES[method]))
