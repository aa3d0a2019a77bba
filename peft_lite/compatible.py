"""Which methods go together on one model, and why some do not."""

from collections.abc import Mapping

from torch import nn

from peft_lite.method import Method
from peft_lite.wrapper import Copied, WeightWrapper


def check_compatible(methods: Mapping[str, Method], name: str, new: Method) -> None:
    """Refuses a method that would not make sense beside those that are there, with the reason."""
    for other_name, other in methods.items():
        if new.kind == other.kind == "freeze":
            raise ValueError(f"{other_name!r} freezes already: detach it first")
        if {new.kind, other.kind} == {"prefix", "prompt"}:
            raise ValueError(
                f"a {new.kind} beside the {other.kind} {other_name!r}: both stand before the "
                "tokens, and which comes first is not defined"
            )
        if new.kind != other.kind:
            common = sorted(new.weights.keys() & other.weights.keys())
            if common:
                raise ValueError(f"{common[0]} trains under {other_name!r} already")
    together = {**methods, name: new}
    for a_name, a in together.items():
        for b_name, b in together.items():
            _check_pair(a_name, a, b_name, b)


def check_not_offloaded(model: nn.Module, new: Method) -> None:
    """Refuses weights that accelerate holds elsewhere but for a forward pass."""
    if any(p.is_meta for p in new.trained()) and any(
        hasattr(m, "_hf_hook") for m in model.modules()
    ):
        raise ValueError(
            "the model's weights are offloaded: what trains beside them would have no values; "
            "load the model without offloading"
        )


def _check_pair(a_name: str, a: Method, b_name: str, b: Method) -> None:
    """Two methods that can act at the same time, or one with itself."""
    if a is not b and a.kind == b.kind:
        return
    for place, wrapper in a.wrappers.items():
        if isinstance(wrapper, Copied):
            for name, other in [*b.wrappers.items(), *b.weights.items()]:
                if f"{name}.".startswith(f"{place}.") and other is not wrapper:
                    raise ValueError(f"{name}: {b_name!r} changes it, {a_name!r} trains it whole")
        elif isinstance(wrapper, WeightWrapper) and f"{place}.weight" in b.weights:
            raise ValueError(
                f"{place}.weight trains under {b_name!r}: {a_name!r} changes the same weight"
            )
