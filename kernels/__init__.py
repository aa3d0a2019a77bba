"""The hot path of parameter-efficient fine-tuning."""

from .lora import lora_linear
from .update import ClippedAdamW, ClippedSGD

__all__ = ["ClippedAdamW", "ClippedSGD", "lora_linear"]
