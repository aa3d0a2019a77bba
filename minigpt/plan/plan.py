"""A plan: memory by part, FLOPs and seconds of a training step, from a config.json alone.

The model is built without values and the method put on it as in a run; then a step is traced
(minigpt/plan/trace.py).  Memory is in minigpt/plan/memory.py, time in minigpt/plan/speed.py.

Shapes:  B batch   T time   D width
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from minigpt.checkpoints.config import read_config
from minigpt.checkpoints.directory import outline
from minigpt.checkpoints.source import find
from minigpt.models.architecture import Decoder, Model, without_values
from minigpt.objectives.masked import SHARE
from minigpt.objectives.registry import OBJECTIVES
from minigpt.plan import formulas, memory, speed
from minigpt.plan.memory import Sizes
from minigpt.plan.trace import Spec, Trace, spec, trace
from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions
from minigpt.training.memory import LARGE
from minigpt.training.train import checkpoint_activations
from minigpt_kernels import nf4
from peft_lite import quantized
from peft_lite.quantized import is_quantized, quantizable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GENERATED = 144  # slots of keys and values: a sample's 24 tokens of a prompt and 120 more


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step is like.

    Attributes:
        given: the tensors of a micro-batch, where it is not a window of ids and labels a row.
        labels: of a micro-batch; None: as many as the objective gives it.
        processes: that share the work, each with micro-batches of this size.
    """

    batch_size: int = 8
    sequence_length: int = 128
    objective: str = "clm"
    accumulate: int = 1
    bf16: bool = False
    paged: bool = False
    parallel: str = "none"
    processes: int = 1
    given: Mapping[str, Spec] | None = None
    labels: int | None = None

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return math.prod(self.batch["input_ids"].shape)

    @property
    def labelled(self) -> int:
        """Labels of a micro-batch."""
        if self.labels is not None:
            return self.labels
        return self.tokens if self.objective == "clm" else max(1, round(SHARE * self.tokens))

    @property
    def batch(self) -> Mapping[str, Spec]:
        """The tensors of a micro-batch."""
        shape = (self.batch_size, self.sequence_length)
        ids = Spec(shape, (self.sequence_length, 1), torch.int64)
        return self.given or {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Planned:
    """A model under a method, without values, and the sizes of its tensors.

    Attributes:
        base: ids of the parameters that it had before the method.
        loading: bytes that a checkpoint's file holds beside the model while it is converted.
        checkpointed: whether the backward pass computes the blocks again.
    """

    model: Model
    base: set[int] = field(repr=False)
    loading: int = 0
    checkpointed: bool = False

    @property
    def sizes(self) -> Sizes:
        return memory.sizes(self.model, self.base)

    @property
    def packed(self) -> bool:
        """Whether weights are in 4 bits."""
        return any(map(is_quantized, self.model.modules()))

    def trace(self, step: Step) -> Trace:
        """A step of it."""
        if step.sequence_length > self.model.max_tokens:
            raise ValueError(
                f"--sequence-length is {step.sequence_length}, there are "
                f"{self.model.max_tokens} positions for tokens"
            )
        return trace(
            self.model,
            OBJECTIVES[step.objective].loss,
            step.batch,
            step.labelled,
            self.model.config.vocab_size,
            step.bf16,
            step.accumulate,
        )

    def memory(self, step: Step, traced: Trace, resident: int | None) -> dict[str, int]:
        """Bytes of a process by part; `resident` is that of a process before it has a model, where
        a CPU's memory is asked for, None for a GPU's.
        """
        gpu = resident is None
        parts = memory.of_process(
            self.sizes, traced, step.parallel, step.processes, paged=step.paged and gpu
        )
        if resident is None:
            return {**parts, memory.LIBRARIES: memory.CONTEXT}
        mapped = LARGE if self.packed or step.parallel == "fsdp" else None
        return memory.on_cpu(parts, self.sizes, traced, resident, mapped)

    def work(self, step: Step, traced: Trace) -> speed.Work:
        """What a step has to do."""
        size, W = self.sizes, step.processes
        sent = 0
        if step.parallel == "ddp":
            sent = formulas.all_reduced(size.trained, W)
        if step.parallel == "fsdp":
            sent = formulas.sharded(size.weights + size.adapters, size.trained, W)
        # each weight of 4 bits forward, for dx, and once more where activations are computed again
        times = (3 if self.checkpointed else 2) * step.accumulate
        packed = [m for m in self.model.modules() if is_quantized(m)]
        return speed.Work(
            traced.operations,
            traced.calls,
            [spec(p) for p in self.model.parameters() if p.requires_grad],
            times * sum(m.in_features * m.out_features for m in packed),
            sent,
        )

    def formula_flops(self, step: Step) -> int:
        """FLOPs of the products with weights, by 6 N D and 4 N D; the head reads labels alone."""
        tokens = step.tokens * step.accumulate
        head = self.model.unembedding
        trained = frozen = 0
        for module in self.model.modules():
            if not isinstance(module, nn.Linear) or module is head:
                continue
            count = module.in_features * module.out_features
            if module.weight.requires_grad:
                trained += count
            else:
                frozen += count
        total = formulas.flops(trained, frozen, tokens)
        if head is not None:
            count, labelled = head.weight.numel(), step.labelled * step.accumulate
            trains = head.weight.requires_grad
            total += formulas.flops(count * trains, count * (not trains), labelled)
        added = sum(p.numel() for p in self.model.parameters() if id(p) not in self.base)
        return total + formulas.flops(added, 0, tokens)

    def formula_activations(self, step: Step) -> int:
        """Bytes that a GPT of this shape keeps in 16 bits, with attention's scores and dropout."""
        attention: Any = self.model.blocks[0].attention
        heads = attention.query.out_features // attention.head_width
        width = self.model.embeddings.token.embedding_dim
        batch, length = step.batch["input_ids"].shape
        return formulas.activations(batch, length, width, heads, len(self.model.blocks))

    def caches(self, batch: int = 1) -> int:
        """Bytes of keys and values while a sample is generated."""
        if not isinstance(self.model, Decoder):
            return 0
        with torch.device("meta"):
            caches = self.model.new_caches(batch, min(GENERATED, self.model.max_tokens))
        return sum(c.keys.nbytes + c.values.nbytes for c in caches)


def beside(
    model: Model,
    step: Step,
    checkpointed: bool,
    device: torch.device,
    before: int,
    seconds: float,
) -> dict[str, object]:
    """What a plan says of the steps that a run has made, for its summary.

    Args:
        before: bytes that the process held before it had the model.
        seconds: how long operations may run to be timed.
    """
    plan = Planned(model, {id(p) for p in model.parameters()}, checkpointed=checkpointed)
    traced = plan.trace(step)
    on_gpu = device.type == "cuda"
    parts = plan.memory(step, traced, None if on_gpu else before)
    if on_gpu:
        del parts[memory.LIBRARIES]  # a run counts the tensors of a GPU
    taken = speed.calibrated(plan.work(step, traced), seconds, device.type)
    return {
        "predicted_peak_memory_bytes": sum(parts.values()),
        "predicted_step_seconds": sum(taken.values()),
    }


def planned(
    model: str,
    options: MethodOptions,
    dtype: str = "float32",
    quantize: str | None = None,
    objective: str = "clm",
    checkpointed: bool = False,
) -> Planned:
    """A model under a method as a run would have it, without values.

    Raises:
        ValueError: what `minigpt finetune` refuses, as far as config.json tells.
    """
    path = find(model, weights=False)
    _, _, raw = read_config(path)
    there = outline(path, OBJECTIVES[objective].head)
    loading = _loading(there, raw, dtype, quantize)
    return prepared(there, options, dtype, quantize, checkpointed, loading)


def prepared(
    model: Model,
    options: MethodOptions,
    dtype: str = "float32",
    quantize: str | None = None,
    checkpointed: bool = False,
    loading: int = 0,
) -> Planned:
    """The same of a model on the meta device, which is changed."""
    with without_values():
        model = model.to(DTYPES[dtype])
        if quantize is not None:
            for name, layer in quantizable(model, quantize).items():
                shape = layer.weight.shape
                quantized.replace(model, name, nf4.outline(shape, layer.weight.dtype))
        base = {id(p) for p in model.parameters()}
        methods.attach(model, options)
    if checkpointed:
        checkpoint_activations(model.blocks)
    return Planned(model, base, loading, checkpointed)


def _loading(model: Model, raw: Mapping[str, Any], dtype: str, quantize: str | None) -> int:
    """Where the file has another dtype than the model, all of its dense tensors, till the end."""
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or dtype)
    size = {"float32": 4, "bfloat16": 2, "float16": 2}.get(stored, 4)
    if stored == dtype or quantize or any(map(is_quantized, model.modules())):
        return 0
    return size * sum(p.numel() for p in model.parameters())


def largest_batch(plan: Planned, step: Step, room: int, resident: int | None, most: int) -> int:
    """The largest batch whose step fits into `room` bytes.

    Memory grows linearly with the batch once it is large, so that two traces tell about where the
    largest lies, and the search looks there.
    """
    totals: dict[int, int] = {}

    def total(batch: int) -> int:
        if batch not in totals:
            one = replace(step, batch_size=batch)
            totals[batch] = sum(plan.memory(one, plan.trace(one), resident).values())
        return totals[batch]

    low, high = 1, 2
    if total(low) > room:
        return 0
    while high <= most and total(high) <= room:
        slope = max(1, (total(high) - total(low)) // (high - low))
        low, high = high, max(2 * high, high + (room - total(high)) // slope)
    high = min(high, most + 1)
    straight = True
    while high - low > 1:
        middle = (low + high) // 2
        if straight and high <= most:
            middle = low + (room - total(low)) * (high - low) // (total(high) - total(low))
            middle = min(max(middle, low + 1), high - 1)
        straight = not straight  # in turn with halving, which always ends
        if total(middle) <= room:
            low = middle
        else:
            high = middle
    return low
