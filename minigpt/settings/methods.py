"""The methods of fine-tuning as options of a command.

The configs of `peft_lite` declare the options at their fields (peft_lite/options.py); here they are
collected into one dataclass, and a config is made from what a command was given.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, make_dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

import peft_lite
from minigpt.settings.options import option
from peft_lite.method import MethodSpec, check_trains
from peft_lite.methods import METHODS
from peft_lite.options import Option, options_of, shown_default

SPECS = {method.name: method for method in METHODS}
NAMES = ("full", *SPECS)
LR = {"full": 5e-5, **{method.name: method.lr for method in METHODS}}  # peak rates

Use = tuple[MethodSpec, str, Option]  # a method, the field of its config, the option for it


def _uses() -> dict[str, list[Use]]:
    """Option name -> the methods that have it."""
    uses: dict[str, list[Use]] = {}
    for method in METHODS:
        for name, offered in options_of(method.config).items():
            uses.setdefault(offered.name, []).append((method, name, offered))
    return uses


USES = _uses()


def _groups(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """(method, text) -> text: the methods it is for, joined by commas."""
    groups: dict[str, str] = {}
    for method, text in pairs:
        groups[text] = f"{groups[text]}, {method}" if text in groups else method
    return groups


def _help(uses: list[Use]) -> str:
    """`bottleneck, lora: rank r (default: lora 8; bottleneck 64)`"""
    texts = _groups((method.name, offered.help) for method, _, offered in uses)
    text = "; ".join(f"{methods}: {help}" for help, methods in texts.items())
    defaults = _groups((m.name, shown_default(m.config, name)) for m, name, _ in uses)
    if len(defaults) == 1:
        (default,) = defaults
        return f"{text} (default: {default})" if default else text
    shown = "; ".join(f"{methods} {value}" for value, methods in defaults.items() if value)
    return f"{text} (default: {shown})"


if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class MethodOptions:
        """What trains: `method`, and an option for each name in `USES`; None: not given."""

        method: str = "lora"

        def __init__(self, **options: Any) -> None: ...

else:
    MethodOptions = make_dataclass(
        "MethodOptions",
        [
            ("method", str, option("what trains", "lora", choices=NAMES)),
            *(
                (name, uses[0][2].type | None, option(_help(uses), None, uses[0][2].choices))
                for name, uses in USES.items()
            ),
        ],
        namespace={"__doc__": "What trains.", "__module__": __name__},
        frozen=True,
        kw_only=True,
    )


def attach(
    model: nn.Module, options: MethodOptions, whole: Sequence[str] = ()
) -> peft_lite.Handle | None:
    """Puts the method on the model; None for full fine-tuning, where everything trains.

    Args:
        whole: modules that train whole beside it.  Freezing says itself what trains.
    """
    _check(options)
    if options.method == "full":
        for name, p in model.named_parameters():
            check_trains(name, p)
        model.requires_grad_(True)
        return None
    chosen = config(options)
    if whole and hasattr(chosen, "modules_to_save"):
        chosen = replace(chosen, modules_to_save=whole)
    return peft_lite.attach(model, chosen)


def config(options: MethodOptions) -> Any:
    """The config of the method, with a command's defaults where an option is not given."""
    method = SPECS[options.method]
    given = {}
    for name, offered in options_of(method.config).items():
        value = getattr(options, offered.name)
        if value is not None:
            given[name] = offered.read(value)
        elif offered.default is not None:
            given[name] = offered.default
    return method.config(**given) if method.from_options is None else method.from_options(given)


def _check(options: MethodOptions) -> None:
    """An option of another method is a mistake, not something to ignore."""
    for name, uses in USES.items():
        methods = [method.name for method, _, _ in uses]
        if getattr(options, name) is not None and options.method not in methods:
            flag = name.replace("_", "-")
            owners = " or ".join(methods)
            raise ValueError(f"--{flag} belongs to --method {owners}, not {options.method}")
