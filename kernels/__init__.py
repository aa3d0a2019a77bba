"""The hot path of parameter-efficient fine-tuning."""

from kernels.lora_linear import lora_linear
from kernels.optimizers import ClippedAdamW, ClippedSGD

__all__ = ["ClippedAdamW", "ClippedSGD", "lora_linear"]
