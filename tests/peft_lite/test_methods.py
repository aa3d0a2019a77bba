"""A new method is one file and one line in the registry: everything else asks the registry."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lite
from minigpt.settings import methods as command
from minigpt.studies import encoder_methods
from peft_lite import files, methods
from peft_lite.method import Method, MethodSpec
from peft_lite.options import option, target
from peft_lite.select import Patterns, select_modules
from peft_lite.wrapper import Wrapper
from tests.peft_lite.peft_models import live


# the file of a method: y = base(x) + c t, t (out,) trains
@dataclass(frozen=True)
class ShiftConfig:
    target_modules: Patterns = field(metadata=target(default=("query",)))
    factor: float = field(default=2.0, metadata=option("factor", "the factor c", float))


class Shift(Wrapper):
    def __init__(self, base: nn.Module, width: int, factor: float) -> None:
        super().__init__(base)
        self.t, self.factor = nn.Parameter(torch.zeros(width)), factor

    def changed(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.factor * self.t

    def tensors(self) -> dict[str, Tensor]:
        return {"shift_t": self.t.data}


def build(model: nn.Module, config: ShiftConfig) -> Method:
    layers = select_modules(model, config.target_modules)
    wrappers = {n: Shift(m, m.out_features, config.factor) for n, m in layers.items()}  # type: ignore[arg-type]
    return Method("shift", config, wrappers)


METHOD = MethodSpec("shift", ShiftConfig, build, lr=1e-2, peft_types=("SHIFT",))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line in the registry, for the modules that read it."""
    for module in (methods, files, peft_lite):
        monkeypatch.setattr(module, "METHODS", (*methods.METHODS, METHOD))


def fresh(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ModuleDict({"query": nn.Linear(3, 5), "key": nn.Linear(5, 2)})


@pytest.mark.usefixtures("registered")
def test_it_is_attached_saved_and_loaded(tmp_path: Path) -> None:
    model, x = fresh(), torch.randn(4, 3)
    base = model["query"](x)  # type: ignore[index]
    handle = peft_lite.attach(model, ShiftConfig(["query"], factor=3.0))
    t = torch.randn(5)
    live(handle)["base_model.model.query.shift_t"].copy_(t)
    torch.testing.assert_close(model["query"](x), base + 3 * t)  # type: ignore[index]
    handle.save(tmp_path)
    other = fresh()
    peft_lite.load(other, tmp_path)
    torch.testing.assert_close(other["query"](x), base + 3 * t)  # type: ignore[index]


@pytest.mark.usefixtures("registered")
def test_the_package_and_the_command_offer_it() -> None:
    assert peft_lite.ShiftConfig is ShiftConfig
    offered = read_again(command)
    assert "shift" in offered.NAMES
    assert offered.LR["shift"] == 1e-2
    options = offered.MethodOptions(method="shift", factor=0.5)
    assert offered.config(options) == ShiftConfig(("query",), 0.5)
    with pytest.raises(ValueError, match="--factor belongs to --method shift, not lora"):
        offered.attach(fresh(), offered.MethodOptions(method="lora", factor=0.5))


@pytest.mark.usefixtures("registered")
def test_a_published_study_keeps_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "NAMES", read_again(command).NAMES)
    assert "shift" in command.NAMES
    assert "shift" not in read_again(encoder_methods).METHODS


def read_again(module: ModuleType) -> Any:
    """A second copy of a module, made with the registry as it is now."""
    assert module.__file__ is not None
    spec = importlib.util.spec_from_file_location("command_again", module.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    return again


def test_a_name_that_is_no_config_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'ShiftConfig'"):
        _ = peft_lite.ShiftConfig


def test_methods_have_names_and_config_classes_of_their_own() -> None:
    for values in (
        [m.name for m in methods.METHODS],
        [m.config for m in methods.METHODS],
        [name for m in methods.METHODS if m.name != "dora" for name in m.peft_types],
    ):
        assert len(set(values)) == len(values)
