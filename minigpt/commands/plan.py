"""`minigpt plan`: what a training step will need, before anything is downloaded.

    minigpt plan --model llama.json --quantize nf4 --checkpoint-activations --card h100
    minigpt plan --model bundled --method full --batch-size 32

Only config.json is read.  The memory of each process stands part by part, then FLOPs and seconds of
a step, and with `--memory` the largest batch that fits.  Without `--card` the plan is for the
machine it runs on, where operations of the step run for five seconds; with it, for a GPU, from its
published figures.
"""

import re
from dataclasses import dataclass

import torch

from minigpt.checkpoints.source import FORMS
from minigpt.commands.command import Query
from minigpt.models.config import nearest, positive
from minigpt.objectives.registry import OBJECTIVES
from minigpt.plan import memory, speed
from minigpt.plan.plan import DTYPES, Planned, Step, largest_batch, planned
from minigpt.plan.trace import Trace
from minigpt.settings.methods import MethodOptions
from minigpt.settings.options import option, with_default
from minigpt.settings.training import MOST_TOKENS, TrainingOptions
from minigpt.training.memory import map_large_blocks, resident
from minigpt.training.parallel import WAYS
from peft_lite.quantized import CODECS

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
         "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip
CALIBRATION = 5.0  # seconds


@dataclass(frozen=True, kw_only=True)
class PlanOptions(MethodOptions):
    """The command's settings."""

    model: str = option(f"a model, or its config as a .json file: {FORMS}")
    quantize: str | None = option("hold the linear layers but the head in 4 bits", None, CODECS)
    dtype: str = option("of weights that are not in 4 bits", "float32", tuple(DTYPES))
    objective: str = option("clm: a decoder; mlm: an encoder", "clm", tuple(OBJECTIVES))
    batch_size: int = with_default(
        TrainingOptions, "batch_size", 8, "windows in a batch, each process"
    )
    sequence_length: int = with_default(TrainingOptions, "sequence_length", 128)
    accumulate: int = with_default(TrainingOptions, "accumulate", 1)
    bf16: bool = with_default(TrainingOptions, "bf16", False)
    paged: bool = with_default(TrainingOptions, "paged", False)
    checkpoint_activations: bool = option("less memory, more time", False)
    gpus: int = option("processes, each with a GPU", 1)
    parallel: str = option("how they share the work", "none", WAYS)
    card: str | None = option(
        "plan for this GPU, from its published figures (default: for this machine)",
        None,
        tuple(speed.GPUS),
    )
    memory: str | None = option("say the largest batch that fits, as in 24GB", None)

    def __post_init__(self) -> None:
        positive(self, "batch_size", "sequence_length", "accumulate", "gpus")
        if self.batch_size * self.sequence_length * self.accumulate > MOST_TOKENS:
            raise ValueError(
                f"batch_size, sequence_length and accumulate make "
                f"{self.batch_size * self.sequence_length * self.accumulate:,} tokens a step, "
                f"must be at most {MOST_TOKENS:,}"
            )
        if self.gpus > 1 and self.parallel == "none":
            raise ValueError(f"--gpus {self.gpus} share no work: --parallel must be ddp or fsdp")
        if self.parallel != "none" and self.gpus == 1:
            raise ValueError(f"--parallel {self.parallel} needs --gpus of at least 2")
        if self.memory is not None:
            parse_bytes(self.memory)

    @property
    def step(self) -> Step:
        """The step that is planned."""
        return Step(
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            objective=self.objective,
            accumulate=self.accumulate,
            bf16=self.bf16,
            paged=self.paged,
            parallel=self.parallel,
            processes=self.gpus,
        )


