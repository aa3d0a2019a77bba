"""Seconds and peak memory of a training step on a GPU: GPT-Neo-125M, batch 8 x 512, bf16.

LoRA over weights in bf16, ours with factors in fp32 as they are by default, HF PEFT's with factors
in bf16; full fine-tuning with weights in fp32 under autocast.  Sides: ours by each
route, `transformers` with `peft`, and that under torch.compile; each clips the norm
to 1 and updates by AdamW, ours by `ClippedAdamW`, theirs by torch's fused one.  They live in one
process, start from the same weights and take turns on the same batches; the losses must agree.

Seconds are those between two events around three steps, divided by three.  Peak memory is what
the allocator held at most in a step, less what it held before the side was built.

    python -m benchmarks.training_step_gpu        -> results/training_step_gpu.csv
    columns: method, side, round, seconds, loss, peak_bytes
"""

import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks import device as on
from benchmarks.common import THEIRS, checkpoint, fresh, options, write_each
from benchmarks.paper import OURS_FUSED, OURS_TORCH, OURS_TRITON
from benchmarks.routes import ROUTES
from benchmarks.sides import LR, METHODS, VOCABULARY, their_model
from benchmarks.training_step import check_trainable, copy_adapter
from minigpt import load
from minigpt.data.text import IGNORED
from minigpt.objectives.causal import language_model_loss
from minigpt.settings.methods import attach
from minigpt_kernels import ClippedAdamW, lora_linear

BATCH, LENGTH, BATCHES = 8, 512, 8
COMPILED = f"{THEIRS}, torch.compile"
SIDES = {
    "lora": (OURS_TRITON, OURS_TORCH, THEIRS, COMPILED, OURS_FUSED),
    "lora-all": (OURS_TRITON, OURS_TORCH, THEIRS, COMPILED, OURS_FUSED),
    "full": (OURS_TORCH, THEIRS, COMPILED),  # no LoRA product: one route
}
STEPS = 3  # in one measurement
TOLERANCE = 0.02  # relative difference of the losses: bf16

Step = Callable[[], Tensor]


def measure(
    directory: Path,
    method: str,
    rounds: int,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    size: tuple[int, int] = (BATCH, LENGTH),
    vocabulary: int = VOCABULARY,
) -> list[dict[str, object]]:
    """The rows of one method; the last four arguments are for tests."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (BATCHES, *size), generator=random).to(device)
    steps: dict[str, Step] = {}
    peaks: dict[str, int | str] = {}
    ours: tuple[nn.Module, dict[str, Tensor]] | None = None
    for side in SIDES[method]:
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        if side in ROUTES:
            model, state = our_model(directory, method, device, dtype)
            ours = ours or (model, state)
            steps[side] = our_step(model, ids, ROUTES[side], _autocast(method, device, dtype))
        else:
            assert ours is not None
            other = their_model(directory, method).to(device, _weights(method, dtype))
            check_trainable(ours[0], other)
            if ours[1]:
                copy_adapter(ours[1], other)
            run = torch.compile(other) if side == COMPILED else other
            steps[side] = their_step(other, run, ids, _autocast(method, device, dtype))
        for _ in range(STEPS):  # warm-up
            steps[side]()
        peaks[side] = _peak(steps[side], before) if device == "cuda" else ""
    rows: list[dict[str, object]] = []
    for i in range(1, rounds + 1):
        losses: dict[str, float] = {}
        for side, step in steps.items():
            seconds = on.seconds(step, device, STEPS - 1)  # and one to see the loss
            losses[side] = step().item()
            row = {"method": method, "side": side, "round": i, "seconds": seconds}
            rows.append({**row, "loss": losses[side], "peak_bytes": peaks[side]})
        first = next(iter(losses.values()))
        for side, loss in losses.items():
            if not math.isclose(loss, first, rel_tol=TOLERANCE):
                raise ValueError(f"{method}, round {i}: loss {loss} of {side}, {first} of ours")
    return rows


def our_model(
    directory: Path, method: str, device: str, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Tensor]]:
    """In training mode, and the adapter's weights at the beginning."""
    torch.manual_seed(0)  # the same A for all of ours
    model = load(directory, dtype=_weights(method, dtype), device=device)
    handle = attach(model, METHODS[method])
    if handle is None:
        return model.train(), {}
    state = {name: t.detach().clone() for name, t in handle.state().items()}
    return model.train(), state


def our_step(model: Any, ids: Tensor, route: str, autocast: Any) -> Step:
    """An update of what requires a gradient; the loss stays on the device."""
    optimizer = ClippedAdamW([p for p in model.parameters() if p.requires_grad], LR, max_norm=1.0)
    labels = torch.full_like(ids, IGNORED)
    labels[..., :-1] = ids[..., 1:]
    turn = count()
    product = partial(lora_linear, backend=route)

    def step() -> Tensor:
        i = next(turn) % len(ids)
        with patch("peft_lite.lora.lora_linear", product), autocast:
            loss = language_model_loss(model, {"input_ids": ids[i], "labels": labels[i]})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def their_step(model: nn.Module, run: Any, ids: Tensor, autocast: Any) -> Step:
    """The same by what a user of transformers writes; `run` is the model, perhaps compiled."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR, fused=True)
    turn = count()

    def step() -> Tensor:
        batch = ids[next(turn) % len(ids)]
        with autocast:
            loss: Tensor = run(input_ids=batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _weights(method: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if method == "full" else dtype


def _autocast(method: str, device: str, dtype: torch.dtype) -> Any:
    low = method == "full" and dtype != torch.float32
    return torch.autocast(device, dtype) if low else nullcontext()


def _peak(step: Step, before: int) -> int:
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = options(__doc__ or "", rounds=10)
    parser.add_argument("--method", nargs="+", choices=SIDES, default=list(SIDES))
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here; on a CPU: python -m benchmarks.training_step", file=sys.stderr)
        sys.exit(2)
    with checkpoint(given.threads) as directory:
        measures = {
            method: partial(fresh, given.threads, measure, directory, method, given.rounds)
            for method in given.method
        }
        write_each(given.out / "training_step_gpu.csv", given.threads, measures)


if __name__ == "__main__":
    main()
