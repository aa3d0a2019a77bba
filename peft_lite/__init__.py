"""Parameter-efficient fine-tuning for any nn.Module: one method, one file, one equation."""

from peft_lite.attach import Handle, attach, load
from peft_lite.freeze import FreezeConfig
from peft_lite.lora import LoraConfig
from peft_lite.report import Report, report

__all__ = ["FreezeConfig", "Handle", "LoraConfig", "Report", "attach", "load", "report"]
