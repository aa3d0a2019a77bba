"""How a model and the work of a step spread over processes.  Three ways, by torch's engines:

    none   one process has the model and all micro-batches
    ddp    each process has the whole model and its share of the micro-batches; their gradients are
           added up.  Li et al. 2020, https://arxiv.org/abs/2006.15704
    fsdp   and a W-th of every parameter, gradient and optimizer state: a block is gathered for its
           forward and again for its backward pass.  Rajbhandari et al. 2019, ZeRO stage 3,
           https://arxiv.org/abs/1910.02054; Zhao et al. 2023, https://arxiv.org/abs/2304.11277

The gradient of a step is that of one process on all its micro-batches, up to the order of sums:

    g = sum_w g_w,    g_w = sum_(i of process w) (n_i / n) d loss_i / d theta,    n = sum_i n_i

n_i are the labels of micro-batch i.  The engines average over processes, so each weighs its own by
W n_i / n.

Bytes that a process sends in a step, for P bytes of all parameters and G of the trainable ones'
gradients, by the ring algorithms (docs/scale.md):

    ddp    2 G (W - 1) / W                      all-reduce, once a step
    fsdp   (2 P + G) (W - 1) / W                two all-gathers and a reduce-scatter, each turn

Shapes:  W processes   w this one, which has ceil(n / W) of the n rows of a parameter, or the rest
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minigpt.data.order import number_of
from minigpt.training import memory
from minigpt.training.processes import Processes, group, started
from minigpt.training.snapshot import fingerprint
from peft_lite.quantized import QuantizedLinear, is_quantized

T = TypeVar("T")


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class Alone:
    """One process; what the loop asks of every way.

    Attributes:
        model: the model.
        processes: all of them.
        parameters: what this process updates, by the names of the model's parameters.
        cuts: whether that is a slice of each.
    """

    cuts = False

    def __init__(self, model: nn.Module, processes: Processes | None = None) -> None:
        self.model = model
        self.processes = processes or Processes()
        self.parameters = trained(model)

    @cached_property
    def frozen(self) -> str:
        """SHA-256 of all that does not train, of the whole model."""
        return fingerprint(self.model)

    def run(self, function: Callable[..., T], *inputs: Any) -> T:
        """function(model, *inputs), at all processes at once."""
        return function(self.model, *inputs)

    def turn(self, last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward pass of a turn; after the last one of a step the
        gradients of all processes are added up.
        """
        return nullcontext()

    def collect(self) -> None:
        """Gives `parameters` their gradients, after the last turn."""

    def total(self, squares: Tensor) -> Tensor:
        """The sum of squares of the gradient, given that of this process's `parameters`."""
        return squares

    def whole(self, name: str, t: Tensor) -> Tensor:
        """A tensor beside the parameter of this name, here as long as that is here, as a part of
        the whole; it shares the memory.
        """
        return t

    @torch.no_grad()
    def fill(self, place: Tensor, values: Tensor) -> None:
        """Writes the values of a whole tensor to such a place."""
        place.copy_(values)

    def gather(self) -> None:
        """Makes the model of process 0 a plain one; what the others have is no model then."""


