"""Write-up 004: what does fine-tuning on weights of 4 bits cost, and what does it save?

    y = x deq(W)^T + b + s (x A^T) B^T        W in 4 bits, frozen; A (r, in) and B (out, r) train

The write-up reports QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): weights in NF4,
their scales in 8 bits (double quantization), LoRA on every linear layer.

A decoder learns a text with LoRA on frozen weights in float32, bfloat16, NF4 without and with
double quantization, and in two other codes of 4 bits; an encoder learns sentiment on those in
float32 and in NF4 alone, since a classifier takes many more steps.  In all codes 64 numbers share a
scale a, the largest magnitude among them, and each is the nearest a c_k:

    FP4     a sign, two bits of exponent, one of mantissa: +- 0, 1/16, 2, 3, 4, 6, 8, 12, over 12
    int4    evenly spaced: -7, -6, ..., 7, over 7

The tables are bitsandbytes'.  NF4 weights are held in 4 bits, all others in 32.  On NF4 the decoder
also learns with LoRA on attention alone, of the same rank and with as many parameters, and from the
starts LoftQ and QPiSSA, which know what 4 bits lost.

Measured are the held-out loss and the encoder's accuracy.  Runs of one seed see the same batches in
the same order, and are paired.  4 bits "cost little" when they take less than 5 % of what
fine-tuning gains in float32 (of accuracy: above chance), with the whole interval.

Memory: the peak of a few steps above that of the process before, on a larger encoder: of one review
a step, where weights outweigh activations, and of a whole batch.  That the optimizer's state is
paged out of a GPU, QLoRA's fourth part, is not measured: there is no GPU here.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import peft_lite
from minigpt.checkpoints.directory import load
from minigpt.data.tales import CARROLL
from minigpt.data.text import Batch, RandomWindows, consecutive_windows
from minigpt.metrics.intervals import Estimate, mean
from minigpt.models.architecture import Model
from minigpt.models.config import positive
from minigpt.objectives.causal import language_model_loss
from minigpt.objectives.classify import ShuffledExamples, classification_loss, new_modules, score
from minigpt.settings.checks import check_heldout
from minigpt.settings.options import option, with_default
from minigpt.settings.training import TrainingOptions
from minigpt.studies.claims import Finding, above, all_of, below, count
from minigpt.studies.decoders import DECODER, check_positions, load_decoder, split_ids
from minigpt.studies.encoders import Encoder, check_encoder, data_name, load_encoder, read_rows
from minigpt.studies.figures import FROZEN, FULL, HATCHES, Figures, bar
from minigpt.studies.lab import Part, Result
from minigpt.studies.paired import differences, ratios
from minigpt.studies.report import Report, Table, table
from minigpt.studies.training import Step, at_least, learn
from minigpt.studies.words import moves, name, percent, ran_on, shown, weights
from minigpt.training import memory
from minigpt.training.train import Loss, TrainConfig, evaluate
from minigpt_kernels import nf4
from peft_lite.quantized import quantizable

TITLE = "LoRA on weights of 4 bits (write-up 004)"
# those of write-ups 001 and 002, since 004 names none; rank, alpha and rate are QLoRA's
SOURCES = {
    "model": "EleutherAI/gpt-neo-125m",
    "text": "Alice (Gutenberg 11)",
    "encoder": "bert-base-uncased",
    "data": "the IMDB reviews",
}
PUBLISHED = {
    "steps": 476,
    "encoder_steps": 300,
    "batch_size": 16,
    "sequence_length": 256,
    "rank": 64,
    "alpha": 16.0,
    "lr": 2e-4,
    "encoder_lr": 2e-4,
}
DENSE, PLAIN, NF4 = "float32", "NF4", "NF4-double"
BITS = {DENSE: 32.0, "bfloat16": 16.0, PLAIN: 4.5, NF4: 4.127, "FP4": 4.5, "int4": 4.5}
OTHER_CODES = ("FP4", "int4")
POSITIVE = tuple(x / 12 for x in (0.0625, 2, 3, 4, 6, 8, 12))
FP4 = (*(-x for x in reversed(POSITIVE)), 0.0, *POSITIVE)
INT4 = tuple(x / 7 for x in range(-7, 8))
ATTENTION = r".+\.attention\.\w+"
CHANCE = 0.5
MARGIN = 0.05  # of what fine-tuning gains
MEASURED_STEPS = 3  # whose peak memory is taken
LLAMA_65B = 65.2e9  # parameters


@dataclass(frozen=True)
class Arm:
    """How the frozen weights are kept, and the LoRA beside them.

    Attributes:
        weights: one of BITS.
        target: the layers of the LoRA.
        as_many: whether its rank grows until it trains as many parameters as on all layers.
        start: of the LoRA.
    """

    weights: str = NF4
    target: str = "all-linear"
    as_many: bool = False
    start: bool | str = True


FORMATS = {kept: Arm(kept) for kept in BITS}
STARTS = {"LoftQ": Arm(start="loftq"), "QPiSSA": Arm(start="pissa")}
ON_NF4 = {
    NF4: Arm(),
    "attention": Arm(target=ATTENTION),
    "attention-wide": Arm(target=ATTENTION, as_many=True),
    **STARTS,
}
ARMS = {
    "decoder": {**FORMATS, **ON_NF4},
    "encoder": {kept: FORMATS[kept] for kept in (DENSE, NF4)},
}
CODECS = {DENSE: None, NF4: "nf4"}  # whose memory is measured


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The study's settings."""

    model: str = option(DECODER, "bundled")
    text: str = option("the text to learn from, UTF-8, or a bundled tale", CARROLL)
    encoder: str = option('an encoder: a directory, a hub id, or "bundled-bert"', "bundled-bert")
    data: str = option(
        'folder with train and test, .jsonl or .csv, perhaps .gz; or "bundled"', "bundled"
    )
    memory_model: str = option("the encoder whose bytes and memory are measured", "minilm")
    seeds: int = option("runs of each arm; below five nothing is decided", 5)
    steps: int = with_default(TrainingOptions, "steps", 24)
    encoder_steps: int = option("updates of the encoder", 150)
    batch_size: int = with_default(TrainingOptions, "batch_size", 4)
    reviews: int = option("reviews in a batch", 16)
    sequence_length: int = option("tokens in a window, or of a review, the rest of it is cut", 96)
    heldout: float = with_default(TrainingOptions, "heldout", 0.2)
    rank: int = option("of LoRA", 8)
    alpha: float = option("of its scale s = alpha / rank", 16.0)
    lr: float = option("peak rate of the decoder", 5e-3)
    encoder_lr: float = option("peak rate of the encoder", 5e-3)

    @property
    def measured_rows(self) -> tuple[int, ...]:
        """Reviews of a step whose memory is measured."""
        return (1, self.reviews)

    def training(self, kind: str) -> TrainConfig:
        """How the decoder, or the encoder, trains."""
        decoder = kind == "decoder"
        steps = self.steps if decoder else self.encoder_steps
        rate = self.lr if decoder else self.encoder_lr
        return TrainConfig(steps, lr=rate, warmup_steps=steps // 10, snapshot_every=100)

    def lora(
        self, whole: Sequence[str], arm: Arm | None = None, rank: int | None = None
    ) -> peft_lite.LoraConfig:
        """The LoRA of an arm; its scale is the same at every rank.

        Args:
            whole: modules that train whole beside it.
        """
        arm, r = arm or Arm(), rank or self.rank
        alpha, saved = self.alpha * r / self.rank, list(whole) or None
        return peft_lite.LoraConfig(
            arm.target, r, alpha, modules_to_save=saved, init_lora_weights=arm.start
        )

    def with_reviews(self, source: str, seed: int, quantize: str | None = None) -> Encoder:
        """The encoder called `source` with a classifier of this seed, and the reviews."""
        rows = read_rows(self.data, None, None, seed)
        return load_encoder(source, rows, self.sequence_length, seed, quantize)


# --- weights ------------------------------------------------------------------------------------


def nearest_codes(w: Tensor, codes: Sequence[float], block: int = 64) -> Tensor:
    """Each number of a weight as a c_k; ties go down."""
    c = torch.tensor(codes, device=w.device)
    blocks = F.pad(w.flatten(), (0, -w.numel() % block)).view(-1, block)
    a = blocks.abs().amax(1, keepdim=True)
    # k = argmin |w_i / a - c_k|
    k = torch.bucketize(blocks * (1 / a.clamp(min=1e-38)), (c[:-1] + c[1:]) / 2)
    return (a * c[k]).flatten()[: w.numel()].view_as(w)


ROUNDED: Mapping[str, Callable[[Tensor], Tensor]] = {
    DENSE: lambda w: w,
    "bfloat16": lambda w: w.bfloat16().float(),
    "FP4": partial(nearest_codes, codes=FP4),
    "int4": partial(nearest_codes, codes=INT4),
}


def attach(model: Model, arm: Arm, settings: Settings, whole: Sequence[str] = ()) -> None:
    """Puts the linear layers into the arm's format, and its LoRA beside them.

    Args:
        whole: modules that train whole, and stay as they are.
    """
    skip, rank = ("head", *whole), settings.rank
    layers = quantizable(model, "nf4", skip)
    if arm.as_many:
        # r' (in + out) of attention's layers = r (in + out) of all
        sizes = {layer: sum(linear.weight.shape) for layer, linear in layers.items()}
        attention = sum(size for layer, size in sizes.items() if re.fullmatch(ATTENTION, layer))
        rank = round(rank * sum(sizes.values()) / attention)
    lora = settings.lora(whole, arm, rank)
    if arm.start is not True:
        peft_lite.attach_quantized(model, lora, skip=skip)
        return
    if arm.weights in ROUNDED:
        for layer in layers.values():
            layer.weight.data = ROUNDED[arm.weights](layer.weight.data)
    else:
        peft_lite.quantize(model, skip=skip, double=arm.weights == NF4)
    peft_lite.attach(model, lora)


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a model learns.

    Attributes:
        rows: in a batch.
        measure: figures on what is held out.
        whole: modules that are new, and train whole.
        weights: what the model's were rounded to in a .gguf file.
    """

    model: Model
    loss: Loss
    batches: Callable[[int], Batch]
    rows: int
    measure: Callable[[Model], dict[str, float]]
    whole: Sequence[str] = ()
    weights: str = ""


def of_decoder(settings: Settings, seed: int, device: str | None = None) -> Task:
    """The next tokens of a text."""
    length, size = settings.sequence_length, settings.batch_size
    decoder = load_decoder(settings.model, device)
    check_positions(decoder, length)
    learned, left = split_ids(decoder, settings.text, settings.heldout)
    batches = RandomWindows(learned, length, size, seed)
    heldout = list(consecutive_windows(left, length, size))

    def measure(model: Model) -> dict[str, float]:
        return {"loss": evaluate(model, language_model_loss, heldout)}

    rounded = decoder.weights
    return Task(decoder.model, language_model_loss, batches, size, measure, weights=rounded)


def of_encoder(settings: Settings, seed: int) -> Task:
    """Sentiment, by a classifier of this seed."""
    encoder = settings.with_reviews(settings.encoder, seed)
    batches = ShuffledExamples(encoder.train, settings.reviews, seed, encoder.pad)
    heldout = encoder.test_batches()

    def measure(model: Model) -> dict[str, float]:
        loss, accuracy = score(model, heldout)
        return {"loss": loss, "accuracy": accuracy.value}

    new = new_modules(encoder.model)
    return Task(encoder.model, classification_loss, batches, settings.reviews, measure, new)


TASKS = {"decoder": of_decoder, "encoder": of_encoder}


def parts(settings: Settings) -> list[Part]:
    """Both models and the memory of both formats for each seed, and the bytes of the weights."""
    positive(settings, "batch_size", "reviews", "sequence_length", "rank")
    at_least(settings, 2, "seeds")
    check_heldout(settings.heldout)
    for kind in TASKS:
        settings.training(kind)
    for encoder in (settings.encoder, settings.memory_model):
        check_encoder(encoder, settings.sequence_length)
    read_rows(settings.data, None, None, 0)
    attach(of_decoder(settings, 0, "cpu").model, Arm(), settings)
    seeds = range(settings.seeds)
    return [
        *(Part(f"{kind}-{seed}", run, (settings, kind, seed)) for kind in TASKS for seed in seeds),
        *(
            Part(f"memory-{kept}-{rows}-{seed}", peak_memory, (settings, codec, rows))
            for seed in seeds
            for rows in settings.measured_rows
            for kept, codec in CODECS.items()
        ),
        Part("weights", rounded_weights, (settings,)),
    ]


def run(folder: Path, settings: Settings, kind: str, seed: int) -> Result:
    """Trains every arm, and measures it before and after; a new classifier knows nothing before."""
    task, config = TASKS[kind](settings, seed), settings.training(kind)
    tokens = task.rows * settings.sequence_length
    result: Result = {"weights": task.weights, "before": {}, "after": {}, "trainable": {}}
    for key, arm in ARMS[kind].items():
        model = deepcopy(task.model)
        torch.manual_seed(seed)
        attach(model, arm, settings, task.whole)
        result["trainable"][key] = peft_lite.report(model).trainable
        if not task.whole:
            result["before"][key] = task.measure(model)
        torch.manual_seed(seed)  # of dropout: the same for all arms
        title = f"{kind}, {key}, seed {seed}"
        learn(folder / key, title, model, task.loss, task.batches, config, tokens)
        result["after"][key] = task.measure(model)
    return result


def peak_memory(folder: Path, settings: Settings, codec: str | None, rows: int) -> Result:
    """Bytes: the peak of a few steps of so many rows with LoRA, above the memory of the process
    before the model; and the model's parameters.
    """
    if torch.cuda.is_available():
        torch.cuda.init()  # from here on the GPU's bytes are counted
    memory.map_large_blocks()  # for both formats: what the heap keeps is not measured
    before = memory.resident()
    encoder = settings.with_reviews(settings.memory_model, 0, codec)
    model = encoder.model
    peft_lite.attach(model, settings.lora(new_modules(model)))
    batches = ShuffledExamples(encoder.train, rows, 0, encoder.pad)
    step = Step(model, classification_loss, batches, settings.training("encoder"))
    for _ in range(MEASURED_STEPS):
        step()
    return {"peak": memory.peak() - before, "bytes": peft_lite.report(model).total_bytes}


def rounded_weights(folder: Path, settings: Settings) -> Result:
    """Of the linear layers of the model whose memory is measured: parameters, bytes in NF4, and the
    error |W' - W| / |W| of each format.
    """
    layers = quantizable(load(settings.memory_model), "nf4").values()
    dense = [layer.weight.detach() for layer in layers]
    packed = {
        kept: [nf4.quantize(w, double=double) for w in dense]
        for kept, double in {PLAIN: False, NF4: True}.items()
    }
    rounded = {kept: [to(w) for w in dense] for kept, to in ROUNDED.items()}
    rounded |= {kept: [nf4.dequantize(q) for q in qs] for kept, qs in packed.items()}
    W = torch.cat([w.flatten() for w in dense])
    return {
        "parameters": len(W),
        "bytes": {kept: sum(q.nbytes for q in qs) for kept, qs in packed.items()},
        "error": {
            kept: ((torch.cat([w.flatten() for w in rounded[kept]]) - W).norm() / W.norm()).item()
            for kept in BITS
        },
    }


# --- measurements and claims --------------------------------------------------------------------


@dataclass(frozen=True)
class Learned:
    """What a model learned in each arm.

    Attributes:
        runs: the results, by seed.
        figure: "loss", or "accuracy", whose value before is chance.
    """

    runs: Sequence[Result]
    figure: str

    def of(self, arm: str, when: str = "after", figure: str = "") -> list[float]:
        """A figure by seed."""
        return [run[when][arm][figure or self.figure] for run in self.runs]

    def by_seed(self, arm: str, other: str = DENSE, when: str = "after") -> list[float]:
        """How much worse an arm is than another."""
        a, b = self.of(arm, when), self.of(other, when)
        return differences(a, b) if self.figure == "loss" else differences(b, a)

    def worse(self, arm: str, other: str = DENSE) -> Estimate:
        return mean(self.by_seed(arm, other))

    def before(self, arm: str) -> float:
        """How much worse than in float32 before fine-tuning, where seeds do not differ."""
        return fmean(self.by_seed(arm, when="before"))

    @property
    def gain(self) -> Estimate:
        """Of fine-tuning in float32."""
        after = self.of(DENSE)
        if self.figure == "accuracy":
            return mean([a - CHANCE for a in after])
        return mean(differences(self.of(DENSE, "before"), after))

    def little(self, n: int) -> str:
        """The verdict on the claim that 4 bits cost little."""
        margin = MARGIN * self.gain.value
        return below(self.worse(NF4), n, margin) if margin > 0 else "undecided"


@dataclass(frozen=True)
class Measured:
    """The figures of all parts.

    Attributes:
        memory: results of `peak_memory` by format and rows, then by seed.
        stored: that of `rounded_weights`.
        weights: what the decoder's were rounded to before.
    """

    settings: Settings
    decoder: Learned
    encoder: Learned
    memory: Mapping[tuple[str, int], Sequence[Result]]
    stored: Result
    weights: str = ""

    def bits(self, kept: str) -> float:
        """Bits a parameter; of NF4 as they were counted."""
        counted = self.stored["bytes"].get(kept)
        return BITS[kept] if counted is None else 8 * counted / self.stored["parameters"]

    @property
    def double(self) -> tuple[float, float]:
        """What double quantization saves: bits a parameter, GB of LLAMA_65B."""
        bits = self.bits(PLAIN) - self.bits(NF4)
        return bits, bits * LLAMA_65B / 8e9

    def peak(self, kept: str, rows: int) -> list[float]:
        """Bytes by seed."""
        return [result["peak"] for result in self.memory[kept, rows]]

    def relative_peak(self, rows: int) -> Estimate:
        """On 4 bits, over that in float32."""
        return mean(ratios(self.peak(NF4, rows), self.peak(DENSE, rows)))


def measure(settings: Settings, results: Mapping[str, Result]) -> Measured:
    def by_seed(part: str) -> list[Result]:
        return [results[f"{part}-{seed}"] for seed in range(settings.seeds)]

    return Measured(
        settings,
        Learned(by_seed("decoder"), "loss"),
        Learned(by_seed("encoder"), "accuracy"),
        {
            (kept, rows): by_seed(f"memory-{kept}-{rows}")
            for kept in CODECS
            for rows in settings.measured_rows
        },
        results["weights"],
        weights(results),
    )


def report(m: Measured) -> Report:
    """The answer, tables and verdicts."""
    numbers = {
        kind: {arm: learned.by_seed(arm) for arm in ARMS[kind]}
        for kind, learned in (("decoder", m.decoder), ("encoder", m.encoder))
    }
    return Report(TITLE, answer(m), tables(m), findings(m), {"worse than float32": numbers})


def answer(m: Measured) -> list[str]:
    """Three sentences."""
    decoder, encoder, n = m.decoder, m.encoder, m.settings.seeds
    wide = decoder.worse("attention-wide", NF4)
    starts = [f"from {s} it {moves(decoder.worse(s, NF4), n, ' nats')}" for s in STARTS]
    bits, gigabytes = m.double
    rows = m.settings.measured_rows
    peaks = " and ".join(f"{percent(m.relative_peak(r))} with {r}" for r in rows)
    return [
        f"In place of float32, NF4 with double quantization raises the decoder's held-out loss by "
        f"{decoder.before(NF4):.4f} nats a token before fine-tuning; after it, which gains "
        f"{decoder.gain}, the loss {moves(decoder.worse(NF4), n, ' nats')}, and the "
        f"encoder's accuracy changes by {accuracy(encoder)} ({n} seeds).",
        f"On 4 bits, with LoRA on attention alone in place of every linear layer, the loss "
        f"{moves(decoder.worse('attention', NF4), n, ' nats')}, with as many parameters there it "
        f"{moves(wide, n, ' nats')}; {' and '.join(starts)}.",
        f"On 4 bits LoRA on {name(m.settings.memory_model)} takes {peaks} reviews a step of "
        f"float32's memory ({n} processes); double quantization saves {bits:.3f} of "
        f"{m.bits(PLAIN):.3f} bits a parameter, {gigabytes:.2f} GB at {LLAMA_65B / 1e9:g} B "
        f"parameters.",
    ]


def accuracy(encoder: Learned) -> str:
    """What 4 bits do to it, in words."""
    change = mean([-x for x in encoder.by_seed(NF4)])
    return f"{percent(change, ' points')}, of {percent(encoder.gain, '')} above chance"


def findings(m: Measured) -> list[Finding]:
    """The verdicts.  A decoder whose weights were in 4 bits before decides nothing."""
    s, decoder, encoder = m.settings, m.decoder, m.encoder
    n, again = (0, "its weights were in 4 bits before; ") if m.weights else (s.seeds, "")
    on_text = ran_on(s.model, [s.text], s.seeds, m.weights)
    others = {code: decoder.worse(code, PLAIN) for code in OTHER_CODES}
    alone, wide = (decoder.worse(arm, NF4) for arm in ("attention", "attention-wide"))
    bits, gigabytes = m.double
    little = f"little: less than {100 * MARGIN:g} % of what fine-tuning gains in float32"
    return [
        Finding(
            "survey.double-quantization",
            f"{m.bits(PLAIN):.3f} - {m.bits(NF4):.3f} = {bits:.3f} bits a parameter, "
            f"{gigabytes:.2f} GB at {LLAMA_65B / 1e9:g} B",
            count((round(bits, 1), round(gigabytes)), (0.4, 3)),
            f"bytes of the linear layers of {name(s.memory_model)}",
            "equal to the digits quoted",
        ),
        Finding(
            "survey.qlora",
            f"{decoder.worse(NF4)} nats, of a gain of {decoder.gain}",
            decoder.little(n),
            on_text,
            f"{again}before fine-tuning {decoder.before(NF4):.4f} nats; {little}",
        ),
        Finding(
            "survey.qlora",
            f"accuracy changes by {accuracy(encoder)}",
            encoder.little(s.seeds),
            ran_on(s.encoder, [data_name(s.data)], s.seeds),
            little,
        ),
        Finding(
            "survey.nf4",
            ", ".join(f"{code} {gap} nats above NF4" for code, gap in others.items()),
            all_of([above(gap, n) for gap in others.values()]),
            on_text,
            f"{again}held-out loss after fine-tuning; each with a float32 scale for 64 numbers",
        ),
        Finding(
            "survey.all-linear",
            f"attention alone ends {alone} nats above",
            above(alone, n),
            on_text,
            f"{again}of the same rank; with as many parameters it ends {wide} above",
        ),
        *(
            Finding(
                "survey.memory",
                f"{percent(m.relative_peak(rows))} of float32's peak",
                below(m.relative_peak(rows), s.seeds, 1.0),
                ran_on(s.memory_model, [data_name(s.data)], s.seeds),
                f"a step of {rows} x {s.sequence_length} tokens",
            )
            for rows in s.measured_rows
        ),
    ]


def tables(m: Measured) -> list[Table]:
    """The formats, the LoRAs on 4 bits, and memory."""
    decoder, encoder, trains = m.decoder, m.encoder, m.decoder.runs[0]["trainable"]
    rows_of_a_step = m.settings.measured_rows

    def peak(rows: int, kept: str) -> str:
        return shown(mean([x / 1e6 for x in m.peak(kept, rows)]), ".1f")

    return [
        table(
            "The format of the frozen weights",
            "weights",
            FORMATS,
            {
                "bits a weight": lambda f: f"{m.bits(f):.4g}",
                "error of W, %": lambda f: f"{100 * m.stored['error'][f]:.3g}",
                "loss": lambda f: f"{mean(decoder.of(f))}",
                "above float32 before": lambda f: f"{decoder.before(f):.4f}",
                "and after": lambda f: f"{decoder.worse(f)}",
            },
            f"Error: |W' - W| / |W| of {name(m.settings.memory_model)}'s linear layers. Loss: held "
            "out, of the decoder after fine-tuning, nats a token; means over seeds with Student's "
            "interval, differences seed by seed.",
        ),
        table(
            "The encoder's accuracy after fine-tuning",
            "weights",
            ARMS["encoder"],
            {
                "accuracy, %": lambda f: percent(mean(encoder.of(f)), ""),
                "below float32": lambda f: percent(encoder.worse(f), ""),
                "loss": lambda f: f"{mean(encoder.of(f, figure='loss'))}",
            },
        ),
        table(
            "LoRA on 4 bits: the decoder's held-out loss, nats a token",
            "LoRA",
            ON_NF4,
            {
                "trains": lambda arm: f"{trains[arm]:,}",
                "before": lambda arm: f"{fmean(decoder.of(arm, 'before')):.4f}",
                "after": lambda arm: f"{mean(decoder.of(arm))}",
                f"above {NF4}": lambda arm: f"{decoder.worse(arm, NF4)}",
            },
            f"{NF4}: on every linear layer, from zero. All at one rate and for as many steps. "
            f"attention-wide: of a rank at which as many parameters train.",
        ),
        table(
            f"Memory of LoRA on {name(m.settings.memory_model)}, MB",
            "weights",
            CODECS,
            {
                "parameters": lambda kept: f"{m.memory[kept, 1][0]['bytes'] / 1e6:.1f}",
                **{f"peak, {rows} a step": partial(peak, rows) for rows in rows_of_a_step},
            },
            "Embeddings stay in float32. Peak: above what the process held before the model; "
            "interval over processes.",
        ),
    ]


# --- figures ------------------------------------------------------------------------------------


def draw(m: Measured, figures: Figures) -> None:
    """What the formats cost, and what another LoRA changes."""
    kept = [format for format in FORMATS if format != DENSE]
    before, after = {"color": FULL["color"]}, {"color": FROZEN["color"], "hatch": HATCHES[1]}
    with figures.add(
        "formats.png",
        "What a format of the weights costs the decoder against float32, before and after "
        "fine-tuning. Bars are 95 % intervals over seeds; dotted: 5 % of what fine-tuning gains.",
    ) as axes:
        for i, format in enumerate(kept):
            same = Estimate(m.decoder.before(format), -math.inf, math.inf)
            bar(axes, i - 0.2, same, label="before" if i == 0 else None, **before)
            bar(axes, i + 0.2, m.decoder.worse(format), label="after" if i == 0 else None, **after)
        axes.axhline(MARGIN * m.decoder.gain.value, color="black", linestyle=":")
        axes.set(ylabel="held-out loss above float32 (nats a token)")
        labelled(axes, kept)
        axes.legend()
    others = [arm for arm in ON_NF4 if arm != NF4]
    with figures.add(
        "lora.png",
        "Held-out loss of the decoder on weights of 4 bits above that of LoRA on every linear "
        "layer from zero. Bars are 95 % intervals over seeds.",
    ) as axes:
        for i, arm in enumerate(others):
            bar(axes, i, m.decoder.worse(arm, NF4), **after)
        axes.set(ylabel="loss above (nats a token)")
        labelled(axes, others)


def labelled(axes: Any, names: Sequence[str]) -> None:
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
