"""Write-up 000: how does a model learn when only query, key and value of its upper blocks train?

    full       theta_A <- theta_A - eta AdamW(g)    everything trains
    frozen     theta_B <- the same in T alone       T: q, k, v of blocks L/2 to L - 1
    inverse    theta_C <- the same outside T        exactly T is frozen

from one start, theta_A(0) = theta_B(0) = theta_C(0), on the same batches in the same order.  Of
GPT-Neo-125M's 12 blocks T holds those of blocks 6 to 11, 10,616,832 of 125,198,592 parameters.  Any
decoder of two blocks or more has such a T.

    p             share of sampled tokens among the 100 most frequent ones of the text,
                  Delta p = p after - p before
    |W_t - W_t-1| Frobenius norm of each step's change of the key weight of block L/2
    r             (T_full - T_frozen) / T_full, the saving of time

A model's final loss is the mean over the last tenth of its batches.  The inverse "nearly coincides"
with full training when its final loss differs by less than 5 % of what full training gained.

As published: AdamW 5e-4 with weight decay 0.01, neither schedule nor clipping, 474 batches of 16
random windows of 256 tokens of Moby-Dick; 10 random start tokens, 100 sampled after each, top-k 50.

What differs: several seeds; the same starts and the same random numbers before and after and for
all models, so that equal weights give equal samples (with others each time, as in the write-up,
p moves by some points of its own: `fresh`); times taken in turn, besides the sums over the runs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from torch import Tensor, nn

import peft_lite
from minigpt.data.tales import CARROLL
from minigpt.metrics.intervals import Estimate, difference, share
from minigpt.metrics.popular_tokens import popular_share, popular_tokens
from minigpt.models.architecture import Model
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies.claims import Finding, above, below, count, decided
from minigpt.studies.counts import gpt_neo_125m
from minigpt.studies.decoders import (
    DECODER,
    Rule,
    Tuning,
    load_decoder,
    sample,
    starts,
    token_ids,
    train_only,
)
from minigpt.studies.figures import (
    BOX,
    FROZEN,
    FULL,
    HATCHES,
    OTHERS,
    Figures,
    bar,
    curve,
    marks,
    smooth,
)
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import (
    differences,
    last_tenth,
    middle_half,
    over_seeds,
    ratios,
    successive_variance,
    variance_over_seeds,
)
from minigpt.studies.report import Report, Table, table
from minigpt.studies.training import Seconds, in_turn
from minigpt.studies.words import (
    enough,
    model_name,
    name,
    percent,
    ran_on,
    shown,
    side,
    weights,
)
from minigpt.training.snapshot import fingerprint
from minigpt.training.train import Row

TITLE = "Targeted freezing: query, key and value of the upper blocks"
SOURCES = {"model": "EleutherAI/gpt-neo-125m", "text": "Moby-Dick (Gutenberg 2701)"}
PUBLISHED: Mapping[str, Any] = {
    "steps": 474,
    "batch_size": 16,
    "sequence_length": 256,
    "lr": 5e-4,
    "weight_decay": 0.01,
    "popular": 100,
    "starts": 10,
    "tokens": 100,
}
ARMS = ("full", "frozen", "inverse")
NEAR = 0.05  # of what full training gained


@dataclass(frozen=True, kw_only=True)
class Settings(Tuning):
    """Of `minigpt study targeted-freezing`."""

    model: str = option(DECODER, "bundled")
    text: str = option("the text to learn from, UTF-8, or a bundled tale", CARROLL)
    seeds: int = option("runs of each model; verdicts need five", 2)
    steps: int = with_default(TrainingOptions, "steps", 60)
    batch_size: int = with_default(TrainingOptions, "batch_size", 8)
    sequence_length: int = with_default(TrainingOptions, "sequence_length", 128)
    lr: float = with_default(TrainingOptions, "lr", 5e-4)
    weight_decay: float = with_default(TrainingOptions, "weight_decay", 0.01)
    popular: int = option("how many of the text's most frequent tokens are popular", 100)
    starts: int = option("random start tokens", 10)
    tokens: int = option("tokens sampled after each start", 100)
    rounds: int = option("steps of each model whose time is taken, in turn", 15)


# --- runs ---------------------------------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """A run for each seed and model, and one part that takes times.

    Raises:
        ValueError: the model is no decoder or has no upper half, the text is too short, or a
            setting makes no sense.
    """
    decoder = settings.checked_decoder()
    if middle(decoder.model) == 0:
        raise ValueError(f"{settings.model} has one block: its upper half would be all of it")
    ids = token_ids(decoder, settings.text)
    popular_tokens(ids.tolist(), settings.popular)
    settings.windows(ids, 0)
    runs = [
        Part(f"{arm}-{seed}", run, (settings, arm, seed))
        for seed in range(settings.seeds)
        for arm in ARMS
    ]
    return [*runs, Part("time", times, (settings,))]


def middle(model: Model) -> int:
    """Number of the first block of the upper half."""
    return len(model.blocks) // 2


def rule(model: Model, arm: str) -> Rule:
    """Which parameters train."""
    pattern = re.compile(r"blocks\.(\d+)\.attention\.(query|key|value)\.\w+")

    def targeted(name: str) -> bool:
        match = pattern.fullmatch(name)
        return match is not None and int(match[1]) >= middle(model)

    rules: dict[str, Rule] = {
        "full": lambda name: True,
        "frozen": targeted,
        "inverse": lambda name: not targeted(name),
    }
    return rules[arm]


def run(folder: Path, settings: Settings, arm: str, seed: int) -> Result:
    """One model of one seed: losses, weight changes, and popular tokens before and after."""
    decoder = load_decoder(settings.model)
    model = decoder.model
    start = fingerprint(model.requires_grad_(False))
    tensors = train_only(model, rule(model, arm))
    ids = token_ids(decoder, settings.text)
    popular = popular_tokens(ids.tolist(), settings.popular)

    def p(seed: int) -> float:
        prompts = starts(ids, settings.starts, seed)
        return popular_share(sample(decoder, prompts, settings.tokens, seed), popular).value

    before, fresh = p(seed), p(1000 * (seed + 1) + ARMS.index(arm))
    key: Any = model.get_submodule(f"blocks.{middle(model)}.attention.key")
    rows = settings.tune(folder, decoder, ids, seed, [WeightChange(key.weight)])
    counts = peft_lite.report(model)
    return {
        "weights": decoder.weights,
        "start": start,
        "tensors": tensors,
        "trainable": counts.trainable,
        "total": counts.total,
        "block": middle(model),
        "loss": [row["loss"] for row in rows],
        "weight_change": [row["weight_change"] for row in rows],
        "seconds": sum(row["seconds"] for row in rows),
        "before": before,
        "fresh": fresh,
        "after": p(seed),
        "text": popular_share(ids.tolist(), popular).value,
    }


class WeightChange:
    """How far an update moves a weight: the Frobenius norm of W_t - W_(t-1), as `weight_change`."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight
        self.old: Tensor | None = None

    def before(self) -> Row:
        self.old = self.weight.detach().clone()
        return {}

    def after(self) -> Row:
        assert self.old is not None
        return {"weight_change": (self.weight.detach() - self.old).norm().item()}


