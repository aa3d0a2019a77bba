"""What the runs of write-up 002 say: tables, verdicts, three sentences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median, pvariance

import torch

from minigpt.bert import Bert, BertConfig
from minigpt.metrics import Estimate, mean, share
from minigpt.studies.claims import Finding, count, judge
from minigpt.studies.lab import Result
from minigpt.studies.report import Table
from minigpt.train import TrainConfig

PARTS = ("attention", "embeddings")
QUOTED_FROZEN = 52_204_032
QUOTED_RATES = {15: "1e-05", 100: "8.046e-06", 200: "5.747e-06", 300: "3.448e-06"}
QUOTED_GAIN = 0.05  # 90 against 85 %


@dataclass(frozen=True)
class Runs:
    """All runs of a study.

    Attributes:
        arms: arm -> its runs, one a seed.
        configs: arm -> how it trains.
        unread: what counting words tells.
        on: model, data and number of seeds, in words.
    """

    arms: Mapping[str, Sequence[Result]]
    configs: Mapping[str, TrainConfig]
    unread: Result
    on: str

    @property
    def seeds(self) -> int:
        return len(self.arms["baseline"])

    @property
    def rows(self) -> int:
        """Held-out reviews."""
        return int(self.unread["rows"])

    def each(self, arm: str, figure: Callable[[Result], float]) -> list[float]:
        """A figure of every seed's run."""
        return [figure(run) for run in self.arms[arm]]

    def accuracy(self, arm: str) -> Estimate:
        """The mean over seeds, with the interval that so many reviews leave."""
        right = fmean(self.each(arm, lambda run: run["right"]))
        return replace(share(round(right), self.rows), value=right / self.rows)

    def first(self, arm: str) -> float:
        """The course's accuracy, that of the first batch alone, at the end of training."""
        return fmean(self.each(arm, lambda run: run["first_accuracy"]))


def lost(norms: Sequence[float], config: TrainConfig) -> list[float]:
    """Delta g of each step, from |g|."""
    # Delta g = |g| - |g'|,   |g'| = min(|g|, c(t))
    return [norm - min(norm, config.limit(t)) for t, norm in enumerate(norms)]


