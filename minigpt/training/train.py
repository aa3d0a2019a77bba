"""One training loop for every model, objective and method: it trains whatever requires a gradient.

A step, in this order (`training_step`):

    forward, backward    g = sum_i (n_i / n) d loss_i / d theta   over micro-batches of n_i labels,
                         which processes may share (minigpt/training/parallel.py)
    record               |g|, the norm over all trainable tensors, before clipping
    clip                 g <- g min(1, c / (|g| + 1e-6))          c = max_norm, from step T_0 on
    optimizer            AdamW, Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101
    schedule             the rate of the next update (minigpt/training/schedule.py), which LoRA+
                         multiplies for B (minigpt/training/loraplus.py)
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.data.text import IGNORED, Batch, moved
from minigpt.models.config import one_of, positive
from minigpt.models.mode import mode
from minigpt.settings.options import option
from minigpt.training import loraplus, schedule
from minigpt.training.interrupt import Interrupted, stop_requested
from minigpt.training.parallel import Alone, drawing
from minigpt.training.processes import Processes
from minigpt.training.record import Record
from minigpt_kernels import ClippedAdamW
from minigpt_kernels.paged import paged_memory

Loss = Callable[[Any, Batch], Tensor]
Row = dict[str, float]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.  The commands offer the fields that have a help text."""

    steps: int = option("updates, T_train")
    lr: float = option("peak rate", 5e-4)
    schedule: str = option("course of the rate after warm-up", "linear", choices=schedule.SCHEDULES)
    warmup_steps: int = option("updates of warm-up", 0)
    schedule_steps: int | None = option("length of the schedule, T_sched (default: steps)", None)
    weight_decay: float = option("AdamW's", 0.01)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_norm: float | None = option("clip the gradient norm to this", 1.0)
    clip_from: int = 0  # number of first updates that are not clipped, T_0
    loraplus_lr_ratio: float | None = None  # B's rate is this times A's: LoRA+
    accumulate: int = option("batches in an update", 1)
    bf16: bool = option("compute in bfloat16 where it is safe", False)
    paged: bool = option(
        "page the optimizer's state out of a GPU, or on a CPU to a file", False, free=True
    )
    evaluate_every: int = option("steps between two held-out losses, 0: none", 0)
    snapshot_every: int = option("steps between two snapshots to resume from, 0: none", 0)

    def __post_init__(self) -> None:
        positive(self, "steps", "accumulate")
        one_of(self, "schedule", schedule.SCHEDULES)
        for field in ("lr", "eps", "max_norm", "loraplus_lr_ratio"):
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
        """Learning rate of the update that follows `t` others; in LoRA+ that of A."""
        factor = schedule.factor(self.schedule, t, self.warmup_steps, self.schedule_length)
        return self.lr * factor

    def limit(self, t: int) -> float:
        """Largest gradient norm of the update that follows `t` others, c(t)."""
        return math.inf if self.max_norm is None or t < self.clip_from else self.max_norm


class Probe(Protocol):
    """Measures something at each step; what it returns joins the step's row of metrics."""

    def before(self) -> Row:
        """Called after the backward pass, before the gradients are clipped."""

    def after(self) -> Row:
        """Called after the update.  Its time does not count as the step's."""