def parse_bytes(text: str) -> int:
    """Bytes of a text such as 24GB (10^9) or 80GiB (2^30).

    Raises:
        ValueError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    if match is None or unit not in UNITS or not float(match[1]):
        names = "KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise ValueError(
            f"--memory is {text[:40]!r}, must be a number of bytes or of {names}, such as 24GB"
            f"{nearest(unit, UNITS) if match else ''}"
        )
    return round(float(match[1]) * UNITS[unit])


def plan(settings: PlanOptions) -> None:
    """Prints the plan; no weight is read."""
    room = None if settings.memory is None else parse_bytes(settings.memory)
    here = settings.card is None and not torch.cuda.is_available()
    before = resident() if here else None
    there = planned(
        settings.model,
        settings,
        settings.dtype,
        settings.quantize,
        settings.objective,
        settings.checkpoint_activations,
    )
    step = settings.step
    traced = there.trace(step)
    parts = there.memory(step, traced, before)
    print(memory_table(there, parts, settings.gpus))
    print(work_table(there, step, traced))
    if here and there.packed:
        map_large_blocks()  # as the run will
    print(time_table(there, step, traced, settings.card))
    if room is not None:
        print(batch_line(largest_batch(there, step, room, before, most(step)), room, step))


def most(step: Step) -> int:
    """The largest batch that a step may have."""
    return MOST_TOKENS // (step.sequence_length * step.accumulate)


def memory_table(there: Planned, parts: dict[str, int], processes: int) -> str:
    """Bytes by part, and beside them what is not at the peak."""
    each = "of each process" if processes > 1 else "of the process"
    lines = [f"memory {each} at the peak of a step"]
    lines += [line(name, size_text(size)) for name, size in parts.items() if size]
    lines.append(line("in all", size_text(sum(parts.values()))))
    if there.loading:
        loading = there.loading + there.sizes.weights + parts.get(memory.LIBRARIES, 0)
        lines.append(line("in all, while it loads", size_text(loading)))
    if caches := there.caches():
        lines.append(line("caches of a sample, after it", size_text(caches)))
    return "\n".join(lines)


def work_table(there: Planned, step: Step, traced: Trace) -> str:
    """FLOPs counted and by formula, and what the backward pass finds."""
    flops = dict.fromkeys((speed.PRODUCT, speed.ATTENTION, speed.OTHER), 0)
    for op, count in traced.operations.items():
        flops[speed.kind(op)] += count * speed.flops(op)
    sent = there.work(step, traced).sent
    lines = [
        "\na step",
        line("FLOPs of products", f"{flops[speed.PRODUCT]:.3g}"),
        line("by 6 N and 4 N a token", f"{there.formula_flops(step):.3g}"),
        line("FLOPs of attention", f"{flops[speed.ATTENTION]:.3g}"),
        line("kept for backward", size_text(traced.kept)),
        line("a GPT's, with scores, 16 bits", size_text(there.formula_activations(step))),
        line("tokens, each process", f"{step.tokens * step.accumulate:,}"),
    ]
    if sent:
        lines.append(line("each process sends", size_text(sent)))
    return "\n".join(lines)


def time_table(there: Planned, step: Step, traced: Trace, card: str | None) -> str:
    """Seconds by part, and how they are known."""
    work = there.work(step, traced)
    if card is not None:
        gpu = speed.GPUS[card]
        parts = speed.published(work, gpu)
        how = (
            f"by the data sheet of {gpu.source}, assuming {speed.U_FLOPS:.0%} of its FLOP/s and "
            f"{speed.U_BYTES:.0%} of its bandwidth"
        )
    else:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        parts = speed.calibrated(work, CALIBRATION, device)
        how = f"as operations run here for {CALIBRATION:g} seconds"
        if work.sent:
            how += "; without what processes send each other"
    lines = [f"\nseconds of a step, {how}"]
    lines += [line(name, f"{value:.3g} s") for name, value in parts.items() if value]
    total = sum(parts.values())
    lines.append(line("in all", f"{total:.3g} s"))
    tokens = step.tokens * step.accumulate * step.processes
    lines.append(line("tokens a second", f"{tokens / total:,.0f}"))
    return "\n".join(lines)


def batch_line(largest: int, room: int, step: Step) -> str:
    """What fits."""
    if not largest:
        return f"\nnot even a batch of 1 fits {size_text(room)}"
    bound = ", the most that a step may have" if largest == most(step) else ""
    return f"\nthe largest batch that fits {size_text(room)}: {largest:,}{bound}"


def line(name: str, value: str) -> str:
    return f"  {name:<28} {value:>12}"


def size_text(size: int) -> str:
    """Bytes to three digits."""
    for unit in ("GB", "MB", "KB"):
        if size >= UNITS[unit]:
            value = size / UNITS[unit]
            return f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
    return f"{size} B"


COMMAND = Query(PlanOptions, plan)
