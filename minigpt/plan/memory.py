"""What memory each process needs, part by part.

    weights           as the checkpoint's config says, in float32, bfloat16 or 4 bits
    adapters          what the method adds
    gradients         of what trains, those that live at the peak
    optimizer state   AdamW's m and v: twice what trains
    activations, logits, working memory
                      counted in a step's trace (minigpt/plan/trace.py) at its peak
    communication     ddp: the gradients once more, in the buckets that are reduced
                      fsdp: one block's gradients before they are scattered, twice

Sharded over W processes (fsdp), weights, adapters, gradients and state are divided by W, as in ZeRO
(minigpt/plan/formulas.py).  Beside its shards a process holds, whole, one block, the next one that
is gathered meanwhile, and what stands outside of the blocks from the forward to the backward pass:

    gathered          2 max_i |block_i| + |embeddings, norms, head|

On a CPU the process itself comes on top: the libraries, and the holes of its heap
(minigpt/plan/allocator.py).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from minigpt.models.architecture import Model
from minigpt.plan import allocator
from minigpt.plan.trace import ACTIVATIONS, GRADIENTS, LOGITS, WORKING, Trace

WEIGHTS, ADAPTERS, STATE = "weights", "adapters", "optimizer state"
GATHERED, COMMUNICATION = "gathered", "communication"
LIBRARIES, HOLES = "libraries", "holes of the heap"
# what a first step adds to a process beyond its tensors: the code of kernels, MKL's buffers.
# Measured: 55 to 65 MB.  On the heap, temporary tensors within kernels leave 35 MB of holes more.
KERNELS, KERNELS_ON_HEAP = 60 * 10**6, 95 * 10**6
CONTEXT = 600 * 10**6  # an assumption: CUDA's context and cuBLAS' workspaces


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's tensors.

    Attributes:
        weights: what it had before the method came, buffers included; adapters: what came.
        trained: of all that trains.
        block, trained_block: the largest block, and the most that trains in one.
        rest: what stands outside of the blocks.
    """

    weights: int
    adapters: int
    trained: int
    block: int
    trained_block: int
    rest: int


def sizes(model: Model, base: set[int]) -> Sizes:
    """Of a model under a method; `base` has the ids of the parameters that it had before."""
    parameters = {id(p): p for p in model.parameters()}
    buffers = {id(b): b for b in model.buffers()}
    adapters = [p for key, p in parameters.items() if key not in base]
    blocks = [{id(t): t for t in (*b.parameters(), *b.buffers())} for b in model.blocks]
    inside = {key for block in blocks for key in block}
    everything = {**parameters, **buffers}
    return Sizes(
        weights=_bytes(everything.values()) - _bytes(adapters),
        adapters=_bytes(adapters),
        trained=_bytes(p for p in parameters.values() if p.requires_grad),
        block=max(_bytes(block.values()) for block in blocks),
        trained_block=max(_bytes(t for t in b.values() if t.requires_grad) for b in blocks),
        rest=_bytes(t for key, t in everything.items() if key not in inside),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def of_process(
    size: Sizes, trace: Trace, parallel: str = "none", processes: int = 1, paged: bool = False
) -> dict[str, int]:
    """The tensors of a process at the peak of a step, in bytes by part.

    Args:
        parallel: "none", "ddp" or "fsdp".
        paged: the optimizer's state is not where the model is.
    """
    W = processes if parallel == "fsdp" else 1
    parts = {
        WEIGHTS: -(-size.weights // W),
        ADAPTERS: -(-size.adapters // W),
        GRADIENTS: -(-trace.parts[GRADIENTS] // W),
        STATE: 0 if paged else -(-2 * size.trained // W),
        **{name: trace.parts[name] for name in (ACTIVATIONS, LOGITS, WORKING)},
    }
    if parallel == "ddp" and processes > 1:
        parts[COMMUNICATION] = size.trained
    if parallel == "fsdp" and processes > 1:
        parts[GATHERED] = 2 * size.block + size.rest
        parts[COMMUNICATION] = 2 * size.trained_block
    return parts


def on_cpu(
    parts: Mapping[str, int], size: Sizes, trace: Trace, resident: int, mapped: int | None = None
) -> dict[str, int]:
    """The same with what a process on a CPU holds beside its tensors.

    Args:
        resident: what it holds before it has the model.
        mapped: as in `allocator.held`.
    """
    state = [0, 0] if STATE not in parts or not parts[STATE] else [size.trained, size.trained]
    events = allocator.steps(trace.events, state)
    holes = allocator.held(events, mapped) - allocator.most_live(events)
    kernels = KERNELS if mapped else KERNELS_ON_HEAP
    return {**parts, LIBRARIES: resident + kernels, HOLES: max(0, holes)}