class Replicated(Alone):
    """Each process has the whole model: torch's DistributedDataParallel."""

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        super().__init__(model, processes)
        processes.check_same("the base model", self.frozen)
        with warnings.catch_warnings():  # its next name is not known to earlier versions
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            self.replica = nn.parallel.DistributedDataParallel(
                Root(model), broadcast_buffers=False, gradient_as_bucket_view=True
            )

    def run(self, function: Callable[..., T], *inputs: Any) -> T:
        if not torch.is_grad_enabled():
            return function(self.model, *inputs)
        try:
            result: T = self.replica(function, *inputs)
        except RuntimeError as error:
            if "not used in producing loss" not in str(error):
                raise
            raise ValueError(
                "the loss does not reach every parameter that trains: freeze the others, or take "
                "--parallel fsdp"
            ) from None
        return result

    def turn(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.replica.no_sync()


class Sharded(Alone):
    """Each process has a W-th of every parameter: torch's `fully_shard`, a block at a time.

    Frozen and trainable parameters stand in one unit, codes of 4 bits, too.  What blocks share, and
    what stands in none, is gathered for the whole of a pass.

    In bf16 a block's matrices are gathered as autocast would round them.  Its vectors stay float32
    and are gathered with what blocks share: 1.003, a scale of IA3's, is 1 in bfloat16.

    Args:
        device: that of this process; the model may still be in main memory.
        bf16: the products are bfloat16.
    """

    cuts = True

    def __init__(
        self, model: nn.Module, processes: Processes, device: torch.device, bf16: bool
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        super().__init__(model, processes)
        processes.check_same("the base model", self.frozen)
        for name, p in trained(model).items():
            if p.dim() == 0:
                raise ValueError(f"{name} is a single number: it cannot be cut, use --parallel ddp")
        for layer in quantized_layers(model):
            layer.to_rows()
        self.mesh = init_device_mesh(device.type, (processes.size,))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast decides on those
        if narrow := bf16 and not quantized_layers(model):
            policy = replace(policy, param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        blocks: list[nn.Module] = list(model.blocks)  # type: ignore[arg-type]
        times = Counter(p for block in blocks for p in block.parameters())
        wide = {p for p, count in times.items() if count > 1 or (narrow and p.dim() == 1)}
        owners = [m for m in model.modules() if wide & {*m.parameters(recurse=False)}]
        self.places = [(m, n, p) for m in model.modules() for n, p in m._parameters.items()]
        for block in blocks:
            self._shard(block, policy, wide)
        self.root = Root(model, owners)
        cut = {p for block in blocks for p in block.parameters()} - wide
        self._shard(self.root, MixedPrecisionPolicy(), cut)
        self.sharded: dict[str, Any] = dict(trained(model))
        self.parameters = {n: nn.Parameter(_slice(p)) for n, p in self.sharded.items()}

    def _shard(self, unit: nn.Module, policy: Any, ignored: set[nn.Parameter]) -> None:
        """Puts slices in the place of the unit's parameters, whose memory is free then, whoever
        holds them.
        """
        from torch.distributed.fsdp import fully_shard

        replaced = {*unit.parameters()} - ignored
        fully_shard(unit, mesh=self.mesh, mp_policy=policy, ignored_params=ignored)
        for p in replaced:
            p.data = p.data.new_empty(0)

    def run(self, function: Callable[..., T], *inputs: Any) -> T:
        try:
            result: T = self.root(function, *inputs)
            return result
        finally:
            if not torch.is_grad_enabled():
                self.root.reshard()  # type: ignore[operator]  # no backward pass does it

    def collect(self) -> None:
        for name, p in self.sharded.items():
            if p.grad is not None:
                self.parameters[name].grad, p.grad = _slice(p.grad), None

    def total(self, squares: Tensor) -> Tensor:
        torch.distributed.all_reduce(squares)
        return squares

    def whole(self, name: str, t: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        p = self.sharded[name]
        if not t.dim():  # a count of steps
            return t
        sizes = {"shape": p.shape, "stride": p.stride()}
        return DTensor.from_local(t.detach(), self.mesh, p.placements, run_check=False, **sizes)

    @torch.no_grad()
    def fill(self, place: Tensor, values: Tensor) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(place, DTensor):  # all processes have read all values
            cut = distribute_tensor(values, self.mesh, place.placements, src_data_rank=None)
            place.to_local().copy_(cut.to_local())
        else:
            place.copy_(values)

    def gather(self) -> None:
        from torch.distributed.fsdp import FSDPModule

        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        full: set[nn.Parameter] = set()
        for module, name, p in self.places:
            if p is not None and p not in full:
                values = module._parameters[name].full_tensor()  # type: ignore[union-attr]
                p.data = values.cpu() if self.processes.first else p.data
                full.add(p)
        for module, name, p in self.places:
            module._parameters[name] = p
        for module in self.model.modules():  # beside the parameters
            module._buffers |= {n: b.cpu() for n, b in module._buffers.items() if b is not None}
        for layer in quantized_layers(self.model) if self.processes.first else ():
            layer.to_line()


class Root(nn.Module):
    """What the engines wrap: the model, called by a function, which may use any part of it.

    Args:
        shared: modules whose parameters more than one block uses.
    """

    def __init__(self, model: nn.Module, shared: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.model = model
        self.shared = nn.ModuleList(shared or [])

    def forward(self, function: Callable[..., T], *inputs: Any) -> T:
        """function(model, *inputs)"""
        return function(self.model, *inputs)


WAYS = ("none", "ddp", "fsdp")


def check(how: str) -> None:
    """Raises ValueError where torchrun has started processes that would not share the work, or none
    that could.
    """
    if how == "none" and (started() or 1) > 1:
        raise ValueError(
            f"--parallel is none, must be ddp or fsdp: torchrun has started {started()} processes"
        )
    if how != "none" and started() is None:
        raise ValueError(
            f"--parallel {how} shares the work between processes that torchrun starts: "
            "torchrun --nproc-per-node N -m minigpt ..., or else --parallel none"
        )


def spread(model: nn.Module, how: str, device: torch.device, bf16: bool) -> Alone:
    """The model, ready for a step at all processes; with one process every way is "none".

    Raises:
        ValueError: the processes have different base models, or a parameter cannot be cut.
    """
    processes = group()
    if processes.size == 1:
        return Alone(model)
    for p in trained(model).values():  # what is new in them was drawn
        torch.distributed.broadcast(p.data, 0)
    if how == "fsdp":
        memory.map_large_blocks()  # what is gathered comes and goes: a heap would keep its holes
        return Sharded(model, processes, device, bf16)
    return Replicated(model, processes)


@contextmanager
def drawing(seed: int, number: int, device: torch.device) -> Iterator[None]:
    """Random numbers of dropout that are those of this micro-batch, whichever process takes it.
    Outside, the generator goes on as if nothing had been drawn.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(number_of([seed, number]))
        yield


def quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    """Those that hold 4 bits."""
    return [layer for layer in model.modules() if is_quantized(layer)]


def _slice(t: Tensor) -> Tensor:
    """The part of a DTensor that this process has, in the same memory."""
    local: Tensor = t.detach().to_local()  # type: ignore[attr-defined]
    return local
