"""The hot path of parameter-efficient fine-tuning."""

from kernels.lora_function import Lora
from kernels.lora_linear import lora_linear, lora_linears
from kernels.optimizers import ClippedAdamW, ClippedSGD

__all__ = ["ClippedAdamW", "ClippedSGD", "Lora", "lora_linear", "lora_linears"]
