"""The weighted sum of several LoRAs as one.

    sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]

The ranks add up and the scaling of the sum is 1.
"""

import math
from collections.abc import Mapping

import torch
from torch import nn

from peft_lite.lora import LoraConfig, LoraEmbedding, LoraLayer, LoraLinear
from peft_lite.method import Method
from peft_lite.wrapper import Wrapper


@torch.no_grad()
def weighted_sum(parts: Mapping[str, Method], weights: Mapping[str, float]) -> Method:
    """One LoRA on every layer that one of the parts is on."""
    if not parts:
        raise ValueError("nothing to combine: give at least one adapter and its weight")
    for name, part in parts.items():
        if type(part.config) is not LoraConfig:
            raise ValueError(f"{name!r} is not a LoRA: only their updates can be summed")
        if part.weights or not all(isinstance(w, LoraLayer) for w in part.wrappers.values()):
            raise ValueError(f"{name!r} trains biases or whole modules, which cannot be summed")
        weight = weights[name]
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} is {weight!r}, must be a finite number")
    places = dict.fromkeys(place for part in parts.values() for place in part.wrappers)
    wrappers: dict[str, Wrapper] = {}
    for place in places:
        summands = [
            (weights[name] * w.scaling, w.layer, *w.factors())
            for name, part in parts.items()
            if isinstance(w := part.wrappers.get(place), LoraLayer)
        ]
        a = torch.cat([A for _, _, A, _ in summands])
        b = torch.cat([factor * B for factor, _, _, B in summands], 1)
        base, r = summands[0][1], len(a)
        config = LoraConfig([place], r=r, lora_alpha=r)
        kind = LoraLinear if isinstance(base, nn.Linear) else LoraEmbedding
        wrappers[place] = layer = kind(base, r, r, config)
        layer.lora_a.copy_(a)
        layer.lora_b.copy_(b)
    r = max(len(w.lora_a) for w in wrappers.values() if isinstance(w, LoraLayer))
    return Method("lora", LoraConfig(list(places), r=r, lora_alpha=r), wrappers)
