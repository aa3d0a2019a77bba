"""The counts of the write-ups, on the layers that they speak of."""

import torch
from torch import nn

import peft_lite


def lora_counts(rows: int, columns: int, r: int) -> tuple[int, int]:
    """Parameters of a weight (rows, columns) that LoRA of rank r trains, and that full tuning does:

    r (rows + columns) against rows columns
    """
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=False)})
        whole = peft_lite.report(model).trainable
        peft_lite.attach(model, peft_lite.LoraConfig(["layer"], r=r))
    return peft_lite.report(model).trainable, whole
