"""The hot path of parameter-efficient fine-tuning."""

from kernels.reference import lora_linear

__all__ = ["lora_linear"]
