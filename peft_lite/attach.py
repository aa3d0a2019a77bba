"""Putting methods on a model: `attach` and `load`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from peft_lite import bias, bottleneck, dora, files, freeze, ia3, lora, prefix, prompt
from peft_lite.handle import Handle, handle_of
from peft_lite.method import Method

METHODS: dict[type, Callable[[nn.Module, Any], Method]] = {
    lora.LoraConfig: lora.build,
    dora.DoraConfig: dora.build,
    bottleneck.BottleneckConfig: bottleneck.build,
    prefix.PrefixConfig: prefix.build,
    prompt.PromptConfig: prompt.build,
    bias.BiasConfig: bias.build,
    ia3.IA3Config: ia3.build,
    freeze.FreezeConfig: freeze.build,
}


def attach(model: nn.Module, config: Any, name: str = "default") -> Handle:
    """Puts the method of `config` on `model` under a name, and makes it active.

    What it trains requires a gradient; of the model itself nothing else does.  A method of another
    kind that is there already goes on acting, one of the same kind steps aside (`switch` brings it
    back).

    Returns:
        The model's handle, the same for all its methods.

    Raises:
        ValueError: a pattern matches nothing, the name is taken, or the methods do not go
            together.  The model is then as it was.
    """
    build = METHODS.get(type(config))
    if build is None:
        known = ", ".join(kind.__name__ for kind in METHODS)
        raise ValueError(f"{type(config).__name__} is no config, must be one of {known}")
    handle = handle_of(model)
    handle.check_name(name)
    handle.put(name, build(model, config))
    return handle


def load(model: nn.Module, directory: str | Path, name: str = "default") -> Handle:
    """Puts a saved method on `model`, one written here or by HF PEFT.

    Raises:
        ValueError: a broken file, a setting there is no code for, or tensors that are missing,
            unexpected or of another shape.  The model is then as it was.
    """
    folder = Path(directory)
    config, raw, tensors = files.read(folder)
    acting = handle_of(model).active
    handle = attach(model, config, name)
    try:
        files.check_shape(model, handle.methods[name], raw, folder)
        files.fill(handle.state(name), tensors, folder)
    except ValueError:
        handle.detach(name)
        for one in acting:
            handle.switch(one)
        raise
    return handle
