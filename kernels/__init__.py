"""The hot path of parameter-efficient fine-tuning."""

from .lora import lora_linear
from .optimizers import ClippedAdamW, ClippedSGD
from .siblings import Lora, lora_linears

__all__ = ["ClippedAdamW", "ClippedSGD", "Lora", "lora_linear", "lora_linears"]
