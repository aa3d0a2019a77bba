"""Write-up 001: what is saved, and what forgotten, when attention and embeddings are frozen?

    theta_i <- theta_i - eta AdamW(g)_i    for i in T;    all other theta_i stay, to the bit

    full        T is everything
    intended    T is all but the attention of the blocks and the embeddings: MLPs and norms
    literal     the write-up's own test on the checkpoint's names, `"attn" in name or "embed" in
                name` is frozen

GPT-Neo's checkpoints call its embeddings `wte` and `wpe`.  The literal test misses them in silence:
of 125,198,592 parameters it trains 96,877,824, the intended rule 56,707,584.  Llama's call them
`embed_tokens`: there both rules pick the same, and the literal one has no run of its own.

One model for each of two texts.  Both are held against both sets of popular tokens (the 100 most
frequent tokens of a text that are longer than two characters):

    p(model, set)    share of sampled tokens in the set, before and after
    p(text, set)     the same of the text itself, which an imitator approaches

Forgetting is the rise of the loss on the text the model was pretrained on.  Where that text is not
at hand, the untouched model writes one itself, x ~ p_0; the rise of the loss on it estimates

    E_x [log p_0(x) - log p(x)] / T = KL(p_0 || p) / T

Inference is "not slower" when the interval of the ratio of times lies below 1.05.

As published: AdamW 5e-5, neither schedule nor clipping, 476 batches of 16 random windows of 256
tokens of Alice (Gutenberg 11) or Poe's second volume (Gutenberg 2148).

What differs: several seeds; full tuning beside it, which the claims compare with; memory, times and
the check that frozen tensors stay are measured, each in a process of its own.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

import peft_lite
from minigpt.data.tales import CARROLL, POE
from minigpt.data.text import Batch, consecutive_windows
from minigpt.generation import generate
from minigpt.metrics.intervals import Estimate, share
from minigpt.metrics.popular_tokens import longer_than, popular_share, popular_tokens
from minigpt.models.architecture import Model
from minigpt.objectives.causal import language_model_loss
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies.claims import Finding, above, below, count, decided
from minigpt.studies.counts import gpt_neo_125m
from minigpt.studies.decoders import (
    DECODER,
    Decoder,
    Rule,
    Tuning,
    load_decoder,
    sample,
    starts,
    token_ids,
    train_only,
)
from minigpt.studies.figures import BOX, FROZEN, FULL, HATCHES, OTHERS, Figures, bar, curve
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import differences, last_tenth, over_seeds, ratios
from minigpt.studies.report import Report, Table, table
from minigpt.studies.training import Step, in_turn
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
from minigpt.training import memory
from minigpt.training.snapshot import fingerprint
from minigpt.training.train import evaluate

TITLE = "Partial fine-tuning: attention and embeddings frozen"
SOURCES = {
    "model": "EleutherAI/gpt-neo-125m",
    "text": "Alice (Gutenberg 11)",
    "text2": "Poe's second volume (Gutenberg 2148)",
}
PUBLISHED: Mapping[str, Any] = {
    "steps": 476,
    "batch_size": 16,
    "sequence_length": 256,
    "lr": 5e-5,
    "popular": 100,
}
RULES = ("full", "intended", "literal")
TEXTS = ("text", "text2")
WHEN = ("before", "after")
LONGER = 2  # characters of a token that may be popular
WINDOWS = 16  # windows of a text that a loss is measured on
MEASURED_STEPS = 3  # whose peak memory is taken
SLOWER = 1.05  # times the untouched model's time
QUOTED_MEMORY = (0.25, 0.30)


@dataclass(frozen=True, kw_only=True)
class Settings(Tuning):
    """Of `minigpt study partial-freezing`."""

    model: str = option(DECODER, "bundled")
    text: str = option("the first text, UTF-8, or a bundled tale", CARROLL)
    text2: str = option("the second text", POE)
    pretraining_text: str | None = option(
        "what the model was pretrained on (default: what the untouched model writes)", None
    )
    seeds: int = option("runs of each model; verdicts need five", 2)
    steps: int = with_default(TrainingOptions, "steps", 40)
    batch_size: int = with_default(TrainingOptions, "batch_size", 8)
    sequence_length: int = with_default(TrainingOptions, "sequence_length", 128)
    lr: float = with_default(TrainingOptions, "lr", 3e-4)
    weight_decay: float = with_default(TrainingOptions, "weight_decay", 0.01)
    popular: int = option("how many of a text's most frequent tokens are popular", 100)
    starts: int = option("random start tokens", 10)
    tokens: int = option("tokens sampled after each start", 100)
    rounds: int = option("measurements of each time, in turn", 11)

    @property
    def names(self) -> dict[str, str]:
        """Of the two texts."""
        return {text: name(getattr(self, text)) for text in TEXTS}

    @property
    def pretraining_name(self) -> str:
        """Of the text that stands for the pretraining data."""
        if self.pretraining_text is None:
            return "the untouched model's own writing"
        return name(self.pretraining_text)


# --- runs ---------------------------------------------------------------------------------------


def parts(settings: Settings) -> list[Part]:
    """A run for each seed, text and rule that picks a set of its own (the literal one on the first
    text only), and parts that take memory and times.

    Raises:
        ValueError: the model is no decoder, a text is too short, or a setting makes no sense.
    """
    decoder = settings.checked_decoder()
    for ids in both_texts(decoder, settings).values():
        popular_set(decoder, ids, settings)
        settings.windows(ids, 0)
    if settings.pretraining_text is not None:
        some_windows(token_ids(decoder, settings.pretraining_text), settings)
    arms = own_sets(decoder.model)
    runs = [
        Part(f"{arm}-{text}-{seed}", run, (settings, arm, text, seed))
        for seed in range(settings.seeds)
        for text in TEXTS
        for arm in arms
        if (arm, text) != ("literal", "text2")
    ]
    memories = [
        Part(f"memory-{arm}-{seed}", peak_memory, (settings, arm))
        for seed in range(settings.seeds)
        for arm in arms
    ]
    times = [Part("time", step_times, (settings, arms)), Part("inference", inference, (settings,))]
    return [*runs, *memories, *times]


def rule(model: Model, arm: str) -> Rule:
    """Which parameters train."""
    rules: dict[str, Rule] = {
        "full": lambda name: True,
        "intended": lambda name: not (".attention." in name or name.startswith("embeddings.")),
        "literal": lambda name: not re.search("attn|embed", model.names.to_hf(name)),
    }
    return rules[arm]


def own_sets(model: Model) -> list[str]:
    """The rules, without the literal one where it picks what the intended one picks."""
    names = [name for name, _ in model.named_parameters()]
    intended, literal = (rule(model, arm) for arm in ("intended", "literal"))
    differs = any(intended(name) != literal(name) for name in names)
    return [arm for arm in RULES if arm != "literal" or differs]


def both_texts(decoder: Decoder, settings: Settings) -> dict[str, Tensor]:
    """Token ids of the two texts."""
    return {text: token_ids(decoder, getattr(settings, text)) for text in TEXTS}


def popular_set(decoder: Decoder, ids: Tensor, settings: Settings) -> set[int]:
    """The popular tokens of a text."""
    longer = longer_than(LONGER, decoder.tokenizer.decode)
    return popular_tokens(ids.tolist(), settings.popular, longer)


def some_windows(ids: Tensor, settings: Settings) -> list[Batch]:
    """The first windows of a text, side by side."""
    ids = ids[: WINDOWS * settings.sequence_length + 1]
    return list(consecutive_windows(ids, settings.sequence_length, settings.batch_size))


def pretraining_windows(
    decoder: Decoder, texts: Mapping[str, Tensor], settings: Settings
) -> list[Batch]:
    """The first windows of the pretraining text, or what the model itself writes after tokens of
    the two texts, drawn from the whole of its distribution: the same for all runs.
    """
    if settings.pretraining_text is not None:
        return some_windows(token_ids(decoder, settings.pretraining_text), settings)
    prompts = starts(torch.cat([*texts.values()]), WINDOWS, 0).to(decoder.device)
    random = torch.Generator(decoder.device).manual_seed(0)
    tokens = settings.sequence_length - 1
    ids = generate(decoder.model, prompts, tokens, generator=random).cpu()
    written = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    size = settings.batch_size
    return [{k: v[i : i + size] for k, v in written.items()} for i in range(0, WINDOWS, size)]


def run(folder: Path, settings: Settings, arm: str, text: str, seed: int) -> Result:
    """One model tuned on one text: losses on all texts and popular tokens of both, before and
    after; and how far tensors moved.
    """
    decoder = load_decoder(settings.model)
    model = decoder.model
    tensors = train_only(model, rule(model, arm))
    frozen = fingerprint(model)
    texts = both_texts(decoder, settings)
    windows = {name: some_windows(ids, settings) for name, ids in texts.items()}
    windows["pretraining"] = pretraining_windows(decoder, texts, settings)
    sets = {name: popular_set(decoder, ids, settings) for name, ids in texts.items()}
    prompts = starts(torch.cat([*texts.values()]), settings.starts, seed)

    def p(ids: list[int]) -> dict[str, float]:
        return {name: popular_share(ids, popular).value for name, popular in sets.items()}

    def measured() -> Result:
        losses = {name: evaluate(model, language_model_loss, w) for name, w in windows.items()}
        return {"popular": p(sample(decoder, prompts, settings.tokens, seed)), "loss": losses}

    before = measured()
    rows = settings.tune(folder, decoder, texts[text], seed)
    counts = peft_lite.report(model)
    return {
        "weights": decoder.weights,
        "tensors": tensors,
        "trainable": counts.trainable,
        "total": counts.total,
        "loss": [row["loss"] for row in rows],
        "seconds": sum(row["seconds"] for row in rows),
        "before": before,
        "after": measured(),
        "texts": {name: p(ids.tolist()) for name, ids in texts.items()},
        "frozen_to_the_bit": fingerprint(model) == frozen,
        **moved(decoder, settings.model),
    }


def moved(decoder: Decoder, source: str) -> Result:
    """Distance of the tensors from where they started: the largest of the frozen ones (None if
    none is frozen), the least of the trained ones.
    """
    start = dict(load_decoder(source).model.named_parameters())
    distance = {
        name: (p.detach() - start[name].detach()).norm().item()
        for name, p in decoder.model.named_parameters()
    }
    trains = {name for name, p in decoder.model.named_parameters() if p.requires_grad}
    frozen = [d for name, d in distance.items() if name not in trains]
    return {
        "frozen_moved": max(frozen, default=None),
        "trained_moved": min(distance[name] for name in trains),
    }


def peak_memory(folder: Path, settings: Settings, arm: str) -> Result:
    """Bytes: the peak of a few steps above the memory of the process before the model, and the
    state of the optimizer.
    """
    if torch.cuda.is_available():
        torch.cuda.init()  # from here on the GPU's bytes are counted
    before = memory.resident()
    step = stepper(load_decoder(settings.model), settings, arm)
    for _ in range(MEASURED_STEPS):
        step()
    states = step.optimizer.state.values()
    state = sum(value.nbytes for entries in states for value in entries.values() if value.dim())
    return {"peak": memory.peak() - before, "optimizer": state}


def step_times(folder: Path, settings: Settings, arms: Sequence[str]) -> Result:
    """Seconds of a step under each rule, in turn."""
    sides = {arm: stepper(load_decoder(settings.model), settings, arm) for arm in arms}
    return {"seconds": in_turn(sides, settings.rounds)}


def inference(folder: Path, settings: Settings) -> Result:
    """Seconds of sampling from the untouched model and from a tuned one, in turn.  A few updates
    are enough: the tensors of a model do not depend on their number.
    """
    untouched, tuned = (load_decoder(settings.model) for _ in range(2))
    step = stepper(tuned, settings, "intended")
    for _ in range(MEASURED_STEPS):
        step()
    prompts = starts(token_ids(untouched, settings.text), settings.starts, 0)
    seconds = in_turn(
        {
            "untouched": lambda: sample(untouched, prompts, settings.tokens, 0),
            "tuned": lambda: sample(tuned, prompts, settings.tokens, 0),
        },
        settings.rounds,
    )
    shapes = [{n: t.shape for n, t in d.model.state_dict().items()} for d in (untouched, tuned)]
    return {"seconds": seconds, "same_tensors": shapes[0] == shapes[1]}


def stepper(decoder: Decoder, settings: Settings, arm: str) -> Step:
    """Steps on the first text."""
    train_only(decoder.model, rule(decoder.model, arm))
    return settings.step(decoder, token_ids(decoder, settings.text))


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The parts' results, and the measured quantities behind the claims: a list has a value for
    each seed, or for each round.
    """

    settings: Settings
    parts: Mapping[str, Result]

    @property
    def model(self) -> str:
        """Its name, with what its weights were rounded to."""
        return model_name(self.settings.model, weights(self.parts))

    @property
    def rules(self) -> list[str]:
        """Those that have runs."""
        return [arm for arm in RULES if f"{arm}-text-0" in self.parts]

    @property
    def tuned(self) -> list[tuple[str, str]]:
        """The models: rule and text tuned on."""
        pairs = [(arm, text) for text in TEXTS for arm in RULES]
        return [(arm, text) for arm, text in pairs if f"{arm}-{text}-0" in self.parts]

    def runs(self, arm: str, text: str) -> list[Result]:
        """One result a seed."""
        return [self.parts[f"{arm}-{text}-{seed}"] for seed in range(self.settings.seeds)]

    def memory(self, field: str, arm: str) -> list[int]:
        """Bytes, one figure a seed."""
        return [self.parts[f"memory-{arm}-{seed}"][field] for seed in range(self.settings.seeds)]

    def relative_memory(self, arm: str) -> list[float]:
        """Peak over full tuning's."""
        return ratios(self.memory("peak", arm), self.memory("peak", "full"))

    def relative_time(self, arm: str) -> list[float]:
        """Of a step, one ratio a round."""
        seconds = self.parts["time"]["seconds"]
        return ratios(seconds[arm], seconds["full"])

    def inference(self) -> list[float]:
        """Tuned over untouched, one ratio a round."""
        seconds = self.parts["inference"]["seconds"]
        return ratios(seconds["tuned"], seconds["untouched"])

    def rises(self, arm: str, on: str) -> list[float]:
        """Change of a loss by tuning, one a seed, mean of a rule's two models; `on` is "own",
        "other" or "pretraining".
        """
        by_text = []
        for text, other in (TEXTS, TEXTS[::-1]):
            which = {"own": text, "other": other}.get(on, on)
            runs = self.runs(arm, text)
            by_text.append(
                [run["after"]["loss"][which] - run["before"]["loss"][which] for run in runs]
            )
        return [fmean(both) for both in zip(*by_text, strict=True)]

    def less_forgotten(self) -> list[float]:
        """Nats a token by which full tuning forgets more."""
        return differences(self.rises("full", "pretraining"), self.rises("intended", "pretraining"))

    def gained(self, arm: str) -> float:
        """Nats a token that the loss falls by on the text that is learned."""
        return -fmean(self.rises(arm, "own"))

    def own_set(self) -> list[float]:
        """How much more a model uses its own text's popular tokens than the other model does."""
        differences = []
        for runs in zip(*(self.runs("intended", text) for text in TEXTS), strict=True):
            p, p2 = (run["after"]["popular"] for run in runs)
            differences.append((p["text"] - p2["text"] + (p2["text2"] - p["text2"])) / 2)
        return differences

    def frozen_stayed(self) -> bool:
        """Whether no run moved a frozen tensor by a bit, and every one moved all it trains."""
        return all(
            run["frozen_to_the_bit"] and not run["frozen_moved"] and run["trained_moved"] > 0
            for arm, text in self.tuned
            for run in self.runs(arm, text)
        )

    def popular(self, text: str, when: str, of: str) -> Estimate:
        """P(model tuned on `text`, set of `of`): the sampled tokens of all seeds together."""
        n = self.settings.starts * self.settings.tokens
        shares = [run[when]["popular"][of] for run in self.runs("intended", text)]
        return share(round(sum(shares) * n), n * len(shares))


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    return Measured(settings, results)


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    rules = m.rules[1:]
    numbers = {
        "relative_memory": {arm: m.relative_memory(arm) for arm in rules},
        "relative_time": {arm: m.relative_time(arm) for arm in rules},
        "inference": m.inference(),
        "less_forgotten": m.less_forgotten(),
        "own_set": m.own_set(),
    }
    return Report(TITLE, answer(m), tables(m), [*counts(), *findings(m)], numbers)


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    intended = m.runs("intended", "text")[0]
    memory = over_seeds([1 - ratio for ratio in m.relative_memory("intended")])
    time = over_seeds([1 - ratio for ratio in m.relative_time("intended")])
    less, own_set = over_seeds(m.less_forgotten()), over_seeds(m.own_set())
    seeds = m.settings.seeds
    forgets = side(less, seeds, "less is", "more is", "it is not decided whether less is")
    model = side(own_set, seeds, "A model", "A model", "It is not decided whether a model")
    uses = side(own_set, seeds, "more", "less", "more")
    stayed = "no frozen tensor moved by a bit" if m.frozen_stayed() else "frozen tensors moved"
    by_name = "by the literal name test as well"
    if "literal" in m.rules:
        literal = m.runs("literal", "text")[0]
        trains = f"{100 * literal['trainable'] / literal['total']:.1f} %"
        by_name = f"by the literal name test {trains}, for it misses the embeddings"
    return [
        f"With attention and embeddings frozen "
        f"{100 * intended['trainable'] / intended['total']:.1f} % of the parameters train "
        f"({by_name}), training takes {percent(memory)} less memory and a step "
        f"{percent(time)} less time; {stayed}.",
        f"On {m.settings.pretraining_name} {forgets} forgotten than by full tuning: its loss "
        f"rises by {shown(less)} nats a token more with full tuning, which gained "
        f"{m.gained('full'):.3f} on the text it learned against {m.gained('intended'):.3f}.",
        f"{model} uses the popular tokens of its own text {uses} than the model tuned on the other "
        f"text does, a difference of {percent(own_set)} of the tokens it writes; writing takes "
        f"{shown(over_seeds(m.inference()))} times as long as with the untouched model.",
    ]


