"""What the runs of partial freezing say (minigpt/studies/partial_freezing.py).

"Not slower" means: the interval of the ratio of times lies below 1.05.
"""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, median

from minigpt.metrics.intervals import Estimate
from minigpt.studies import partial_freezing_figures as figures
from minigpt.studies.claims import Finding, count, judge
from minigpt.studies.lab import Result
from minigpt.studies.partial_freezing import RULES, TEXTS, TITLE, Settings
from minigpt.studies.partial_freezing_measured import Measured, Shares, popularity
from minigpt.studies.report import Report, Table
from minigpt.studies.tuning import published_model, train_only, trainable
from minigpt.studies.words import name, over_seeds, percent, ran_on, shown, side

SLOWER = 1.05  # times the untouched model's time
QUOTED_MEMORY = (0.25, 0.30)


def report(settings: Settings, results: Mapping[str, Result], out: Path) -> Report:
    """Figures, tables and verdicts."""
    found = Measured(settings, results)
    names = {own: name(getattr(settings, own)) for own in TEXTS}
    first: dict[str, dict[str, Result]] = {own: {} for own in TEXTS}
    for arm, own in found.tuned():
        first[own][arm] = found.runs(arm, own)[0]
    one = first["text"]
    rules = ("intended", "literal")
    relative = {
        "parameters that train": {a: _exact(one[a]["trainable"] / one["full"]["trainable"])
                                  for a in rules},
        "optimizer's state": {a: _exact(found.memory("optimizer", a)[0]
                                        / found.memory("optimizer", "full")[0]) for a in rules},
        "peak memory": {a: over_seeds(found.relative_memory(a)) for a in rules},
        "time of a step": {a: over_seeds(found.relative_time(a)) for a in rules},
    }  # fmt: skip
    rises = {
        of: {arm: over_seeds(found.rises(arm, of)) for arm in ("full", "intended")}
        for of in ("own", "other", "pretraining")
    }
    labels = {"own": "the text tuned on", "other": "the other text", "pretraining": _text(settings)}
    folder = out / "figures"
    shares = popularity(found)
    drawn = [
        figures.losses(folder, first, list(names.values())),
        figures.popular(folder, shares, one["full"]["texts"], names),
        figures.costs(folder, relative),
        figures.forgetting(folder, rises, labels),
    ]
    return Report(
        TITLE,
        answer(found),
        drawn,
        [cost_table(found), loss_table(found), popular_table(found, shares)],
        findings(found),
        {
            "relative_memory": {arm: found.relative_memory(arm) for arm in rules},
            "relative_time": {arm: found.relative_time(arm) for arm in rules},
            "inference": found.inference(),
            "less_forgotten": found.less_forgotten(),
            "own_set": found.own_set(),
        },
    )


def answer(found: Measured) -> tuple[str, str, str]:
    """Three sentences."""
    intended, literal = (found.runs(arm, "text")[0] for arm in ("intended", "literal"))
    parts = [100 * r["trainable"] / r["total"] for r in (intended, literal)]
    memory = over_seeds([1 - ratio for ratio in found.relative_memory("intended")])
    time = over_seeds([1 - ratio for ratio in found.relative_time("intended")])
    less, own = over_seeds(found.less_forgotten()), over_seeds(found.own_set())
    gains = [-fmean(found.rises(arm, "own")) for arm in ("full", "intended")]
    forgets = side(
        less, 0, "less is forgotten than by full tuning", "more is forgotten than by full tuning",
        "it is not decided whether less is forgotten than by full tuning",
    )  # fmt: skip
    uses = side(
        own, 0, "A model uses the popular tokens of its own text more",
        "A model uses the popular tokens of its own text less",
        "It is not decided whether a model uses the popular tokens of its own text more",
    )  # fmt: skip
    stayed = "no frozen tensor moved by a bit" if found.frozen_stayed() else "frozen tensors moved"
    return (
        f"With attention and embeddings frozen {parts[0]:.1f} % of the parameters train (by the "
        f"literal name test {parts[1]:.1f} %, for it misses the embeddings), training takes "
        f"{percent(memory)} less memory and a step {percent(time)} less time; {stayed}.",
        f"On {_text(found.settings)} {forgets}: its loss rises by {shown(less)} nats a token more "
        f"with full tuning, which gained {gains[0]:.3f} on the text it learned against "
        f"{gains[1]:.3f}.",
        f"{uses} than the model tuned on the other text does, a difference of {percent(own)} of "
        f"the tokens it writes; writing takes {shown(over_seeds(found.inference()))} times as long "
        f"as with the untouched model.",
    )


def cost_table(found: Measured) -> Table:
    """Parameters, bytes, seconds."""
    rows = []
    for arm in RULES:
        one = found.runs(arm, "text")[0]
        peaks = over_seeds([peak / 1e6 for peak in found.memory("peak", arm)])
        seconds = median(found.parts["time"]["seconds"][arm])
        moved = "none frozen" if one["frozen_moved"] is None else f"{one['frozen_moved']:g}"
        rows.append(
            [
                arm,
                f"{one['trainable']:,}",
                f"{100 * one['trainable'] / one['total']:.1f}",
                f"{found.memory('optimizer', arm)[0] / 1e6:.2f}",
                shown(peaks, ".1f"),
                f"{seconds:.3f}",
                moved,
                f"{one['trained_moved']:.2g}",
            ]
        )
    columns = ("rule", "train", "share, %", "optimizer, MB", "peak, MB", "seconds a step")
    return Table(
        "What trains, what it costs, what moved",
        (*columns, "frozen moved", "trained moved"),
        rows,
        "Peak: above what the process held before the model. Seconds: median, in turn. Moved: norm "
        "of the difference to the start, the most of a frozen tensor, the least of a trained one.",
    )


