"""Putting methods on a model: `attach` and `load`."""

from pathlib import Path
from typing import Any

from torch import nn

from peft_lite import files
from peft_lite.handle import Handle, handle_of
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
            unexpected or of another shape, or a model without values.  The model is unchanged.
    """
    folder = Path(directory)
    config, raw, tensors = files.read(folder)
    with all_or_nothing(handle_of(model)):
        handle = attach(model, config, name)
        method = handle.methods[name]
        files.check_shape(model, method, raw, folder)
        places = handle.state(name)
        if any(place.is_meta for place in places.values()):
            raise ValueError(
                f"{folder}: the model is on the meta device and has no values: load those first"
            )
        # of the model's own tensors, which are written where they are
        own = [w.parameter.data for w in method.weights_once().values() if not w.keep]
        values = [p.clone() for p in own]
        try:
            files.fill(places, tensors, folder)
        except BaseException:
            for p, value in zip(own, values, strict=True):
                p.copy_(value)
            raise
    return handle