def counts() -> list[Finding]:
    """What the rules pick in GPT-Neo-125M."""
    model, on = gpt_neo_125m(), "GPT-Neo-125M's config"
    train = {}
    for arm in RULES:
        train_only(model, rule(model, arm))
        train[arm] = peft_lite.report(model).trainable
    full, intended, literal = train.values()
    saved = 100 * (1 - intended / full)
    return [
        Finding(
            "partial.count",
            f"{intended:,} of {full:,}, {saved:.1f} % fewer",
            count(round(intended / 1e6), 65),
            on,
            "attention, wte and wpe frozen",
        ),
        Finding(
            "partial.literal",
            f"it trains {literal:,}, the intended rule {intended:,}",
            count(literal, intended),
            on,
            "the embeddings are called wte and wpe: neither name has 'embed' in it",
        ),
        Finding(
            "partial.optimizer",
            f"{saved:.1f} % fewer bytes",
            count(round(10 * saved), 547),
            on,
            "two numbers a trained parameter",
        ),
    ]


def findings(m: Measured) -> list[Finding]:
    """A verdict on each claim that is measured."""
    settings, seeds, rounds = m.settings, m.settings.seeds, m.settings.rounds
    on = ran_on(settings.model, [settings.text, settings.text2], seeds, weights(m.parts))
    timed = f"{m.model}, in turn, {enough(rounds, 'round')}"
    memory = over_seeds([1 - ratio for ratio in m.relative_memory("intended")])
    time = over_seeds([1 - ratio for ratio in m.relative_time("intended")])
    less, own_set = over_seeds(m.less_forgotten()), over_seeds(m.own_set())
    writing = over_seeds(m.inference())
    quoted = min(max(memory.value, QUOTED_MEMORY[0]), QUOTED_MEMORY[1])  # the nearest of the range
    same = m.parts["inference"]["same_tensors"]
    if m.frozen_stayed():
        stayed, kept = "no frozen tensor moved by a bit, every trained one moved", "holds"
    else:
        stayed, kept = "a frozen tensor moved, or a trained one did not", "fails"
    return [
        Finding(
            "partial.memory",
            f"{percent(memory)} less",
            above(memory, seeds, quoted=quoted),
            on,
            f"peak of {settings.batch_size} x {settings.sequence_length} tokens a step",
        ),
        Finding(
            "partial.time",
            f"{percent(time)} less",
            above(time, rounds),
            timed,
            "an interval over rounds, not seeds",
        ),
        Finding(
            "partial.forgetting",
            f"full tuning forgets {shown(less)} nats a token more",
            above(less, seeds),
            on,
            f"on {settings.pretraining_name}; on the text it learned full tuning gained "
            f"{m.gained('full'):.3f}, the frozen model {m.gained('intended'):.3f}",
        ),
        Finding(
            "partial.inference",
            f"{shown(writing)} times the untouched model's time",
            below(writing, rounds, SLOWER),
            timed,
            f"not slower: below {SLOWER} times; "
            + ("no tensor was added" if same else "the tuned model has other tensors"),
        ),
        Finding("partial.frozen", stayed, decided(kept, seeds), on, "looked at in all runs"),
        Finding(
            "partial.own-set",
            f"{percent(own_set)} of the tokens more",
            above(own_set, seeds),
            on,
            "mean of the two texts",
        ),
    ]


