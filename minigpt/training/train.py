"""One training loop.  It knows a module, a loss and the parameters that require gradients.

A step, in this order:

    forward, backward    g = sum_i (n_i / n) d loss_i / d theta   over micro-batches of n_i labels
    record               |g|, the norm over all trainable tensors, before clipping
    clip                 g <- g min(1, c / (|g| + 1e-6))          c = max_norm, from step T_0 on
    optimizer            AdamW, Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101
    schedule             the rate of the next update (minigpt/training/schedule.py)
"""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.data.text import Batch, moved
from minigpt.models.config import one_of, positive
from minigpt.models.mode import mode
from minigpt.objectives.causal import IGNORED
from minigpt.training import schedule, snapshot
from minigpt_kernels import ClippedAdamW

Loss = Callable[[Any, Batch], Tensor]
Row = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: number of updates, T_train.
        lr: the schedule's peak rate.
        schedule: "linear", "cosine" or "constant", after `warmup_steps` of warm-up.
        schedule_steps: length of the schedule, T_sched >= T_train; None: T_train.
        max_norm: clip the global gradient norm to this; None: do not.
        clip_from: the first updates, this many, are not clipped, T_0.
        accumulate: micro-batches in a step.
        bf16: run forward and backward in bfloat16 where autocast deems it safe.
        evaluate_every: steps between two held-out losses; 0: none along the way.
        snapshot_every: steps between two snapshots of the run; 0: none along the way.
    """

    steps: int
    lr: float = 5e-4
    schedule: str = "linear"
    warmup_steps: int = 0
    schedule_steps: int | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_norm: float | None = 1.0
    clip_from: int = 0
    accumulate: int = 1
    bf16: bool = False
    evaluate_every: int = 0
    snapshot_every: int = 0

    def __post_init__(self) -> None:
        positive(self, "steps", "accumulate")
        one_of(self, "schedule", schedule.SCHEDULES)
        for field in ("lr", "eps", "max_norm"):
            value = getattr(self, field)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field} is {value}, must be a positive number")
        for field in (
            *("warmup_steps", "weight_decay", "clip_from"),
            *("evaluate_every", "snapshot_every"),
        ):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}, must not be negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}, must lie in [0, 1)")
        if self.schedule_length < self.steps:
            raise ValueError(
                f"schedule_steps is {self.schedule_steps}, must be at least steps = {self.steps}"
            )
        if self.warmup_steps > self.schedule_length:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps}, must be at most the schedule's length "
                f"{self.schedule_length}"
            )

    @property
    def schedule_length(self) -> int:
        return self.steps if self.schedule_steps is None else self.schedule_steps

    def rate(self, t: int) -> float:
        """Learning rate of the update that follows `t` others."""
        factor = schedule.factor(self.schedule, t, self.warmup_steps, self.schedule_length)
        return self.lr * factor

    def limit(self, t: int) -> float:
        """Norm that the gradient of the update that follows `t` others is clipped to, c(t)."""
        return math.inf if self.max_norm is None or t < self.clip_from else self.max_norm


class Probe(Protocol):
    """Looks at each step; what it returns joins the step's row of metrics."""

    def before(self) -> Row:
        """Called when the gradients are there, before they are clipped."""

    def after(self) -> Row:
        """Called when the weights are new.  Its time is not the step's."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did so between two steps with a snapshot on disk."""


