"""Putting methods on a model: `attach` and `load`."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from peft_lite import files
from peft_lite.handle import Handle, handle_of
from peft_lite.json_files import printable
from peft_lite.methods import method_of
from peft_lite.undo import all_or_nothing


def attach(model: nn.Module, config: Any, name: str = "default") -> Handle:
    """Puts the method of `config` on `model` under a name, and makes it active.

    Only the parameters it trains require a gradient.  A method of another kind that is already
    attached stays active; one of the same kind is switched off (`switch` activates it again).

    Returns:
        The model's handle, the same for all its methods.

    Raises:
        ValueError: a pattern matches nothing, the name is taken, or the methods are not compatible.
            The model is unchanged.
    """
    method = method_of(config)
    handle = handle_of(model)
    handle.check_name(name)
    handle.put(name, method.build(model, config))
    return handle


def load(model: nn.Module, directory: str | Path, name: str = "default") -> Handle:
    """Puts a saved method on `model`, one written here or by HF PEFT.

    Raises:
        ValueError: a broken file, a setting that is not supported, tensors that are missing,
            unexpected, of another shape or kind or not finite, or copies of weights that are not
            this model's.  The message is one line; the model is unchanged.
    """
    handle_of(model).check_name(name)
    with all_or_nothing(handle_of(model)):
        try:
            config, tensors = files.read(model, Path(directory))
            handle = attach(model, config, name)
        except ValueError as error:
            raise ValueError(printable(str(error), 1000)) from None
        with torch.no_grad():
            files.fill(model, handle.methods[name], tensors)
    return handle