def tables(m: Measured) -> list[Table]:
    """Costs, losses, and the cross measure of popular tokens."""
    first, names = {arm: m.runs(arm, "text")[0] for arm in m.rules}, m.settings.names

    def moved(arm: str) -> str:
        distance = first[arm]["frozen_moved"]
        return "none frozen" if distance is None else f"{distance:g}"

    costs = table(
        "What trains, what it costs, what moved",
        "rule",
        m.rules,
        {
            "train": lambda arm: f"{first[arm]['trainable']:,}",
            "share, %": lambda arm: f"{100 * first[arm]['trainable'] / first[arm]['total']:.1f}",
            "optimizer, MB": lambda arm: f"{m.memory('optimizer', arm)[0] / 1e6:.2f}",
            "peak, MB": lambda arm: shown(
                over_seeds([peak / 1e6 for peak in m.memory("peak", arm)]), ".1f"
            ),
            "seconds a step": lambda arm: f"{median(m.parts['time']['seconds'][arm]):.3f}",
            "frozen moved": moved,
            "trained moved": lambda arm: f"{first[arm]['trained_moved']:.2g}",
        },
        "Peak: above what the process held before the model. Seconds: median, in turn. Moved: norm "
        "of the difference to the start, the most of a frozen tensor, the least of a trained one.",
    )
    losses = []
    for arm, text in m.tuned:
        runs, cells = m.runs(arm, text), [f"{arm}, {names[text]}"]
        for on in (*TEXTS, "pretraining"):
            before, after = (fmean(r[when]["loss"][on] for r in runs) for when in WHEN)
            cells.append(f"{before:.3f} to {after:.3f}")
        last = [last_tenth(run["loss"]) for run in runs]
        losses.append([*cells, shown(over_seeds(last))])
    popular = [
        [
            names[text],
            names[of],
            *(percent(m.popular(text, when, of), "") for when in WHEN),
            f"{100 * first['intended']['texts'][text][of]:.2f}",
        ]
        for of in TEXTS
        for text in TEXTS
    ]
    return [
        costs,
        Table(
            "Losses before and after, nats a token, means over seeds",
            ["rule, tuned on", *names.values(), "pretraining", "last batches"],
            losses,
            f"On the first windows of each text, without dropout; pretraining: on "
            f"{m.settings.pretraining_name}. The last tenth of the batches: with dropout.",
        ),
        Table(
            "Share of popular tokens in %, attention and embeddings frozen",
            ["tuned on", "popular tokens of", "before", "after", "the text tuned on"],
            popular,
            "The text tuned on: the share in that text itself, the ceiling of an imitator.",
        ),
    ]


