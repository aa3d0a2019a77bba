"""LoRA+: B learns faster than A.  Hayou et al. 2024, https://arxiv.org/abs/2402.12354

    A <- A - eta u_A        B <- B - lambda eta u_B        u: AdamW's direction

A sums over the width of the model, B over R numbers alone: in a wide model the rate at which A is
stable is too low for B.  The paper takes lambda = 16, perhaps with a smaller eta.

Vectors (biases, DoRA's magnitudes) sum over no width and learn at B's rate, as in the authors' code
and HF PEFT's `create_loraplus_optimizer`.  PEFT differs in two things.  It has one rate for both
matrices of an embedding, 1e-6 by default; here they are as all others.  Its weight decay is 0 by
default, and for biases always; here it is the run's for all.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn


def groups(parameters: Mapping[str, nn.Parameter], ratio: float | None) -> list[dict[str, Any]]:
    """Groups for an optimizer; each one's rate is the run's times its `factor`.

    Args:
        ratio: lambda; None: one group.

    Raises:
        ValueError: a ratio where no B trains.
    """
    if ratio is None:
        return [{"params": [*parameters.values()], "factor": 1.0}]
    if not any(map(_is_b, parameters)):
        raise ValueError(
            f"loraplus_lr_ratio is {ratio:g}, but nothing that trains has an A and a B: "
            "only the methods lora and dora do"
        )
    factors = {n: ratio if _is_b(n) or p.dim() == 1 else 1.0 for n, p in parameters.items()}
    return [
        {"params": [p for n, p in parameters.items() if factors[n] == factor], "factor": factor}
        for factor in dict.fromkeys((1.0, ratio))
    ]


def _is_b(name: str) -> bool:
    return name.rpartition(".")[2] == "lora_b"
