"""LoftQ: a weight in 4 bits and the LoRA that starts as what it lost, found together.
Li et al. 2023, https://arxiv.org/abs/2310.08659

    Q_t = quantize(W - s B_t-1 A_t-1)
    s B_t A_t = the best approximation of W - deq(Q_t) of rank R

from A_0 = B_0 = 0.  The second step never raises the error |W - deq(Q) - s B A|, the first may: the
best t is taken.  QPiSSA is the same from PiSSA's A_0 and B_0 (Meng et al. 2024, section 4,
https://arxiv.org/abs/2404.02948): W loses its principal part first, 4 bits hold the rest better.

The base is Q then, for good: detached, the model computes x deq(Q)^T + b.  After one iteration of
LoftQ Q is quantize(W), so that the adapter's file fits the model that `quantize` gives; otherwise Q
is another weight, and has to be kept with the file.

HF PEFT's `loftq_init` leaves s out, so that there the start is off unless s = 1.

Shapes:  R rank   W (out, in)   A (R, in)   B (out, R)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from minigpt_kernels import nf4
from peft_lite import lora, quantized
from peft_lite.handle import Handle, handle_of
from peft_lite.lora import LoraConfig, LoraLinear, product
from peft_lite.starts import pissa
from peft_lite.undo import all_or_nothing
from peft_lite.wrapper import Copied, dense_weight

Q = TypeVar("Q")
STARTS = ("loftq", "pissa")


def loftq(
    weight: Tensor,
    r: int,
    s: float,
    iterations: int,
    quantize: Callable[[Tensor], Q],
    dequantize: Callable[[Q], Tensor],
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Q, Tensor, Tensor]:
    """Q, A and B of the iteration with the least |W - deq(Q) - s B A|.

    Args:
        weight: W, float32.
        quantize, dequantize: W -> Q, and Q -> an approximation of W.
        start: A_0 and B_0; None: zeros.
    """
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 1:
        raise ValueError(f"iterations is {iterations!r}, must be a whole number of at least 1")
    least, best = math.inf, None
    rest = weight if start is None else weight - s * product(start[1], start[0])
    for _ in range(iterations):
        # Q_t = quantize(W - s B_t-1 A_t-1)
        Q_t = quantize(rest)
        # s B_t A_t ~ W - deq(Q_t)
        lost = weight - dequantize(Q_t)
        A, B = pissa(lost, r, s)
        update = s * product(B, A)
        error = torch.linalg.matrix_norm(lost - update).item()
        if error < least:
            least, best = error, (Q_t, A, B)
        rest = weight - update
    assert best is not None
    return best


@torch.no_grad()
def attach_quantized(
    model: nn.Module,
    config: LoraConfig,
    name: str = "default",
    codec: str = "nf4",
    skip: Sequence[str] = quantized.HEAD,
    double: bool = True,
    iterations: int = 1,
) -> Handle:
    """Puts the linear layers into 4 bits, as `quantize` does, and a LoRA on those that the config
    targets, which starts as what they lost.

    Args:
        config: its `init_lora_weights` is "loftq", or "pissa" for QPiSSA.
        name: of the LoRA.
        codec, skip, double: as in `quantize`.
        iterations: of quantizing and approximating; the best is taken.

    Returns:
        The model's handle.

    Raises:
        ValueError: what `quantize` and `attach` refuse, or a target that stays dense.  The model is
            unchanged.
    """
    start = config.init_lora_weights
    if type(config) is not LoraConfig or start not in STARTS:
        raise ValueError(
            f"a {type(config).__name__} with init_lora_weights {start!r} starts from no 4 bits: "
            f"must be a LoraConfig with {' or '.join(map(repr, STARTS))}; or quantize, then attach"
        )
    handle = handle_of(model)
    handle.check_name(name)
    layers = quantized.quantizable(model, codec, skip)
    method = lora.build(model, replace(config, init_lora_weights=True))
    for place, wrapper in method.wrappers.items():
        if isinstance(wrapper, Copied):
            if inside := [n for n in layers if f"{n}.".startswith(f"{place}.")]:
                raise ValueError(f"{inside[0]} trains whole, which 4 bits cannot: skip it")
            continue
        if place not in layers:
            raise ValueError(
                f"{place} is a target, and stays dense: it loses nothing to start from"
            )
        assert isinstance(wrapper, LoraLinear)
        lora.check_start(place, layers[place], len(wrapper.lora_a), start)
    weights = {}
    for place, layer in layers.items():
        quantized.check_finite(place, layer)
        quantize = partial(nf4.quantize, double=double)
        if not isinstance(lora_linear := method.wrappers.get(place), LoraLinear):
            weights[place] = quantize(layer.weight)
            continue
        W, r, s = dense_weight(layer), len(lora_linear.lora_a), lora_linear.scaling
        first = pissa(W, r, s) if start == "pissa" else None
        weight, A, B = loftq(W, r, s, iterations, quantize, nf4.dequantize, first)
        weights[place] = replace(weight, dtype=layer.weight.dtype)
        lora_linear.lora_a.copy_(A)
        lora_linear.lora_b.copy_(B)
    with all_or_nothing(handle):
        for place, weight in weights.items():
            quantized.replace(model, place, weight)
        handle.put(name, method)
    return handle