# --- figures ------------------------------------------------------------------------------------

Bars = Mapping[str, Callable[[str], Estimate]]  # name of a group -> height of a rule's bar
STYLES = {"full": FULL, "intended": FROZEN, "literal": OTHERS[0]}
LABELS = {
    "full": "full: everything trains",
    "intended": "intended: attention and embeddings frozen",
    "literal": "literal: the name test, embeddings train",
}


def draw(m: Measured, figures: Figures) -> None:
    """All figures."""
    draw_losses(m, figures)
    draw_popular(m, figures)
    draw_costs(m, figures)
    draw_forgetting(m, figures)


def draw_losses(m: Measured, figures: Figures) -> None:
    """Loss lines, one panel for each text."""
    caption = "Loss of each batch, before its update, of the first seed."
    with figures.add("losses.png", caption, 10, ncols=2, sharey=True) as panels:
        for axes, text in zip(panels, TEXTS, strict=True):
            for arm in (arm for arm, tuned_on in m.tuned if tuned_on == text):
                curve(axes, m.runs(arm, text)[0]["loss"], STYLES[arm], LABELS[arm])
            axes.set(xlabel="batch", title=f"tuned on {m.settings.names[text]}")
        panels[0].set_ylabel("loss (nats a token)")
        panels[0].legend()


