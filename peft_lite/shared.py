"""Query, key and value in one go, where LoRA changes at least two of them.

    xA = drop(x) [A_q; A_k; A_v]^T      one pass over x, one mask     (kernels/lora_function.py)

The model projects x to q, k and v through a slot (minigpt/models/slots.py); the wrapper in that
slot hands what it finds to `lora_linears`.  The layers stay what they are: where one of them is
merged, steps aside, is for some rows only or has another method around it, it is called as ever.
"""

from typing import Any

from torch import Tensor, nn

from minigpt_kernels import lora_linears
from peft_lite import wrapper
from peft_lite.lora import LoraLinear
from peft_lite.wrapper import Wrapper, named_layers


class SharedProjection(Wrapper):
    """Stands around the slot that projects x to q, k and v."""

    def changed(self, x: Tensor, *layers: nn.Module) -> Any:
        """(..., K) -> q, k, v"""
        found = [own for layer in layers if (own := alone(layer)) is not None]
        if len(found) < 2 or len({own.p for own in found}) > 1:
            return self.base(x, *layers)
        shared = iter(lora_linears(x, [own.product for own in found], found[0].p))
        return tuple(layer(x) if alone(layer) is None else next(shared) for layer in layers)


def alone(layer: nn.Module) -> LoraLinear | None:
    """The LoRA that is all there is to a layer's change, if there is one."""
    while not (layer._forward_hooks or layer._forward_pre_hooks):  # those want to be called
        if not isinstance(layer, LoraLinear) or layer.acts:
            return layer if type(layer) is LoraLinear and layer.rows is None else None
        layer = layer.base
    return None


def install(model: nn.Module) -> None:
    """Puts a shared projection into every slot of the model that is for one."""
    for name, module in list(named_layers(model)):
        if isinstance(getattr(module, "project", None), nn.Module) and hasattr(module, "query"):
            place = f"{name}.project"
            wrapper.insert(model, place, SharedProjection(module.get_submodule("project")))


def remove(model: nn.Module) -> None:
    """Takes them out again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SharedProjection):
            model.set_submodule(name, module.base, strict=True)
