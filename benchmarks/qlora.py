"""QLoRA at the shape of a model of 7 billion parameters: seconds and memory, not quality.

Random weights in bfloat16 (tools/random_checkpoint.py) are loaded into 4 bits; LoRA of rank 64 on
every linear layer trains on random tokens, with activation checkpointing, in float32.

    whole         all 32 layers, ours alone, its optimizer's state paged: load, steps, the adapter
                  saved; then the run is cut off
    resumed       one step more of that run, in a new process: the folder is that of `whole`
    four layers   the first four layers, ours and transformers + bitsandbytes + peft in turn, each
                  time a new process: load, then some steps

Peak is the most main memory that a process held, mapped files included; `anonymous` what of it no
file backs, the most that was seen in samples of 20 ms.  Both sides give large freed blocks back to
the system (`memory.map_large_blocks`), as `minigpt finetune --quantize` does.

    python -m benchmarks.qlora --part whole --folder DIR    -> results/qlora.csv
    python -m benchmarks.qlora --part resumed --folder DIR  -> results/qlora_resumed.csv
    python -m benchmarks.qlora --part four-layers           -> results/qlora_four_layers.csv
    columns: what (load, step, resumed step, adapter), side, round, tokens, seconds, peak_bytes,
             anonymous_bytes
"""

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import peft_lite
from benchmarks.common import OURS, THEIRS, fresh, options, write_each
from minigpt import TrainConfig, load
from minigpt.data.text import IGNORED, Batch
from minigpt.objectives.causal import language_model_loss
from minigpt.training import memory
from minigpt.training.train import Row, checkpoint_activations, train
from peft_lite import LoraConfig
from tools import random_checkpoint

RANK, ALPHA, LR = 64, 16, 2e-4
PARTS = {
    "whole": (32, 256, "qlora.csv"),
    "resumed": (32, 256, "qlora_resumed.csv"),
    "four-layers": (4, 512, "qlora_four_layers.csv"),
}
SAMPLE = 0.02  # seconds

Rows = list[dict[str, object]]


class CutOff(Exception):
    """The end of a run that did not come to its end."""


class Anonymous:
    """The most anonymous memory of this process since it was made, sampled."""

    def __init__(self) -> None:
        self.most = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            found = re.search(r"RssAnon:\s+(\d+) kB", memory.STATUS.read_text())
            self.most = max(self.most, int(found[1]) * 1024 if found else 0)
            time.sleep(SAMPLE)


def batch(length: int, vocabulary: int, i: int) -> Batch:
    """Random tokens (1, length) and their labels."""
    ids = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(i))
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    return {"input_ids": ids, "labels": labels}


def row(what: str, side: str, tokens: int, seconds: float, watch: Anonymous) -> dict[str, object]:
    return {"what": what, "side": side, "round": 0, "tokens": tokens, "seconds": seconds,
            "peak_bytes": memory.peak(), "anonymous_bytes": watch.most}  # fmt: skip


def ours(
    directory: Path, length: int, steps: int, out: Path | None = None, resume: bool = False
) -> Rows:
    """Load and steps of this project.  With `out` the run is paged and keeps a snapshot of the step
    before the last, after which it is cut off; resumed, it goes on from there to one more step.
    """
    memory.map_large_blocks()
    watch = Anonymous()
    begin = time.perf_counter()
    model = load(directory, head="causal-lm", quantize="nf4")
    rows = [row("load", OURS, 0, time.perf_counter() - begin, watch)]
    handle = peft_lite.attach(model, LoraConfig("all-linear", r=RANK, lora_alpha=ALPHA))
    checkpoint_activations(model.blocks)

    def observe(measured: Row) -> None:
        what = "resumed step" if resume else "step"
        rows.append(row(what, OURS, length, measured["seconds"], watch))
        if out and not resume and measured["step"] == steps:
            raise CutOff

    paged = out is not None
    every = steps - 1 if paged else 0
    total = steps + 1 if paged else steps
    config = TrainConfig(total, LR, schedule="constant", snapshot_every=every, paged=paged)
    batches = partial(batch, length, model.config.vocab_size)
    with suppress(CutOff):
        train(model, language_model_loss, batches, config, out, resume=resume, observe=observe)
    if out is not None:
        begin = time.perf_counter()
        handle.save(out / "adapter")
        rows.append(row("adapter", OURS, 0, time.perf_counter() - begin, watch))
    return rows


def theirs(directory: Path, length: int, steps: int) -> Rows:
    """The same by transformers, bitsandbytes and peft."""
    transformers, peft = import_module("transformers"), import_module("peft")
    import_module("transformers.models.mistral.modeling_mistral")
    memory.map_large_blocks()
    watch = Anonymous()
    begin = time.perf_counter()
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantization, dtype=torch.float32
    )
    rows = [row("load", THEIRS, 0, time.perf_counter() - begin, watch)]
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
    )
    model = peft.get_peft_model(model, lora).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR)
    for i in range(steps):
        ids = batch(length, model.config.vocab_size, i)["input_ids"]
        begin = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rows.append(row("step", THEIRS, length, time.perf_counter() - begin, watch))
    return rows


def numbered(round: int, run: Callable[[], Rows]) -> Rows:
    """The rows of a process, with the number of its round; its first step is a warm-up."""
    rows = run()
    steps = [each for each in rows if each["what"] == "step"]
    return [{**each, "round": round} for each in rows if each not in steps[:1]]


@contextmanager
def checkpoint(layers: int, folder: Path | None, **shape: Any) -> Iterator[Path]:
    """A random checkpoint: in `folder`, where it stays and is taken again, or in one that goes."""
    with nullcontext(folder) if folder else TemporaryDirectory() as place:
        model = Path(place) / f"{layers}-layers" / "model"
        if not (model / random_checkpoint.INDEX).exists():
            random_checkpoint.write(model, layers, **shape)
        yield model


def main() -> None:
    parser = options(__doc__ or "", rounds=3)
    parser.add_argument("--part", choices=PARTS, required=True)
    parser.add_argument("--steps", type=int, default=11, help="steps of a process (default: 11)")
    parser.add_argument("--folder", type=Path, help="where 15 GB have room, and stay")
    given = parser.parse_args()
    if given.part != "four-layers" and given.folder is None:
        parser.error(f"--part {given.part} needs --folder: a part goes on where another stopped")
    layers, length, file = PARTS[given.part]

    def run(function: Callable[..., Rows], *arguments: Any, **named: Any) -> Rows:
        return fresh(given.threads, function, *arguments, **named)

    with checkpoint(layers, given.folder) as directory:
        measures: dict[str, Callable[[], Rows]] = {}
        out = directory.with_name("run")
        if given.part == "resumed" and not out.exists():
            parser.error(f"{out} does not exist: --part whole makes it")
        if given.part == "whole":
            measures["whole"] = lambda: numbered(
                1, lambda: run(ours, directory, length, given.steps, out)
            )
        elif given.part == "resumed":
            measures["resumed"] = lambda: run(
                ours, directory, length, given.steps, out, resume=True
            )
        else:
            for i in range(given.rounds):
                for side, function in ((OURS, ours), (THEIRS, theirs)):
                    measures[f"{side} {i}"] = partial(
                        numbered, i + 1, partial(run, function, directory, length, given.steps)
                    )
        write_each(given.out / file, given.threads, measures)


if __name__ == "__main__":
    main()