def times(folder: Path, settings: Settings) -> Result:
    """Seconds of a step of each model, in turn."""
    sides = {}
    for arm in ARMS:
        decoder = load_decoder(settings.model)
        train_only(decoder.model, rule(decoder.model, arm))
        sides[arm] = settings.step(decoder, token_ids(decoder, settings.text))
    return {"seconds": in_turn(sides, settings.rounds)}


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The measured quantities behind the claims; a list has a value for each seed, or each round.

    Attributes:
        runs: model -> its runs, one a seed.
        seconds: model -> its steps, taken in turn.
        first: loss of the first batch, before any update.
        final: model -> final losses.
        norms: mean weight change of the frozen model over that of the full one.
        savings: r of each round.
        run_savings: r of the sums over the runs.
        weights: what the model's were rounded to, or "".
    """

    settings: Settings
    runs: Mapping[str, Sequence[Result]]
    seconds: Seconds
    first: list[float]
    final: Mapping[str, list[float]]
    norms: list[float]
    savings: list[float]
    run_savings: list[float]
    weights: str

    def gap(self, arm: str) -> Estimate:
        """Final loss less the full model's."""
        return over_seeds(differences(self.final[arm], self.final["full"]))

    def gain(self, arm: str) -> Estimate:
        """How far the loss fell."""
        return over_seeds(differences(self.first, self.final[arm]))

    def inverse_distance(self) -> list[float]:
        """How far the inverse ends from full training, as a share of what that gained."""
        gained = differences(self.first, self.final["full"])
        gap = differences(self.final["inverse"], self.final["full"])
        return [abs(ratio) for ratio in ratios(gap, gained)]

    def same_before(self) -> bool:
        """Whether, of each seed, all models write the same before training."""
        seeds = zip(*(self.runs[arm] for arm in ARMS), strict=True)
        return all(len({run["before"] for run in runs}) == 1 for runs in seeds)

    def range(self, field: str) -> tuple[float, float]:
        """The least and the largest p of all runs, in %."""
        values = [100 * run[field] for arm in ARMS for run in self.runs[arm]]
        return min(values), max(values)

    def popular(self, arm: str) -> dict[str, Estimate]:
        """P before and after and their difference, the tokens of all seeds taken together."""
        n, runs = self.settings.starts * self.settings.tokens, self.runs[arm]
        before, after = (
            share(round(sum(run[when] for run in runs) * n), n * len(runs))
            for when in ("before", "after")
        )
        return {"before": before, "after": after, "change": difference(after, before)}


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    """Raises ValueError where the models of a seed did not start from the same weights."""
    runs = {arm: [results[f"{arm}-{seed}"] for seed in range(settings.seeds)] for arm in ARMS}
    if len({run["start"] for arm in ARMS for run in runs[arm]}) > 1:
        raise ValueError("the models did not start from the same weights: nothing can be compared")
    seconds = results["time"]["seconds"]
    moved = {arm: [fmean(run["weight_change"]) for run in runs[arm]] for arm in ARMS}
    took = {arm: [run["seconds"] for run in runs[arm]] for arm in ARMS}
    return Measured(
        settings,
        runs,
        seconds,
        first=[run["loss"][0] for run in runs["full"]],
        final={arm: [last_tenth(run["loss"]) for run in runs[arm]] for arm in ARMS},
        norms=ratios(moved["frozen"], moved["full"]),
        # r = (T_full - T_frozen) / T_full
        savings=[1 - ratio for ratio in ratios(seconds["frozen"], seconds["full"])],
        run_savings=[1 - ratio for ratio in ratios(took["frozen"], took["full"])],
        weights=weights(results),
    )


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    numbers = {
        "final_loss": m.final,
        "first_loss": m.first,
        "weight_change_ratio": m.norms,
        "saving_in_turn": m.savings,
        "saving_of_runs": m.run_savings,
        "inverse_share": m.inverse_distance(),
    }
    return Report(TITLE, answer(m), tables(m), [*counts(), *findings(m)], numbers)


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    run = m.runs["frozen"][0]
    gap = m.gap("frozen")
    undecided = "which fell further is not decided"
    ways = ("full training fell further", "full training fell less far", undecided)
    further = side(gap, m.settings.seeds, *ways)
    same = "give the same samples" if m.same_before() else "give different samples"
    before, fresh = m.range("before"), m.range("fresh")
    return [
        f"After {m.settings.steps} batches of {name(m.settings.text)} the loss is "
        f"{fmean(m.final['frozen']):.3f} where only query, key and value of the upper blocks train "
        f"({100 * run['trainable'] / run['total']:.2f} % of the parameters) and "
        f"{fmean(m.final['full']):.3f} where everything does, from {fmean(m.first):.3f}: "
        f"{further}; the gap is {shown(gap)} nats a token.",
        f"With the rest frozen each step moves the key weight of block {run['block']} by "
        f"{shown(over_seeds(m.norms), '.2f')} times what it does in full training, and the saving "
        f"of time is r = {percent(over_seeds(m.savings))}.",
        f"With exactly those tensors frozen instead, the loss ends "
        f"{percent(over_seeds(m.inverse_distance()))} of full training's gain away from it; before "
        f"training the same weights {same} (p = {before[0]:.1f} to {before[1]:.1f} % over seeds), "
        f"while other starts each time move p from {fresh[0]:.1f} to {fresh[1]:.1f} %.",
    ]


