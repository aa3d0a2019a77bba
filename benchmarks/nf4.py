"""The product with a weight of 4 bits: ours, bitsandbytes', and what the machine can do.

One linear layer without bias in float32, (out, in) as in Llama 7B and SmolLM2, on 1, 128 and 512
rows.  `forward` keeps no graph; `both` is forward and backward to the input.  Sides, in turn in one
process:

    minigpt        minigpt_kernels.nf4_linear
    bitsandbytes   its Linear4bit, with double quantization, as transformers builds it; its own
                   product for few rows needs a processor with AVX512-BF16
    dense          the product with the float32 weight alone
    dense bf16     the same in bfloat16, where the processor has instructions for it: elsewhere it
                   takes many times as long
    read           one pass over the packed bytes

`load` is the time to quantise the weight.  Outputs and gradients must agree.

    python -m benchmarks.nf4                      -> results/nf4.csv
    columns: shape, rows, what (forward, both, load), side, round, seconds
"""

import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.common import OURS, fresh, options, write_each
from minigpt_kernels import nf4
from minigpt_kernels.nf4_linear import nf4_linear

BNB, DENSE, BF16, READ = "bitsandbytes", "dense", "dense bf16", "read"
SIDES = (OURS, BNB, DENSE, BF16, READ)
SHAPES = ((4096, 4096), (4096, 14336), (576, 1536))
ROWS = (1, 128, 512)
WARM_UP = 2

Product = Callable[[Tensor], Tensor]


def their_layer(weight: Tensor) -> Any:
    """bitsandbytes' layer of this weight."""
    bnb: Any = import_module("bitsandbytes.nn")
    out_features, in_features = weight.shape
    layer: Any = bnb.Linear4bit(
        *(in_features, out_features, False),
        compute_dtype=torch.float32,
        compress_statistics=True,
        quant_type="nf4",
    )
    layer.weight = bnb.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    return layer.to("cpu")


def products(weight: Tensor) -> dict[str, Product]:
    """The forward pass of each side."""
    packed, theirs, half = nf4.quantize(weight), their_layer(weight), weight.bfloat16()
    words = packed.packed.view(torch.int64)
    sides: dict[str, Product] = {
        OURS: lambda x: nf4_linear(x, packed),
        BNB: lambda x: theirs.train(x.requires_grad)(x),
        DENSE: lambda x: linear(x, weight),
        BF16: lambda x: linear(x.bfloat16(), half),
        READ: lambda x: words.sum(),
    }
    probe = torch.randn(8, weight.shape[1])
    float32, bfloat16 = (timed(partial(both, sides[side], probe)) for side in (DENSE, BF16))
    if bfloat16 > 3 * float32:
        del sides[BF16]
    return sides


def forward(product: Product, x: Tensor) -> Tensor:
    with torch.no_grad():
        return product(x)


def both(product: Product, x: Tensor) -> Tensor:
    """The gradient of the input."""
    x = x.detach().requires_grad_()
    y = product(x)
    return torch.autograd.grad(y, x, torch.ones_like(y))[0]


def check(sides: dict[str, Product], x: Tensor) -> None:
    """Ours and theirs are the same product.

    Raises:
        ValueError: they differ by more than the few scales that they round to other codes.
    """
    for what in (forward, both):
        a, b = what(sides[OURS], x), what(sides[BNB], x)
        if (a - b).norm() > 2e-3 * b.norm():
            raise ValueError(f"{what.__name__} of {list(x.shape)} rows: the sides differ")


def measure(shape: tuple[int, int], rounds: int) -> list[dict[str, object]]:
    """All rows of one shape."""
    torch.manual_seed(0)
    weight = torch.randn(shape) / shape[1] ** 0.5
    sides = products(weight)
    rows: list[dict[str, object]] = []
    label = f"{shape[0]} x {shape[1]}"

    def add(count: int, what: str, side: str, round: int, seconds: float) -> None:
        if round >= 0:
            rows.append({"shape": label, "rows": count, "what": what, "side": side,
                         "round": round + 1, "seconds": seconds})  # fmt: skip

    for count in ROWS:
        x = torch.randn(count, shape[1])
        check(sides, x)
        for round in range(-WARM_UP, rounds):
            for what in (forward, both):
                for side, product in sides.items():
                    if side != READ or what is forward:
                        add(count, what.__name__, side, round, timed(partial(what, product, x)))
    loads: dict[str, Callable[[], object]] = {
        OURS: lambda: nf4.quantize(weight),
        BNB: lambda: their_layer(weight),
    }
    for round in range(-1, rounds):
        for side, load in loads.items():
            add(0, "load", side, round, timed(load))
    return rows


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main() -> None:
    given = options(__doc__ or "", rounds=9).parse_args()
    measures = {
        str(shape): partial(fresh, given.threads, measure, shape, given.rounds) for shape in SHAPES
    }
    write_each(given.out / "nf4.csv", given.threads, measures)


if __name__ == "__main__":
    main()
