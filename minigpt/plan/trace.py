"""A training step without values: which operations it runs, and which tensors live at once.

The model's own code runs, forward and backward, on tensors that have a shape, a dtype and a device
but no memory (torch's FakeTensorMode, https://docs.pytorch.org/docs/stable/torch.compiler_fake_tensor.html).
So nothing is estimated about what autograd keeps, what a checkpoint computes again or what autocast
copies: the operations that would run are the ones that are counted.

    live(t)  = sum of the bytes of the storages that operations have made and nothing has freed
    kept     = live at the end of the forward pass: the activations that the backward pass reads
    peak     = max over t of live(t)

What has no values cannot be asked for any: the number of labels is given, and every other number
that the code reads back from a tensor is 0.

Shapes:  B batch   T time   V vocabulary
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from minigpt.data.text import Batch
from minigpt.models.mode import mode

aten: Any = torch.ops.aten
ACTIVATIONS, GRADIENTS, LOGITS, WORKING = "activations", "gradients", "logits", "working memory"
Parts = Mapping[str, int]  # bytes


class Spec(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of the memory that it reads: an expanded dimension has one row."""
        sizes = zip(self.shape, self.stride, strict=True)
        count = 1
        for size, stride in sizes:
            count *= size if stride or not size else 1
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Operation:
    """An operation of PyTorch, with the tensors that it reads and makes.

    Attributes:
        function: the overload of aten, such as aten.mm.default.
        leaves: its arguments in a row, a Spec for each tensor.
        outputs: the tensors that it makes.
        structure: of the arguments, for `tree_unflatten`.
    """

    function: Any
    leaves: tuple[Any, ...]
    outputs: tuple[Spec, ...]
    structure: Any = field(compare=False, repr=False)

    @property
    def name(self) -> str:
        """Such as "mm"."""
        return str(self.function.overloadpacket.__name__)

    @property
    def tensors(self) -> list[Spec]:
        """The tensors among the arguments."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Spec)]


@dataclass(frozen=True)
class Trace:
    """What a step does.

    Attributes:
        operations: how often each runs; views, and memory that is only taken, are left out.
        calls: how many operations there are, views among them.
        events: (number, bytes) where a storage is made, (number, 0) where it is freed, in order.
        parts: bytes at the peak, by what they are for.
        kept: bytes that the backward pass finds, logits included.
        gradients: bytes of all gradients at the end.
    """

    operations: Counter[Operation]
    calls: int
    events: Sequence[tuple[int, int]] = field(repr=False)
    parts: Parts
    kept: int
    gradients: int

    @property
    def peak(self) -> int:
        """Bytes beyond weights and optimizer state."""
        return sum(self.parts.values())


def trace(
    model: nn.Module,
    loss: Callable[[Any, Batch], Tensor],
    batch: Mapping[str, Spec],
    labels: int,
    vocabulary: int,
    bf16: bool = False,
    accumulate: int = 1,
) -> Trace:
    """One step of a model; its parameters may lie on the meta device, and get there no values.

    Args:
        batch: shapes and dtypes of a micro-batch.
        labels: how many of its labels count.
        vocabulary: V, by which logits are known.
        bf16: under autocast.
        accumulate: micro-batches of a step.
    """
    with _fake(model) as fake, mode(model, training=True):
        with fake:
            tensors = {name: torch.empty(s.shape, dtype=s.dtype) for name, s in batch.items()}
        given = [*model.parameters(), *model.buffers(), *tensors.values()]
        watch = _Watch(given, labels, vocabulary)
        operations: Counter[Operation] = Counter()
        calls = 0
        for i in range(min(2, accumulate)):  # the first has no gradients to add to, all others have
            watch.operations, watch.calls = Counter(), 0
            with fake, watch:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    value = loss(model, tensors) / accumulate
                watch.kept = {*watch.live} - {watch.number(g) for g in _gradients(model)}
                kept = sum(watch.live[number][0] for number in watch.kept)
                value.backward()
            del value
            turns = 1 if i == 0 else accumulate - 1
            operations += Counter({op: n * turns for op, n in watch.operations.items()})
            calls += watch.calls * turns
        gradients = _gradients(model)
        parts = watch.parts({watch.number(g) for g in gradients})
        size = sum(g.nbytes for g in gradients)
        return Trace(operations, calls, tuple(watch.events), parts, kept, size)


@contextmanager
def _fake(model: nn.Module) -> Iterator[FakeTensorMode]:
    """Inside, the model's tensors lie on the CPU, without memory; after, they are as before."""
    fake = FakeTensorMode()
    before = [
        (slot, name, t)
        for module in model.modules()
        for slot in (module._parameters, module._buffers)
        for name, t in slot.items()
        if t is not None
    ]
    made: dict[int, Tensor] = {}
    for slot, name, t in before:
        if id(t) not in made:  # a tied one is one
            # codes of 4 bits stay without a place, so that nobody tries to decode them
            device = "meta" if isinstance(t, nn.Parameter) and t.dtype == torch.uint8 else "cpu"
            with fake:
                empty = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            is_parameter = isinstance(t, nn.Parameter)
            made[id(t)] = nn.Parameter(empty, t.requires_grad) if is_parameter else empty
        slot[name] = made[id(t)]  # type: ignore[assignment]
    try:
        yield fake
    finally:
        for slot, name, t in before:
            slot[name] = t  # type: ignore[assignment]


