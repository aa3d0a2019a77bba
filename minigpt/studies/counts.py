"""The published models, and layers of the sizes that the write-ups speak of, to be counted: they
have shapes and no values.
"""

import torch
from torch import nn

import peft_lite
from minigpt.models.architecture import without_values
from minigpt.models.gpt_neo import GPTNeo, GPTNeoConfig


def gpt_neo_125m() -> GPTNeo:
    """GPT-Neo-125M: 125,198,592 parameters."""
    with without_values():
        return GPTNeo(GPTNeoConfig())


def lora_counts(rows: int, columns: int, r: int) -> tuple[int, int]:
    """Parameters of a weight (rows, columns) that LoRA of rank r trains, and that full tuning does:

    r (rows + columns) against rows columns
    """
    with torch.device("meta"):
        model = nn.ModuleDict({"layer": nn.Linear(columns, rows, bias=False)})
        full = peft_lite.report(model).trainable
        peft_lite.attach(model, peft_lite.LoraConfig(["layer"], r=r))
    return peft_lite.report(model).trainable, full
