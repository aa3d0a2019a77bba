"""Parameter-efficient fine-tuning for any nn.Module: one method, one file, one equation."""

from typing import Any

from peft_lite.attach import attach, load
from peft_lite.bias import BiasConfig
from peft_lite.bottleneck import BottleneckConfig
from peft_lite.check import Trainability, check_trainable
from peft_lite.dora import DoraConfig
from peft_lite.freeze import FreezeConfig
from peft_lite.handle import Handle
from peft_lite.ia3 import IA3Config
from peft_lite.loftq import attach_quantized
from peft_lite.lora import LoraConfig
from peft_lite.methods import METHODS
from peft_lite.prefix import PrefixConfig
from peft_lite.prompt import PromptConfig
from peft_lite.quantized import QuantizedLinear, quantize
from peft_lite.report import Report, report

__all__ = [
    "BiasConfig",
    "BottleneckConfig",
    "DoraConfig",
    "FreezeConfig",
    "Handle",
    "IA3Config",
    "LoraConfig",
    "PrefixConfig",
    "PromptConfig",
    "QuantizedLinear",
    "Report",
    "Trainability",
    "attach",
    "attach_quantized",
    "check_trainable",
    "load",
    "quantize",
    "report",
]


def __getattr__(name: str) -> Any:
    """The config class of a method that is not listed above."""
    for method in METHODS:
        if method.config.__name__ == name:
            return method.config
    raise AttributeError(f"module 'peft_lite' has no attribute {name!r}")