def counts() -> list[Finding]:
    """What the rule picks in GPT-Neo-125M."""
    model, on = gpt_neo_125m(), "GPT-Neo-125M's config"
    total = peft_lite.report(model).total
    tensors = train_only(model, rule(model, "frozen"))
    frozen = peft_lite.report(model).trainable
    train_only(model, rule(model, "inverse"))
    inverse = peft_lite.report(model).trainable
    return [
        Finding(
            "freezing.count",
            f"{tensors} tensors, {frozen:,} parameters, {100 * frozen / total:.2f} %",
            count((tensors, frozen), (18, 10_616_832)),
            on,
        ),
        Finding(
            "freezing.inverse-count",
            f"{inverse:,} parameters, {100 * inverse / total:.2f} %",
            count(inverse, 114_581_760),
            on,
        ),
    ]


def findings(m: Measured) -> list[Finding]:
    """A verdict on each claim that is measured."""
    seeds, rounds = m.settings.seeds, len(m.savings)
    on = ran_on(m.settings.model, [m.settings.text], seeds, m.weights)
    gap, fall, norms = m.gap("frozen"), m.gain("frozen"), over_seeds(m.norms)
    saving, distance = over_seeds(m.savings), over_seeds(m.inverse_distance())
    before, fresh = m.range("before"), m.range("fresh")
    if not m.same_before():
        popular = "equal weights sample different tokens", decided("holds", seeds)
    else:
        span = f"{before[0]:.1f} to {before[1]:.1f} % over seeds, the same for all models"
        # 0 % tells nothing
        popular = span, decided("fails", seeds) if before[1] > 0 else "undecided"
    return [
        Finding("freezing.loss", f"{shown(gap)} nats a token further", above(gap, seeds), on),
        Finding(
            "freezing.loss-falls",
            f"{fmean(m.first):.3f} to {fmean(m.final['frozen']):.3f}, by {shown(fall)}",
            above(fall, seeds, quoted=3.78 - 2.65),
            on,
            "the quoted fall is GPT-Neo-125M's on Moby-Dick",
        ),
        Finding(
            "freezing.norm",
            f"{shown(norms, '.2f')} times as far",
            above(norms, seeds, 1),
            on,
            "mean over all steps",
        ),
        Finding(
            "freezing.time",
            percent(saving),
            above(saving, rounds, quoted=0.25),
            f"{model_name(m.settings.model, m.weights)}, in turn, {enough(rounds, 'round')}",
            "an interval over rounds, not seeds; sums over the runs: "
            + percent(over_seeds(m.run_savings)),
        ),
        Finding(
            "freezing.popular",
            *popular,
            on,
            "equal weights with equal starts give equal samples; with other starts each time p "
            f"is {fresh[0]:.1f} to {fresh[1]:.1f} %: the difference is that of the draws",
        ),
        Finding(
            "freezing.inverse-loss",
            f"{percent(distance)} of the gain apart",
            below(distance, seeds, NEAR),
            on,
            f"nearly: less than {100 * NEAR:g} % of what full training gained",
        ),
    ]