def loss_table(found: Measured) -> Table:
    """Losses of each model on all texts."""
    texts = (*TEXTS, "pretraining")
    rows = []
    for arm, own in found.tuned():
        runs = found.runs(arm, own)
        cells = [f"{arm}, {name(getattr(found.settings, own))}"]
        for text in texts:
            before, after = (fmean(r[when]["loss"][text] for r in runs)
                             for when in ("before", "after"))  # fmt: skip
            cells.append(f"{before:.3f} to {after:.3f}")
        last = [fmean(r["loss"][-max(1, len(r["loss"]) // 10) :]) for r in runs]
        rows.append([*cells, shown(over_seeds(last))])
    names = [name(getattr(found.settings, own)) for own in TEXTS]
    return Table(
        "Losses before and after, nats a token, means over seeds",
        ("rule, tuned on", *names, "pretraining", "last batches"),
        rows,
        f"On the first windows of each text, without dropout; pretraining: on "
        f"{_text(found.settings)}. The last tenth of the batches: with dropout.",
    )


def popular_table(found: Measured, shares: Shares) -> Table:
    """The cross measure."""
    names = {own: name(getattr(found.settings, own)) for own in TEXTS}
    texts = found.runs("intended", "text")[0]["texts"]
    rows = [
        [
            names[own],
            names[chosen],
            percent(shares[chosen][own]["before"], ""),
            percent(shares[chosen][own]["after"], ""),
            f"{100 * texts[own][chosen]:.2f}",
        ]
        for chosen in TEXTS
        for own in TEXTS
    ]
    return Table(
        "Share of popular tokens in %, attention and embeddings frozen",
        ("tuned on", "popular tokens of", "before", "after", "the text tuned on"),
        rows,
        "The text tuned on: the share in that text itself, the ceiling of an imitator.",
    )


def findings(found: Measured) -> list[Finding]:
    """A verdict on each claim of write-up 001 that can be tested."""
    settings, n = found.settings, found.settings.seeds
    texts = [settings.text, settings.text2]
    on = ran_on(settings.model, texts, n)
    memory = over_seeds([1 - ratio for ratio in found.relative_memory("intended")])
    time = over_seeds([1 - ratio for ratio in found.relative_time("intended")])
    less, own = over_seeds(found.less_forgotten()), over_seeds(found.own_set())
    writing, rounds = over_seeds(found.inference()), len(found.inference())
    gains = [-fmean(found.rises(arm, "own")) for arm in ("full", "intended")]
    same = found.parts["inference"]["same_tensors"]
    timed = f"{name(settings.model)}, {rounds} rounds in turn"
    return [
        *counts(),
        Finding(
            "partial.memory", f"{percent(memory)} less",
            judge(memory, n, 0.0, above=True, quoted=_nearest(memory.value, QUOTED_MEMORY)), on,
            f"peak of {settings.batch_size} x {settings.sequence_length} tokens a step"),
        Finding(
            "partial.time", f"{percent(time)} less", judge(time, rounds, 0.0, above=True), timed,
            "an interval over rounds, not seeds"),
        Finding(
            "partial.forgetting", f"full tuning forgets {shown(less)} nats a token more",
            judge(less, n, 0.0, above=True), on,
            f"on {_text(settings)}; on the text it learned full tuning gained {gains[0]:.3f}, "
            f"the frozen model {gains[1]:.3f}"),
        Finding(
            "partial.inference", f"{shown(writing)} times the untouched model's time",
            judge(writing, rounds, SLOWER, above=False), timed,
            f"not slower: below {SLOWER} times; "
            + ("no tensor was added" if same else "the tuned model has other tensors")),
        Finding(
            "partial.frozen",
            "no frozen tensor moved by a bit, every trained one moved" if found.frozen_stayed()
            else "a frozen tensor moved, or a trained one did not",
            "holds" if found.frozen_stayed() else "fails", on, "counted over all runs"),
        Finding(
            "partial.own-set", f"{percent(own)} of the tokens more",
            judge(own, n, 0.0, above=True), on, "mean of the two texts"),
    ]  # fmt: skip


def counts() -> list[Finding]:
    """What the rules pick in GPT-Neo-125M."""
    model, on = published_model(), "GPT-Neo-125M's config"
    train = {}
    for arm, rule in RULES.items():
        train_only(model, rule)
        train[arm] = trainable(model)
    full, intended, literal = (train[arm] for arm in ("full", "intended", "literal"))
    saved = 100 * (1 - intended / full)
    return [
        Finding(
            "partial.count", f"{intended:,} of {full:,}, {saved:.1f} % fewer",
            count(round(intended / 1e6), 65), on, "attention, wte and wpe frozen"),
        Finding(
            "partial.literal",
            f"it trains {literal:,}, the intended rule {intended:,}",
            count(literal, intended), on,
            "the embeddings are called wte and wpe: neither name has 'embed' in it"),
        Finding(
            "partial.optimizer", f"{saved:.1f} % fewer bytes", count(round(10 * saved), 547), on,
            "two numbers a trained parameter"),
    ]  # fmt: skip


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value)


def _nearest(value: float, quoted: tuple[float, float]) -> float:
    """The value of a quoted range that lies nearest."""
    return min(max(value, quoted[0]), quoted[1])


def _text(settings: Settings) -> str:
    """What stands for the pretraining text."""
    given = settings.pretraining_text
    return "the untouched model's own writing" if given is None else name(given)