class NotFinite(ValueError):
    """The loss or the gradient is NaN or infinite; the weights are as before the step."""


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
    dropout: bool = True,
    period: int = 1,
    parallel: Alone | None = None,
) -> list[Row]:
    """Trains the parameters of `model` that require gradients.

    Args:
        loss: `loss(model, batch)` -> scalar mean over the labels of the batch that are not -100.
        batches: micro-batch number -> batch; a pure function of the number, or of the number and
            the weights, so that a resumed run sees what an uninterrupted one would.
        directory: folder of `metrics.jsonl` and `snapshots/`; None: nothing is written.
        heldout: batches whose mean loss is measured every `config.evaluate_every` steps.
        resume: continue from the newest whole snapshot of `directory`, if there is one.
        observe: called with each row of metrics.
        probes: further measurements at each step.
        dropout: False: the model trains in evaluation mode.
        period: the steps that share what batches drew by the weights before the first of them; a
            snapshot follows a whole period, and the run stops after one.
        parallel: the model as it is spread over processes; all of them call this, and the first one
            writes and observes.  None: one process.

    Returns:
        One row a step, resumed ones included: step, loss and heldout_loss (nats a label), lr,
        gradient_norm before clipping, seconds.

    Raises:
        ValueError: nothing is trainable, the loss or the gradient became NaN or infinite, the
            snapshot belongs to another run, the metrics are damaged, or there is no room for the
            paged state.
        Interrupted: SIGINT or SIGTERM came; with a directory, a snapshot was written first.
    """
    parallel = parallel or Alone(model)
    parameters, processes = parallel.parameters, parallel.processes
    if not parameters:
        raise ValueError("nothing to train: no parameter of the model requires a gradient")
    folder = None if directory is None else Path(directory)
    optimizer = ClippedAdamW(
        loraplus.groups(parameters, config.loraplus_lr_ratio),
        config.lr,
        config.betas,
        config.eps,
        config.weight_decay,
        memory=paged_memory([*parameters.values()], folder) if config.paged else None,
    )
    record = Record(folder, parallel, optimizer, config) if folder else None
    rows = record.restore() if record and resume else []
    if record and not resume:
        record.start()
    try:
        with mode(model, training=dropout), stop_requested() as stop:
            for t in range(len(rows), config.steps):
                begin = time.perf_counter()
                first, turns = t * config.accumulate, config.accumulate
                micro = [
                    batches(first + i) if i is not None else idle(batches(first))
                    for i in processes.share(first, turns)
                ]
                row: Row = {"step": t + 1}
                try:
                    row |= training_step(model, loss, micro, optimizer, config, t, probes, parallel)
                except NotFinite as error:
                    place = record.last_good() if record else ""
                    raise ValueError(f"step {t + 1}: {error}{place}") from None
                row["seconds"] = time.perf_counter() - begin
                for probe in probes:
                    row |= probe.after()
                if _due(t + 1, config.evaluate_every) and heldout:
                    row["heldout_loss"] = evaluate(model, loss, heldout, config.bf16, parallel)
                rows.append(row)
                if record:
                    record.write(row)
                if processes.first:
                    observe(row)
                last, whole = t + 1 == config.steps, (t + 1) % period == 0
                (stops,) = processes.sum(stop.is_set())
                stopping = stops > 0 and (whole or last)
                if record and (_passed(t + 1, config.snapshot_every, period) or stopping or last):
                    record.snapshot(t + 1)
                if stopping:
                    raise Interrupted(f"interrupted after step {t + 1} of {config.steps}")
    finally:
        optimizer.zero_grad()
    return rows


def training_step(
    model: nn.Module,
    loss: Loss,
    micro: Sequence[Batch],
    optimizer: ClippedAdamW,
    config: TrainConfig,
    t: int,
    probes: Sequence[Probe] = (),
    parallel: Alone | None = None,
) -> Row:
    """One update, on micro-batches that may come from anywhere.

    Args:
        micro: this process's, as `Processes.share` deals them.
        t: number of updates before this one.
        probes: their `before` is called once the gradients are there.
        parallel: as in `train`.

    Returns:
        loss in nats a label, lr, gradient_norm before clipping, and what the probes measured.

    Raises:
        NotFinite: the loss or the gradient is NaN or infinite; the gradients are dropped.
    """
    lr = config.rate(t)
    for group in optimizer.param_groups:
        group["lr"], group["max_norm"] = lr * group.get("factor", 1.0), config.limit(t)
    parallel = parallel or Alone(model)
    total = _backward(parallel, loss, micro, config, t)
    squares = parallel.total(optimizer.sum_of_squares())
    norm = squares.sqrt().item()
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad()
        raise NotFinite(f"the loss is {total}, the gradient norm {norm}; stopped before the update")
    row = {"loss": total, "lr": lr, "gradient_norm": norm}
    for probe in probes:
        row |= probe.before()
    optimizer.update(squares)  # clips and updates
    optimizer.zero_grad()
    return row


