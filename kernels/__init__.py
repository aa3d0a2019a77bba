"""The hot path of parameter-efficient fine-tuning."""

from . import lora_operator as lora_operator  # registers what torch.compile calls
from .lora import lora_linear
from .update import ClippedAdamW, ClippedSGD

__all__ = ["ClippedAdamW", "ClippedSGD", "lora_linear"]
