"""What `minigpt plan` says against what a run then takes: peak memory and seconds of a step.

For each case one process plans from config.json, with five seconds of calibration, and another
loads the checkpoint, puts the method on it and makes some steps on random tokens.  The peak is the
system's (VmHWM), libraries included; seconds are the median of the steps after the first.  Where
weights are in 4 bits both give large freed blocks back, as `minigpt finetune --quantize` does.

    python -m benchmarks.plan                     -> results/plan.csv
    python -m benchmarks.plan --case bundled-full bundled-qlora
Without bfloat16 instructions neo-full-bf16 and neo-lora-narrow take an hour: name the others.
    columns: case, what the case is, predicted_bytes, peak_bytes, memory_error, predicted_seconds,
             seconds, time_error; an error is predicted / measured - 1
"""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import fresh, options, read, write_each
from minigpt import GPTNeo, GPTNeoConfig, TrainConfig, load, save
from minigpt.data.text import Batch
from minigpt.objectives.causal import language_model_loss
from minigpt.plan import speed
from minigpt.plan.plan import DTYPES, Step, planned
from minigpt.settings.methods import MethodOptions, attach
from minigpt.training import memory
from minigpt.training.train import checkpoint_activations, train
from tools import random_checkpoint

LR = 1e-4
MEMORY, TIME = 0.10, 0.25  # what an error is measured against
NEO, VISTRAL = "gpt-neo-125m", "vistral, 2 layers"  # random weights at these shapes


@dataclass(frozen=True)
class Case:
    """What is planned and measured."""

    model: str
    method: str
    batch: int
    length: int = 128
    dtype: str = "float32"
    bf16: bool = False  # autocast
    quantize: str | None = None
    checkpointed: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)  # options of the method

    @property
    def options(self) -> MethodOptions:
        return MethodOptions(method=self.method, **self.more)


ALL = {"target": ["all-linear"]}
CASES = {
    "bundled-full": Case("bundled", "full", 32),
    "bundled-lora": Case("bundled", "lora", 64),
    "bundled-qlora": Case("bundled", "lora", 64, quantize="nf4", more=ALL),
    "neo-full": Case(NEO, "full", 4),
    "neo-full-bf16": Case(NEO, "full", 4, bf16=True),
    "neo-freeze": Case(NEO, "freeze", 4),
    "neo-lora": Case(NEO, "lora", 4),
    "neo-lora-all": Case(NEO, "lora", 8, more=ALL),
    "neo-lora-checkpointed": Case(NEO, "lora", 8, checkpointed=True, more=ALL),
    "neo-lora-narrow": Case(NEO, "lora", 4, dtype="bfloat16"),
    "neo-qlora": Case(NEO, "lora", 4, quantize="nf4", more=ALL),
    "neo-dora": Case(NEO, "dora", 4),
    "neo-ia3": Case(NEO, "ia3", 4),
    "neo-bottleneck": Case(NEO, "bottleneck", 4),
    "neo-prefix": Case(NEO, "prefix", 4, length=256),
    "smollm2-lora": Case("smollm2", "lora", 4),
    "smollm2-full": Case("smollm2", "full", 2),
    "vistral-qlora": Case(
        VISTRAL, "lora", 1, 512, quantize="nf4", checkpointed=True, more={**ALL, "rank": 64}
    ),
}


def predict(source: str, case: Case) -> dict[str, float]:
    """Bytes and seconds by the plan.  Call it in a process of its own."""
    before = memory.resident()
    plan = planned(source, case.options, case.dtype, case.quantize, checkpointed=case.checkpointed)
    step = Step(
        batch_size=case.batch,
        sequence_length=case.length,
        bf16=case.bf16,
    )
    traced = plan.trace(step)
    parts = plan.memory(step, traced, before)
    loading = before + plan.sizes.weights + plan.loading if plan.loading else 0
    if plan.packed:
        memory.map_large_blocks()
    seconds = sum(speed.calibrated(plan.work(step, traced)).values())
    return {"bytes": max(sum(parts.values()), loading), "seconds": seconds}


def batch(case: Case, vocabulary: int, i: int) -> Batch:
    """Random tokens and their labels, a label for each."""
    random = torch.Generator().manual_seed(i)
    ids = torch.randint(vocabulary, (case.batch, case.length + 1), generator=random)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def measure(source: str, case: Case, steps: int) -> dict[str, float]:
    """Bytes and seconds of real steps.  Call it in a process of its own."""
    if case.quantize:
        memory.map_large_blocks()
    model = load(source, "causal-lm", dtype=DTYPES[case.dtype], quantize=case.quantize)
    attach(model, case.options)
    if case.checkpointed:
        checkpoint_activations(model.blocks)
    config = TrainConfig(steps, LR, schedule="constant", bf16=case.bf16)
    batches = partial(batch, case, model.config.vocab_size)
    rows = train(model, language_model_loss, batches, config)
    seconds = statistics.median(row["seconds"] for row in rows[1:])
    return {"bytes": memory.peak(), "seconds": seconds}


def compare(
    name: str, sources: Mapping[str, str], threads: int, steps: int
) -> list[dict[str, object]]:
    """The row of a case."""
    case = CASES[name]
    source = sources.get(case.model, case.model)
    said = fresh(threads, predict, source, case)
    was = fresh(threads, measure, source, case, steps)
    about = {n: getattr(case, n) for n in ("model", "method", "batch", "length", "dtype")}
    about |= {"bf16": case.bf16, "quantize": case.quantize or "", "checkpointed": case.checkpointed}
    return [
        {
            "case": name,
            **about,
            "predicted_bytes": said["bytes"],
            "peak_bytes": was["bytes"],
            "memory_error": round(said["bytes"] / was["bytes"] - 1, 4),
            "predicted_seconds": said["seconds"],
            "seconds": was["seconds"],
            "time_error": round(said["seconds"] / was["seconds"] - 1, 4),
        }
    ]


@contextmanager
def checkpoints(models: set[str]) -> Iterator[dict[str, str]]:
    """Folders of the models with random weights, by their names here."""
    with TemporaryDirectory() as folder:
        made = {}
        if NEO in models:
            torch.manual_seed(0)
            made[NEO] = str(Path(folder) / "neo")
            save(GPTNeo(GPTNeoConfig()), made[NEO])
        if VISTRAL in models:
            made[VISTRAL] = str(Path(folder) / "vistral")
            random_checkpoint.write(Path(made[VISTRAL]), 2)
        yield made


def worst(rows: list[dict[str, str]]) -> str:
    """The cases that a plan is furthest from, and how many are within the bounds."""
    lines = []
    for column, bound in (("memory_error", MEMORY), ("time_error", TIME)):
        row = max(rows, key=lambda row: abs(float(row[column])))
        within = sum(abs(float(row[column])) <= bound for row in rows)
        what = column.removesuffix("_error")
        lines.append(
            f"{what}: {within} of {len(rows)} within {bound:.0%}; "
            f"the worst is {row['case']}, {float(row[column]):+.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--case", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=6, help="steps of a process (default: 6)")
    given = parser.parse_args()
    if given.steps < 2:
        parser.error("--steps must be at least 2: the first is a warm-up")
    with checkpoints({CASES[name].model for name in given.case}) as sources:
        write_each(
            given.out / "plan.csv",
            given.threads,
            {
                name: partial(compare, name, sources, given.threads, given.steps)
                for name in given.case
            },
        )
    print(worst(read(given.out / "plan.csv")[1]))


if __name__ == "__main__":
    main()
