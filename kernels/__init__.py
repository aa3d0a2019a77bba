"""The hot path of parameter-efficient fine-tuning."""

from .lora_function import Lora
from .lora_linear import lora_linear, lora_linears
from .update import ClippedAdamW, ClippedSGD

__all__ = ["ClippedAdamW", "ClippedSGD", "Lora", "lora_linear", "lora_linears"]