def tables(m: Measured) -> list[Table]:
    """Losses, costs and popular tokens."""
    first = {arm: m.runs[arm][0] for arm in ARMS}
    early = max(2, m.settings.steps // 5)

    def mean(arm: str, figure: Callable[[Result], float]) -> Estimate:
        return over_seeds([figure(run) for run in m.runs[arm]])

    def unsteadiness(arm: str, of: Callable[[Sequence[float]], float]) -> str:
        return shown(variance_over_seeds([of(run["loss"][:early]) for run in m.runs[arm]]), ".4f")

    return [
        table(
            "Losses in nats a token, means over seeds",
            "model",
            ARMS,
            {
                "final loss": lambda arm: shown(over_seeds(m.final[arm])),
                "fell by": lambda arm: shown(m.gain(arm)),
                "early variance": lambda arm: unsteadiness(arm, variance),
                "without trend": lambda arm: unsteadiness(arm, successive_variance),
            },
            f"Final: mean of the last tenth of the batches. Early variance: of the losses of the "
            f"first {early} batches; without trend: half the mean square of the differences "
            f"between neighbours, which a falling loss hardly raises.",
        ),
        table(
            "What trains, and seconds",
            "model",
            ARMS,
            {
                "tensors": lambda arm: f"{first[arm]['tensors']}",
                "parameters that train": lambda arm: f"{first[arm]['trainable']:,}",
                "share": lambda arm: f"{100 * first[arm]['trainable'] / first[arm]['total']:.2f} %",
                "sum over a run": lambda arm: shown(mean(arm, lambda run: run["seconds"]), ".1f"),
                "a step in turn, median": lambda arm: f"{median(m.seconds[arm]):.3f}",
            },
        ),
        table(
            "Share of popular tokens in %",
            "model",
            ARMS,
            {
                "before": lambda arm: percent(m.popular(arm)["before"], ""),
                "after": lambda arm: percent(m.popular(arm)["after"], ""),
                "change, tokens together": lambda arm: percent(m.popular(arm)["change"], ""),
                "change, by seeds": lambda arm: percent(
                    mean(arm, lambda run: run["after"] - run["before"]), ""
                ),
                "fresh": lambda arm: percent(mean(arm, lambda run: run["fresh"]), ""),
            },
            f"The text itself: {100 * first['full']['text']:.1f} %. Before and after: the same "
            "starts and random numbers for all models. Fresh: before training too, but with other "
            "starts and random numbers for each model, as in the write-up: how far p moves by "
            "chance.",
        ),
    ]


# --- figures ------------------------------------------------------------------------------------

STYLES = {"full": FULL, "frozen": FROZEN, "inverse": OTHERS[0]}
LABELS = {
    "full": "full: everything trains",
    "frozen": "frozen: only q, k, v of the upper blocks train",
    "inverse": "inverse: only those are frozen",
}


def draw(m: Measured, figures: Figures) -> None:
    """All figures; lines are those of the first seed."""
    first = {arm: m.runs[arm][0] for arm in ARMS}
    draw_losses(first["full"]["loss"], first["frozen"]["loss"], figures)
    draw_popular(m, figures)
    with figures.add(
        "weight_change.png",
        f"Change of the key weight of block {first['full']['block']} in each step, of the first "
        "seed.",
        width=10,
    ) as axes:
        for arm in ("full", "frozen"):
            curve(axes, first[arm]["weight_change"], STYLES[arm], LABELS[arm])
        axes.set(xlabel="batch", ylabel="Frobenius norm of W_t - W_(t-1)", ylim=(0, None))
        axes.legend()
    draw_times(m, figures)
    with figures.add(
        "inverse.png",
        "Losses less full training's on the same batch, mean of five batches, of the first seed: "
        "on the line a model learns as the full one does.",
        width=10,
    ) as axes:
        axes.axhline(0, color="black", linewidth=0.8)
        for arm in ("frozen", "inverse"):
            gaps = differences(first[arm]["loss"], first["full"]["loss"])
            curve(axes, smooth(gaps, 5), STYLES[arm], LABELS[arm])
        axes.set(xlabel="batch", ylabel="loss - full's loss (nats a token)")
        axes.legend()


def draw_losses(full: list[float], frozen: list[float], figures: Figures) -> None:
    """Loss lines, and the frozen model's loss against the full one's."""
    caption = (
        "Loss of each batch, before its update, of the first seed. Right: a mark below the line "
        "is a batch on which full training has the lower loss."
    )
    with figures.add("losses.png", caption, 10, 4.2, ncols=2) as (left, right):
        curve(left, full, FULL, LABELS["full"])
        curve(left, frozen, FROZEN, LABELS["frozen"])
        left.set(xlabel="batch", ylabel="loss (nats a token)")
        left.legend()
        ends = [min(*full, *frozen), max(*full, *frozen)]
        right.plot(ends, ends, color="black", linewidth=0.8, label="y = x")
        right.scatter(frozen, full, s=14, **marks(FROZEN), label="one batch")
        right.set(xlabel="loss, frozen (nats a token)", ylabel="loss, full (nats a token)")
        right.set_aspect("equal", adjustable="datalim")
        right.legend()


def draw_popular(m: Measured, figures: Figures) -> None:
    """Shares of popular tokens before and after, and their change."""
    caption = (
        "Share of popular tokens among the sampled ones, all seeds together, with 95 % intervals "
        "(Wilson; Newcombe for the difference; tokens taken as independent)."
    )
    bars = {arm: m.popular(arm) for arm in ARMS}
    text, sides = m.runs["full"][0]["text"], (("before", -0.2, 0.45), ("after", 0.2, 1.0))
    grid = {"ncols": 2, "width_ratios": (3, 2)}
    with figures.add("popular.png", caption, 10, 4.2, **grid) as (left, right):
        for i, arm in enumerate(ARMS):
            style = {"color": STYLES[arm]["color"], "hatch": HATCHES[i]}
            for when, shift, alpha in sides:
                bar(left, i + shift, bars[arm][when], alpha=alpha, **style)
                left.text(i + shift, 0.02, when, ha="center", fontsize="small", **BOX)
            bar(right, i, bars[arm]["change"], **style)
        left.axhline(text, color="black", linestyle=":", label="the text itself")
        highest = max(text, *(bars[arm][when].high for arm in ARMS for when, *_ in sides))
        left.set(ylabel="p, share of popular tokens", ylim=(0, 1.2 * highest))
        left.legend()
        right.axhline(0, color="black", linewidth=0.8)
        right.set(ylabel="Delta p = p after - p before")
        for axes in (left, right):
            axes.set_xticks(range(len(ARMS)), ARMS)


def draw_times(m: Measured, figures: Figures) -> None:
    """Seconds of the runs, and of a step taken in turn."""
    caption = (
        "Left: sums over the steps of a run, mean over seeds; the runs came one after another, so "
        "that what else the machine did is in them. Right: steps of the three models taken in "
        "turn, median and quartiles."
    )
    with figures.add("times.png", caption, width=10, ncols=2) as (left, right):
        for i, arm in enumerate(ARMS):
            style = {"color": STYLES[arm]["color"], "hatch": HATCHES[i], "edgecolor": "black"}
            left.bar(i, fmean(run["seconds"] for run in m.runs[arm]), 0.6, **style)
            middle, low, high = middle_half(m.seconds[arm])
            right.bar(i, middle, 0.6, **style)
            right.errorbar(i, middle, [[middle - low], [high - middle]], color="black", capsize=4)
        saving = percent(over_seeds(m.savings))
        left.set(ylabel="seconds of a run, sum over its steps")
        right.set(ylabel="seconds of a step", title=f"frozen against full: r = {saving}")
        for axes in (left, right):
            axes.set_xticks(range(len(ARMS)), ARMS)
