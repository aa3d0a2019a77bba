"""The hot path of parameter-efficient fine-tuning."""

from kernels.lora_linear import lora_linear

__all__ = ["lora_linear"]