def draw_popular(m: Measured, figures: Figures) -> None:
    """The cross measure: a panel for each set, a pair of bars for each model."""
    names, texts = m.settings.names, m.runs("full", "text")[0]["texts"]
    caption = (
        "Share of popular tokens among those sampled from the models with attention and embeddings "
        "frozen, all seeds together, 95 % intervals. Dotted: the share in the text that the model "
        "was tuned on, which an imitator approaches."
    )
    with figures.add("popular.png", caption, 10, 4.2, ncols=2, sharey=True) as panels:
        for axes, of in zip(panels, TEXTS, strict=True):
            for i, text in enumerate(TEXTS):
                style = {"color": FROZEN["color"], "hatch": HATCHES[i]}
                for when, shift, alpha in (("before", -0.2, 0.4), ("after", 0.2, 1.0)):
                    bar(axes, i + shift, m.popular(text, when, of), alpha=alpha, **style)
                    axes.text(i + shift, 0.004, when, ha="center", fontsize="small", **BOX)
                ceiling = texts[text][of]
                axes.plot([i - 0.45, i + 0.45], [ceiling] * 2, color="black", linestyle=":")
            axes.set_xticks(range(len(TEXTS)), [f"tuned on {names[text]}" for text in TEXTS])
            axes.set_title(f"popular tokens of {names[of]}")
        panels[0].set_ylabel("p, share of popular tokens")