class _Watch(TorchDispatchMode):
    """Counts the operations that run inside `with`, and the storages that they make."""

    def __init__(self, given: Iterable[Tensor], labels: int, vocabulary: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.labels, self.vocabulary = labels, vocabulary
        self.operations: Counter[Operation] = Counter()
        self.given = {_key(t): t.untyped_storage() for t in given}
        self.places: dict[int, tuple[int, Any]] = {}  # address of a storage -> its number, and it
        self.live: dict[int, tuple[int, bool]] = {}  # number -> bytes, and whether of logits
        self.kept: set[int] = set()
        self.count = self.calls = self.bytes = self.most = 0
        self.events: list[tuple[int, int]] = []
        self.at_peak: dict[int, tuple[int, bool]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 0
        if func is aten.nonzero.default:  # of labels: which of them count
            out: Any = torch.empty(self.labels, args[0].dim(), dtype=torch.int64)
        else:
            out = func(*args, **kwargs)
        if func.namespace == "prim":
            return out
        self.calls += 1
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        new = [t for t in tensors if self._take(t)]
        if (new and "empty" not in func.overloadpacket.__name__) or func._schema.is_mutable:
            self._record(func, args, kwargs, new)
        return out

    def _take(self, t: Tensor) -> bool:
        """Counts the storage of a tensor, if it is new."""
        key = _key(t)
        if key in self.given or key in self.places:
            return False
        storage, number = t.untyped_storage(), self.count
        self.count += 1
        self.places[key] = number, ref(storage, partial(self._free, key))
        is_logits = t.dim() == 2 and t.size(-1) == self.vocabulary
        self.live[number] = storage.nbytes(), is_logits
        self.events.append((number, storage.nbytes()))
        self.bytes += storage.nbytes()
        if self.bytes > self.most:
            self.most, self.at_peak = self.bytes, dict(self.live)
        return True

    def _free(self, key: int, _: object) -> None:
        number, _ = self.places.pop(key)
        self.events.append((number, 0))
        self.bytes -= self.live.pop(number)[0]

    def _record(self, func: Any, args: Any, kwargs: Any, new: list[Tensor]) -> None:
        leaves, structure = tree_flatten((args, kwargs))
        specs = tuple(spec(x) if isinstance(x, Tensor) else x for x in leaves)
        self.operations[Operation(func, specs, tuple(map(spec, new)), structure)] += 1

    def number(self, t: Tensor) -> int:
        """Of the storage of a tensor that lives."""
        return self.places[_key(t)][0]

    def parts(self, gradients: set[int]) -> Parts:
        """Bytes at the peak; `gradients` are the storages' numbers."""
        parts = dict.fromkeys((ACTIVATIONS, GRADIENTS, LOGITS, WORKING), 0)
        for number, (size, is_logits) in self.at_peak.items():
            if number in gradients:
                part = GRADIENTS
            elif is_logits:
                part = LOGITS
            else:
                part = ACTIVATIONS if number in self.kept else WORKING
            parts[part] += size
        return parts


def _gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def spec(t: Tensor) -> Spec:
    """A tensor's shape, strides and dtype."""
    return Spec(tuple(t.shape), tuple(t.stride()), t.dtype)


def _key(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)