def _backward(
    parallel: Alone, loss: Loss, micro: Sequence[Batch], config: TrainConfig, t: int
) -> float:
    """Adds up the gradient of the mean loss over all labels of a step; returns that loss.

    Dropout of micro-batch i draws from the seed of torch's generator and i.
    """
    processes, seed = parallel.processes, torch.initial_seed()
    device = next(iter(parallel.parameters.values())).device
    (n,) = processes.sum(sum(_labels(batch) for batch in micro))
    if n == 0:
        raise ValueError("a step has no label: nothing to learn from")
    first, total = t * config.accumulate, 0.0
    for k, batch in enumerate(micro):
        n_i = _labels(batch)
        if n_i == 0 and processes.size == 1:
            continue  # it adds nothing, and its mean over no label is NaN
        i = first + (processes.rank - first) % processes.size + k * processes.size
        with parallel.turn(last=k + 1 == len(micro)), drawing(seed, i, device):
            with _autocast(device, config.bf16):
                mean = parallel.run(loss, moved(batch if n_i else _with_a_label(batch), device))
            share = mean * (n_i * processes.size / n)
            share.backward()
        total += share.item() / processes.size
    parallel.collect()
    return processes.sum(total)[0]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    bf16: bool = False,
    parallel: Alone | None = None,
) -> float:
    """Mean loss over all labels of `batches`, in nats, without dropout.

    Args:
        parallel: as in `train`.
    """
    parallel = parallel or Alone(model)
    processes, total, n = parallel.processes, 0.0, 0.0
    with mode(model, training=False):
        for batch in _shared(batches, processes):
            n_i = _labels(batch)
            if n_i == 0 and processes.size == 1:
                continue
            batch = batch if n_i else _with_a_label(batch)
            batch = moved(batch, next(model.parameters()).device)
            with _autocast(batch["labels"].device, bf16):
                total += parallel.run(loss, batch).item() * n_i
            n += n_i
    total, n = processes.sum(total, n)
    if n == 0:
        raise ValueError("nothing to evaluate: the batches have no label")
    return total / n


def _shared(batches: Iterable[Batch], processes: Processes) -> Iterable[Batch]:
    """Those of this process, and idle turns."""
    if processes.size == 1:
        return batches
    every = list(batches)
    return [every[i] if i is not None else idle(every[0]) for i in processes.share(0, len(every))]


def idle(batch: Batch) -> Batch:
    """A batch like this one that teaches nothing."""
    return {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}


def _with_a_label(batch: Batch) -> Batch:
    """A batch without labels that has a mean loss, which is to be weighed by 0."""
    labels = batch["labels"].clone()
    labels.view(-1)[:1] = 0
    return {**batch, "labels": labels}


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Keeps only each block's input; the backward pass computes the rest again.
    Chen et al. 2016, https://arxiv.org/abs/1604.06174
    """
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_states(model: Any) -> None:
    """Compiles what gives the states before the head, where a gradient is wanted: torch.compile
    fuses the operations between products.  What only reads the model, such as generation, runs as
    before, on shapes that change from call to call.
    """
    plain, compiled = model.hidden, torch.compile(model.hidden)

    def hidden(*args: Any, **kwargs: Any) -> Tensor:
        states: Tensor = (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)
        return states

    model.hidden = hidden


def _autocast(device: torch.device, bf16: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def _labels(batch: Batch) -> int:
    return int((batch["labels"] != IGNORED).sum())


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _passed(step: int, every: int, period: int) -> bool:
    """Whether a period ends with this step, in which a multiple of `every` fell."""
    whole = every > 0 and step % period == 0
    return whole and step // every > (step - period) // every