def train(
    model: nn.Module,
    loss: Loss,
    batches: Callable[[int], Batch],
    config: TrainConfig,
    directory: str | Path | None = None,
    heldout: Sequence[Batch] = (),
    resume: bool = False,
    observe: Callable[[Row], None] = lambda row: None,
    probes: Sequence[Probe] = (),
) -> list[Row]:
    """Trains the parameters of `model` that require gradients.

    Args:
        loss: `loss(model, batch)` -> scalar mean over the labels of the batch that are not -100.
        batches: micro-batch number -> batch; a pure function, so that a resumed run sees what an
            uninterrupted one would.
        directory: where `metrics.jsonl` and `snapshots/` go; None: nowhere.
        heldout: batches whose mean loss is measured every `config.evaluate_every` steps.
        resume: continue from the newest whole snapshot of `directory`, if there is one.
        observe: called with each row of metrics.
        probes: what else is measured in each step.

    Returns:
        One row a step, resumed ones included: step, loss and heldout_loss (nats a label), lr,
        gradient_norm before clipping, seconds.

    Raises:
        ValueError: nothing is trainable, the loss or the gradient became NaN or infinite, or the
            snapshot belongs to another run.
        Interrupted: SIGINT or SIGTERM came; with a directory, a snapshot was written first.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing to train: no parameter of the model requires a gradient")
    trained = list(parameters.values())
    device = trained[0].device
    optimizer = ClippedAdamW(trained, config.lr, config.betas, config.eps, config.weight_decay)
    run = _Run(Path(directory), model, parameters, optimizer) if directory is not None else None
    rows = run.restore() if run and resume else []
    if run and not resume:
        run.start()
    try:
        with mode(model, training=True), _stop_requested() as stop:
            for t in range(len(rows), config.steps):
                begin = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"], group["max_norm"] = config.rate(t), config.limit(t)
                micro = [batches(t * config.accumulate + i) for i in range(config.accumulate)]
                total = _backward(model, loss, micro, device, config.bf16)
                squares = optimizer.sum_of_squares()
                norm = squares.sqrt().item()
                _check_finite(t + 1, total, norm, run)
                row = {"step": t + 1, "loss": total, "lr": config.rate(t), "gradient_norm": norm}
                for probe in probes:
                    row |= probe.before()
                optimizer.update(squares)
                optimizer.zero_grad()
                row["seconds"] = time.perf_counter() - begin
                for probe in probes:
                    row |= probe.after()
                if _due(t + 1, config.evaluate_every) and heldout:
                    row["heldout_loss"] = evaluate(model, loss, heldout, config.bf16)
                rows.append(row)
                if run:
                    run.record(row)
                observe(row)
                last, stopping = t + 1 == config.steps, stop.is_set()
                if run and (_due(t + 1, config.snapshot_every) or stopping or last):
                    run.snapshot(t + 1)
                if stopping and not last:
                    raise Interrupted(f"interrupted after step {t + 1} of {config.steps}")
    finally:
        optimizer.zero_grad()
    return rows


def _backward(
    model: nn.Module, loss: Loss, micro: list[Batch], device: torch.device, bf16: bool
) -> float:
    """Adds up the gradient of the mean loss over all labels of `micro`; returns that loss."""
    n = sum(_labels(batch) for batch in micro)
    if n == 0:
        raise ValueError("a step has no label: nothing to learn from")
    total = 0.0
    for batch in micro:
        if _labels(batch) == 0:
            continue  # no say, and its mean over no label is NaN
        with _autocast(device, bf16):
            share = loss(model, moved(batch, device)) * (_labels(batch) / n)
        share.backward()
        total += share.item()
    return total


def _check_finite(step: int, loss: float, norm: float, run: "_Run | None") -> None:
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise ValueError(
            f"step {step}: the loss is {loss}, the gradient norm {norm}; "
            f"stopped before the update{run.last_good() if run else ''}"
        )


@torch.no_grad()
def evaluate(model: nn.Module, loss: Loss, batches: Iterable[Batch], bf16: bool = False) -> float:
    """Mean loss over all labels of `batches`, in nats, without dropout; the mode stays."""
    total, n = 0.0, 0
    with mode(model, training=False):
        for batch in batches:
            if _labels(batch) == 0:
                continue
            batch = moved(batch, next(model.parameters()).device)
            with _autocast(batch["labels"].device, bf16):
                total += loss(model, batch).item() * _labels(batch)
            n += _labels(batch)
    if n == 0:
        raise ValueError("nothing to evaluate: the batches have no label")
    return total / n


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Keeps only each block's input and computes the rest again in the backward pass.
    Chen et al. 2016, https://arxiv.org/abs/1604.06174
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class _Run:
    """What a run leaves on disk: one row of metrics a step, and snapshots."""

    def __init__(
        self,
        directory: Path,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics = directory / "metrics.jsonl"
        self.snapshots = directory / "snapshots"
        self.parameters, self.optimizer = parameters, optimizer
        self.frozen = snapshot.fingerprint(model)

    def start(self) -> None:
        if self.metrics.exists() or self.snapshots.exists():
            raise ValueError(
                f"{self.metrics.parent} holds another run: resume it, or choose another"
            )

    def restore(self) -> list[Row]:
        """Puts the newest snapshot back and drops the metrics of the steps after it."""
        step = snapshot.restore(self.snapshots, self.parameters, self.optimizer, self.frozen)
        lines = self.metrics.read_text().splitlines()[:step] if self.metrics.exists() else []
        if len(lines) < step:
            raise ValueError(f"{self.metrics} has {len(lines)} rows, the snapshot {step} steps")
        rewritten = self.metrics.with_suffix(".partial")
        rewritten.write_text("".join(f"{line}\n" for line in lines))
        snapshot.publish(rewritten, self.metrics)
        return [json.loads(line) for line in lines]

    def record(self, row: Row) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def snapshot(self, step: int) -> None:
        with self.metrics.open() as file:
            os.fsync(file.fileno())  # a snapshot never knows of steps that the metrics do not
        snapshot.save(self.snapshots, step, self.parameters, self.optimizer, self.frozen)

    def last_good(self) -> str:
        files = sorted(self.snapshots.glob("step-*.safetensors"))
        return f"; the last good state is {files[-1]}" if files else ""


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that a run stops between two steps and not within
    one.  A second signal does what it always did.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