def tail(values: Sequence[float]) -> Sequence[float]:
    """The last half, where the fall of the loss is over."""
    return values[len(values) // 2 :]


def early(values: Sequence[float]) -> Sequence[float]:
    """The first tenth."""
    return values[: max(1, len(values) // 10)]


def below_one(run: Result) -> float:
    """Share of the steps in which the gradient of the MLP's weight has a norm below 1."""
    return fmean(norm < 1 for norm in run["steps"]["gradient_norm.mlp"])


def early_classifier(run: Result) -> float:
    """Mean norm of the classifier's gradient in the first tenth of the steps."""
    return fmean(early(run["steps"]["gradient_norm.classifier"]))


def tail_variance(run: Result) -> float:
    """Of the training loss."""
    return pvariance(tail(run["steps"]["loss"]))


def gains(runs: Runs) -> list[float]:
    """Accuracy with everything less that of the baseline, by seeds."""
    pairs = zip(runs.arms["schedule"], runs.arms["baseline"], strict=True)
    return [(a["right"] - b["right"]) / runs.rows for a, b in pairs]


def variances(runs: Runs) -> list[float]:
    """Logarithm of the variance with clipping and schedule against that with neither, by seeds;
    the same tensors train in both.
    """
    pairs = zip(runs.arms["schedule"], runs.arms["freezing"], strict=True)
    return [math.log(tail_variance(a) / tail_variance(b)) for a, b in pairs]


def frozen_of_bert_base() -> tuple[int, int]:
    """Parameters of BERT-base with two classes that the rule freezes, and all there are."""
    with torch.device("meta"):
        model = Bert(BertConfig(), "classification", 2)
    sizes = {model.names.to_hf(name): p.numel() for name, p in model.named_parameters()}
    frozen = sum(n for name, n in sizes.items() if any(part in name for part in PARTS))
    return frozen, sum(sizes.values())


def published() -> TrainConfig:
    """The write-up's schedule."""
    return TrainConfig(300, 1e-5, "linear", warmup_steps=15, schedule_steps=450)


def findings(runs: Runs) -> list[Finding]:
    """A verdict on each claim."""
    frozen, total = frozen_of_bert_base()
    rates = {t: f"{published().rate(t):.4g}" for t in QUOTED_RATES}
    mlp = runs.each("schedule", below_one)
    classifier = runs.each("schedule", early_classifier)
    negative, positive = runs.unread["first_negative"], runs.unread["first_positive"]
    on = runs.on
    return [
        Finding(
            "clipping.count",
            f"{frozen:,} of {total:,}, {frozen / total:.2%}",
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
            f"{_points(gains(runs))} points ({_percent(runs.accuracy('schedule'))} against "
            f"{_percent(runs.accuracy('baseline'))})",
            _verdict(gains(runs), 0.0, above=True, quoted=QUOTED_GAIN),
            on,
            f"held-out reviews, half of each label, n = {runs.rows}; {_few(runs)}",
        ),
        Finding(
            "clipping.variance",
            f"{_ratio(variances(runs))} times that of the same tensors with neither",
            _verdict(variances(runs), 0.0, above=False),
            on,
            "variance of the training loss over the last half of the steps, mean of its "
            f"logarithm over seeds; {_few(runs)}",
        ),
        Finding(
            "clipping.mlp-norm",
            f"below 1 in {_shown(mlp, '.1%')} of the steps",
            _verdict(mlp, 0.5, above=True),
            on,
            f"block {runs.arms['schedule'][0]['layer']}, counted from 0, before clipping; "
            f"mostly: in more than half of the steps; {_few(runs)}",
        ),
        Finding(
            "clipping.classifier-norm",
            f"{_shown(classifier, '.3g')} on average",
            _verdict(classifier, 1.0, above=True),
            on,
            f"before clipping; early: the first tenth of the steps; {_few(runs)}",
        ),
        Finding(
            "clipping.measure",
            f"{negative} negative and {positive} positive reviews; it says "
            f"{runs.first('schedule'):.1%} where {runs.accuracy('schedule').value:.1%} is right",
            count(min(negative, positive, 1) + 1, 2),
            on,
            "classes in the first batch of the test set, negatives first as in IMDB, against two; "
            "the loader starts again at each evaluation and is not shuffled",
        ),
    ]


def answer(runs: Runs) -> list[str]:
    """Three sentences."""
    bag = share(runs.unread["bag_of_words"], runs.rows)
    best = max((*runs.arms,), key=lambda arm: runs.accuracy(arm).value)
    gain, ratios = fmean(gains(runs)), variances(runs)
    direction = "as many as" if gain == 0 else "more than" if gain > 0 else "fewer than"
    certain = _certain(gains(runs))
    config = runs.configs["schedule"]
    clipped = runs.each("schedule", lambda run: _clipped(run, config))
    factor = math.exp(fmean(ratios))
    reached = "above" if runs.accuracy(best).value > bag.value else "not above"
    negative, positive = runs.unread["first_negative"], runs.unread["first_positive"]
    one = "all of one class" if not min(negative, positive) else f"{negative} of them negative"
    return [
        f"With freezing, clipping and schedule {_percent(runs.accuracy('schedule'))} of "
        f"{runs.rows} held-out reviews are told right, {direction} the "
        f"{_percent(runs.accuracy('baseline'))} without any of them ({_points(gains(runs))} points"
        f"{certain}); the best arm, {best}, is {reached} the {_percent(bag)} of counting words.",
        f"Over the last half of the steps the variance of the loss with clipping and schedule is "
        f"{factor:.2f} times that with neither on the same tensors{_certain(ratios)}; clipping "
        f"took part in {fmean(clipped):.0%} of the steps.",
        f"The course's measure, the same first {negative + positive} test reviews each time and "
        f"{one}, says {runs.first('schedule'):.1%} and {runs.first('baseline'):.1%} for these two "
        f"runs, and would say {max(negative, positive) / (negative + positive):.0%} of a model "
        f"that gives the same answer to everything.",
    ]


def tables(runs: Runs) -> list[Table]:
    """Accuracies, norms, variances, rates."""
    return [_accuracies(runs), _norms(runs), _variances(runs), _rates()]


def _accuracies(runs: Runs) -> Table:
    rows = [
        [
            arm,
            f"{found[0]['trainable']:,}",
            f"{fmean(_rates_of(runs.configs[arm])):.3g}",
            _percent(runs.accuracy(arm)),
            _shown(runs.each(arm, lambda run: run["right"] / runs.rows), ".1%"),
            f"{fmean(runs.each(arm, lambda run: run['loss'])):.4f}",
            f"{runs.first(arm):.1%}",
        ]
        for arm, found in runs.arms.items()
    ]
    for name, key in (("bag of words", "bag_of_words"), ("always one answer", "majority")):
        found_right = share(runs.unread[key], runs.rows)
        rows.append([name, "", "", _percent(found_right), "", "", ""])
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
        config = runs.configs[arm]
        steps = [run["steps"] for run in runs.arms[arm]]
        taken = [value for s in steps for value in lost(s["gradient_norm"], config)]
        return [
            arm,
            f"{median(v for s in steps for v in s['gradient_norm']):.3g}",
            f"{max(v for s in steps for v in s['gradient_norm']):.3g}",
            f"{fmean(runs.each(arm, below_one)):.0%}",
            f"{fmean(runs.each(arm, early_classifier)):.3g}",
            f"{fmean(runs.each(arm, lambda run: _clipped(run, config))):.0%}",
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
        losses = [run["steps"]["loss"] for run in runs.arms[arm]]
        return [
            arm,
            *(f"{fmean(map(of, losses)):.4g}" for of in (pvariance, _tail, _jumps)),
            f"{fmean(fmean(tail(loss)) for loss in losses):.4f}",
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
    config = published()
    return Table(
        "Rates of the published schedule, three ways",
        ["", *(f"{t}" for t in QUOTED_RATES)],
        [
            [
                "after so many steps of the schedule",
                *(f"{config.rate(t):.4g}" for t in QUOTED_RATES),
            ],
            [
                "of update number, optimizer first (the notebook; used here)",
                *(f"{config.rate(t - 1):.4g}" for t in QUOTED_RATES),
            ],
            [
                "of update number, schedule first (section 3.4)",
                *(f"{config.rate(t):.4g}" for t in QUOTED_RATES),
            ],
            [
                "of update number, 1 - t / T_sched",
                *(f"{config.lr * (1 - t / config.schedule_length):.4g}" for t in QUOTED_RATES),
            ],
        ],
        "The write-up quotes the first line.",
    )


def _rates_of(config: TrainConfig) -> list[float]:
    return [config.rate(t) for t in range(config.steps)]


def _clipped(run: Result, config: TrainConfig) -> float:
    """Share of the steps that clipping changed."""
    return fmean(value > 0 for value in lost(run["steps"]["gradient_norm"], config))


def _tail(losses: Sequence[float]) -> float:
    return pvariance(tail(losses))


def _jumps(losses: Sequence[float]) -> float:
    pairs = zip(losses[1:], losses[:-1], strict=True)
    return fmean([(a - b) ** 2 / 2 for a, b in pairs])


def _verdict(
    values: Sequence[float], alternative: float, above: bool, quoted: float | None = None
) -> str:
    if len(values) < 2:
        return "undecided"
    return judge(mean(values), len(values), alternative, above, quoted)


def _shown(values: Sequence[float], form: str) -> str:
    """The mean over seeds, with its interval where there is one."""
    if len(values) < 2:
        return format(values[0], form)
    found = mean(values)
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} % [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def _points(shares: Sequence[float]) -> str:
    return _shown([100 * value for value in shares], "+.1f")


def _ratio(logarithms: Sequence[float]) -> str:
    if len(logarithms) < 2:
        return f"{math.exp(logarithms[0]):.2f}"
    found = mean(logarithms)
    low, high = math.exp(found.low), math.exp(found.high)
    return f"{math.exp(found.value):.2f} [{low:.2f}, {high:.2f}]"


def _certain(differences: Sequence[float]) -> str:
    """Whether seeds tell a difference from none."""
    if len(differences) < 2:
        return ", one seed"
    found = mean(differences)
    apart = found.low > 0 or found.high < 0
    return "" if apart else ", which the seeds do not tell from none"


def _few(runs: Runs) -> str:
    return f"{runs.seeds} seed" + ("s" if runs.seeds > 1 else ", so nothing is decided")
