"""What the runs of write-up 002 say: verdicts, three sentences, tables."""

from statistics import fmean, median, pvariance

from minigpt.metrics.intervals import share
from minigpt.studies.claims import Finding, count, judge
from minigpt.studies.clipping_and_schedule_measured import (
    Runs,
    below_one,
    early_classifier,
    frozen_of_bert_base,
    jumps,
    lost,
    straight,
    tail,
    tail_variance,
)
from minigpt.studies.report import Table
from minigpt.studies.words import over_seeds, percent, shown, side
from minigpt.training.train import TrainConfig

QUOTED_FROZEN = 52_204_032
QUOTED_RATES = {15: "1e-05", 100: "8.046e-06", 200: "5.747e-06", 300: "3.448e-06"}
QUOTED_GAIN = 0.05  # 90 against 85 %
PUBLISHED = TrainConfig(300, 1e-5, "linear", warmup_steps=15, schedule_steps=450)


def findings(runs: Runs) -> list[Finding]:
    """A verdict on each claim."""
    frozen, total = frozen_of_bert_base()
    rates = {t: f"{PUBLISHED.rate(t):.4g}" for t in QUOTED_RATES}
    mlp = over_seeds(runs.each("schedule", below_one))
    classifier = over_seeds(runs.each("schedule", early_classifier))
    gain, variance = over_seeds(runs.gains()), over_seeds(runs.variances(tail_variance))
    ratio = shown(runs.ratio(tail_variance), ".2f")
    negative, positive = runs.unread["first_negative"], runs.unread["first_positive"]
    on, seeds = runs.on, runs.seeds
    return [
        Finding(
            "clipping.count",
            f"{frozen:,} of {total:,}, {100 * frozen / total:.2f} %",
            count(frozen, QUOTED_FROZEN),
            "the published shape of BERT-base with two classes",
        ),
        Finding(
            "clipping.rates",
            ", ".join(rates.values()),
            "holds" if rates == QUOTED_RATES else "fails",
            "the published schedule",
            "after so many steps of the schedule; update n runs at the rate after n - 1",
        ),
        Finding(
            "clipping.accuracy",
            f"{percent(gain, ' points')}: {percent(runs.accuracy('schedule'))} against "
            f"{percent(runs.accuracy('baseline'))}",
            judge(gain, seeds, 0.0, above=True, quoted=QUOTED_GAIN),
            on,
            f"{runs.rows} held-out reviews, half of each label; the interval of the difference is "
            "over seeds, those of the two over reviews",
        ),
        Finding(
            "clipping.variance",
            f"{ratio} times that of the same tensors with neither",
            judge(variance, seeds, 0.0, above=False),
            on,
            "variance of the training loss over the last half of the steps, geometric mean; from "
            f"step to step, which leaves its fall out, {shown(runs.ratio(jumps), '.2f')} times",
        ),
        Finding(
            "clipping.mlp-norm",
            f"below 1 in {percent(mlp)} of the steps",
            judge(mlp, seeds, 0.5, above=True),
            on,
            f"block {runs.arms['schedule'][0]['layer']}, counted from 0, before clipping; "
            "mostly: in more than half of the steps",
        ),
        Finding(
            "clipping.classifier-norm",
            f"{shown(classifier, '.2f')} on average",
            judge(classifier, seeds, 1.0, above=True),
            on,
            "before clipping; early: the first tenth of the steps",
        ),
        Finding(
            "clipping.measure",
            f"{negative} negative and {positive} positive reviews; it says "
            f"{100 * runs.first('schedule'):.1f} %, all held-out reviews "
            f"{100 * runs.accuracy('schedule').value:.1f} %",
            count((negative > 0) + (positive > 0), 2),
            on,
            "classes in the first batch, negatives first as in IMDB, against the test set's two; "
            "the loader is not shuffled and starts again at each evaluation",
        ),
    ]


def answer(runs: Runs) -> list[str]:
    """Three sentences."""
    bag = share(runs.unread["bag_of_words"], runs.rows)
    best = max(runs.arms, key=lambda arm: runs.accuracy(arm).value)
    gain, variance = over_seeds(runs.gains()), over_seeds(runs.variances(tail_variance))
    apart = "seeds do not tell them apart" if runs.seeds > 1 else "one seed tells nothing apart"
    better = side(gain, 0.0, "more than", "fewer than", "beside")
    doubt = side(gain, 0.0, "", "", f" ({apart})")
    lower = side(variance, 0.0, ", higher", ", lower", f" ({apart})")
    rank = side(runs.accuracy(best), bag.value, "is above", "is below", "is not told apart from")
    ratio = shown(runs.ratio(tail_variance), ".2f")
    negative, positive = runs.unread["first_negative"], runs.unread["first_positive"]
    first = negative + positive
    kinds = "both classes" if min(negative, positive) else "one class only"
    return [
        f"With freezing, clipping and schedule {percent(runs.accuracy('schedule'))} of "
        f"{runs.rows} held-out reviews are told right, {better} the "
        f"{percent(runs.accuracy('baseline'))} with none of them{doubt}; the best arm, {best} at "
        f"{100 * runs.accuracy(best).value:.1f} %, {rank} the {percent(bag)} of counting words.",
        "The variance of the training loss over the last half of the steps is "
        f"{ratio} times that with neither clipping nor schedule on the same tensors"
        f"{lower}; clipping took part in {100 * runs.clipped('schedule'):.0f} % of the "
        "steps.",
        f"The course's measure, always the same {first} test reviews and {kinds}, ends at "
        f"{100 * runs.first('schedule'):.1f} % and {100 * runs.first('baseline'):.1f} % for these "
        f"two, and would give {100 * max(negative, positive) / first:.0f} % to a model that says "
        "the same of every review.",
    ]


