"""The registry of methods, one line each."""

from typing import Any

from peft_lite import bias, bottleneck, dora, freeze, ia3, lora, prefix, prompt
from peft_lite.method import MethodSpec

METHODS: tuple[MethodSpec, ...] = (
    freeze.METHOD,
    bias.METHOD,
    lora.METHOD,
    dora.METHOD,
    ia3.METHOD,
    bottleneck.METHOD,
    prefix.METHOD,
    prompt.METHOD,
)


def method_of(config: Any) -> MethodSpec:
    """The method that a config belongs to."""
    for method in METHODS:
        if type(config) is method.config:
            return method
    known = ", ".join(method.config.__name__ for method in METHODS)
    raise ValueError(f"{type(config).__name__} is not a config, must be one of {known}")