def draw_costs(m: Measured, figures: Figures) -> None:
    """The costs of the rules over full tuning's."""
    caption = (
        "Costs against full tuning's, at the line. Memory above what the process held before the "
        "model, mean over seeds; time of steps in turn, mean over rounds; 95 % intervals."
    )
    trains = {arm: m.runs(arm, "text")[0]["trainable"] for arm in m.rules}
    state = {arm: m.memory("optimizer", arm)[0] for arm in m.rules}
    costs: Bars = {
        "parameters that train": lambda arm: exact(trains[arm] / trains["full"]),
        "optimizer's state": lambda arm: exact(state[arm] / state["full"]),
        "peak memory": lambda arm: over_seeds(m.relative_memory(arm)),
        "time of a step": lambda arm: over_seeds(m.relative_time(arm)),
    }
    with figures.add("costs.png", caption, width=10) as axes:
        bars(axes, costs, m.rules[1:])
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(ylabel="times that of full tuning", ylim=(0, 1.3))
        axes.legend(ncols=2, loc="upper left")


def draw_forgetting(m: Measured, figures: Figures) -> None:
    """How much the losses changed on each text."""
    caption = (
        "Change of the loss by tuning, both models of a rule together, mean over seeds with 95 % "
        "intervals: above the line something was forgotten, below it learned."
    )
    rises: Bars = {
        "the text tuned on": lambda arm: over_seeds(m.rises(arm, "own")),
        "the other text": lambda arm: over_seeds(m.rises(arm, "other")),
        m.settings.pretraining_name: lambda arm: over_seeds(m.rises(arm, "pretraining")),
    }
    with figures.add("forgetting.png", caption, width=10) as axes:
        bars(axes, rises, ("full", "intended"))
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylabel="loss after - before (nats a token)")
        axes.legend()


def exact(value: float) -> Estimate:
    return Estimate(value, value, value)


def bars(axes: Any, groups: Bars, arms: Sequence[str]) -> None:
    """Bars side by side for each group, one of each rule."""
    for i, height in enumerate(groups.values()):
        for k, arm in enumerate(arms):
            style = {"color": STYLES[arm]["color"], "hatch": HATCHES[RULES.index(arm)]}
            label = LABELS[arm] if i == 0 else None
            bar(axes, i + 0.38 * (k - (len(arms) - 1) / 2), height(arm), label=label, **style)
    axes.set_xticks(range(len(groups)), list(groups))