def tables(runs: Runs) -> list[Table]:
    """Accuracies, norms, variances, rates."""
    return [_accuracies(runs), _norms(runs), _variances(runs), _rates()]


def _accuracies(runs: Runs) -> Table:
    rows = [
        [
            arm,
            f"{found[0]['trainable']:,}",
            f"{_mean_rate(runs.configs[arm]):.3g}",
            percent(runs.accuracy(arm)),
            percent(over_seeds(runs.each(arm, lambda run: run["right"] / runs.rows))),
            f"{fmean(runs.each(arm, lambda run: run['loss'])):.4f}",
            f"{100 * runs.first(arm):.1f} %",
        ]
        for arm, found in runs.arms.items()
    ]
    for name, key in (("bag of words", "bag_of_words"), ("always one answer", "majority")):
        rows.append([name, "", "", percent(share(runs.unread[key], runs.rows)), "", "", ""])
    return Table(
        "Held-out accuracy",
        [
            *("arm", "trains", "mean rate", "accuracy [reviews]", "accuracy [seeds]"),
            *("loss, nats", "course's measure"),
        ],
        rows,
        f"{runs.rows} held-out reviews, half of each label. [reviews]: Wilson's interval for so "
        "many reviews; [seeds]: Student's over the seeds, where there are two or more. Course's "
        "measure: the first batch alone, negatives first. Bag of words: logistic regression on "
        f"counts of words, from {runs.unread['train_rows']:,} training reviews.",
    )


def _norms(runs: Runs) -> Table:
    def row(arm: str) -> list[str]:
        norms = [run["steps"]["gradient_norm"] for run in runs.arms[arm]]
        taken = [value for run in norms for value in lost(run, runs.configs[arm])]
        return [
            arm,
            f"{median(v for run in norms for v in run):.3g}",
            f"{max(v for run in norms for v in run):.3g}",
            f"{100 * fmean(runs.each(arm, below_one)):.1f} %",
            f"{fmean(runs.each(arm, early_classifier)):.3g}",
            f"{100 * runs.clipped(arm):.0f} %",
            f"{fmean(taken):.3g}",
        ]

    return Table(
        "Norms of gradients, before clipping",
        [
            *("arm", "|g|, median", "|g|, largest", "MLP below 1", "classifier, early"),
            *("steps clipped", "Delta g, mean"),
        ],
        [row(arm) for arm in runs.arms],
        "|g| is that of all trained tensors, so of fewer where some are frozen. MLP below 1: share "
        "of the steps. Early: the first tenth of the steps.",
    )


def _variances(runs: Runs) -> Table:
    def row(arm: str) -> list[str]:
        return [
            arm,
            f"{fmean(runs.each(arm, lambda run: pvariance(run['steps']['loss']))):.4g}",
            f"{fmean(runs.each(arm, tail_variance)):.4g}",
            f"{fmean(runs.each(arm, jumps)):.4g}",
            f"{fmean(runs.each(arm, lambda run: fmean(tail(run['steps']['loss'])))):.4f}",
        ]

    return Table(
        "Variance of the training loss",
        ["arm", "all steps", "last half", "step to step", "mean loss, last half"],
        [row(arm) for arm in runs.arms],
        "Over all steps the variance is mostly the fall of the loss, larger where it falls "
        "further. Step to step: half the mean square of the difference of neighbours. All arms "
        "see the same batches.",
    )


def _rates() -> Table:
    def row(name: str, rates: list[float]) -> list[str]:
        return [name, *(f"{rate:.4g}" for rate in rates)]

    at = list(QUOTED_RATES)
    return Table(
        "Rates of the published schedule",
        ["", *map(str, at)],
        [
            row("after so many steps of the schedule", [PUBLISHED.rate(t) for t in at]),
            row("update, optimizer first (used here)", [PUBLISHED.rate(t - 1) for t in at]),
            row("update, schedule first (section 3.4)", [PUBLISHED.rate(t) for t in at]),
            row("update, 1 - t / T_sched", [straight(PUBLISHED, t - 1) for t in at]),
        ],
        "The write-up quotes the first line.",
    )


def _mean_rate(config: TrainConfig) -> float:
    return fmean(config.rate(t) for t in range(config.steps))
