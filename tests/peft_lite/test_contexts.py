"""Contexts inside each other, parts of models, copies, and layers with two names."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peft_lite
from peft_lite import BiasConfig, DoraConfig, FreezeConfig, IA3Config, LoraConfig
from peft_lite.handle import handle_of
from tests.peft_lite.peft_methods import fresh, of, shake
from tests.peft_lite.peft_models import Picture, tokens
from tests.peft_lite.photo import photo

X = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))


def two(first: Any = None, second: Any = None) -> tuple[nn.Module, peft_lite.Handle]:
    """A plain model with "a" that rests and "b" that acts."""
    model = fresh("plain")
    for i, (name, config) in enumerate({"a": first, "b": second}.items()):
        handle = peft_lite.attach(model, config or LoraConfig(["inner.0"], r=2), name)
        shake(handle.methods[name].trained(), seed=i)
    return model, handle


CHANGES: dict[str, Callable[[peft_lite.Handle, Path], object]] = {
    "switch": lambda handle, _: handle.switch("a"),
    "attach": lambda handle, _: peft_lite.attach(handle.model, IA3Config(["out"]), "c"),
    "load": lambda handle, folder: peft_lite.load(handle.model, folder, "c"),
    "combine": lambda handle, _: handle.combine("c", {"a": 1.0, "b": 1.0}),
    "merge": lambda handle, _: handle.merge(),
    "unmerge": lambda handle, _: handle.unmerge(),
    "fold": lambda handle, _: handle.fold(),
    "detach": lambda handle, _: handle.detach(),
    "detach one": lambda handle, _: handle.detach("b"),
    "copy": lambda handle, _: deepcopy(handle.model),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("context", ["enabled", "rows", "no rows"])
def test_nothing_changes_inside_a_context(change: str, context: str, tmp_path: Path) -> None:
    model, handle = two()
    handle.save(tmp_path, "a")
    before, output = photo(model), of(model, X)
    rows: list[str | None] = [None] * 3 if context == "no rows" else ["a", None, "b"]
    with handle.enabled(False) if context == "enabled" else handle.rows(rows):
        inside, acting = photo(model), of(model, X)
        # nothing acts, so that there is nothing to merge
        with pytest.raises(ValueError, match=r"inside (enabled|rows).*leave it first|not.* merge"):
            CHANGES[change](handle, tmp_path)
        assert photo(model) == inside
        assert torch.equal(of(model, X), acting)
    assert photo(model) == before
    assert torch.equal(of(model, X), output)


def test_contexts_inside_each_other_the_last_one_holds() -> None:
    model, handle = two(second=DoraConfig(["inner.0", "out"], r=2))
    base, by_b = of(fresh("plain"), X), of(model, X)
    handle.switch("a")
    by_a = of(model, X)
    handle.switch("b")
    before = photo(model)

    def rows(*outputs: Tensor) -> None:
        expected = torch.stack([output[i] for i, output in enumerate(outputs)])
        torch.testing.assert_close(of(model, X), expected, rtol=0, atol=1e-6)

    with handle.rows(["a", "b", None]):
        rows(by_a, by_b, base)
        with handle.rows([None, "a", "a"]):
            rows(base, by_a, by_a)
            with handle.enabled(False):
                rows(base, base, base)
                with handle.rows(["b", "b", "b"]), handle.enabled(True):
                    rows(by_b, by_b, by_b)
                rows(base, base, base)
            rows(base, by_a, by_a)
        rows(by_a, by_b, base)
    assert photo(model) == before


def test_contexts_that_are_left_in_another_order_end_as_they_began() -> None:
    model, handle = two()
    base, before, output = of(fresh("plain"), X), photo(model), of(model, X)
    first, second = handle.rows(["a", "a", "b"]), handle.enabled(False)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(of(model, X), base)
    with pytest.raises(ValueError, match="inside enabled"):
        handle.switch("a")
    second.__exit__(None, None, None)
    assert photo(model) == before
    assert torch.equal(of(model, X), output)
    handle.switch("a")


def test_the_acting_one_of_two_taken_off_is_told(caplog: pytest.LogCaptureFixture) -> None:
    _, handle = two()
    handle.detach("b")
    assert caplog.messages == ["no lora acts now: switch to 'a'"]
    assert handle.active == []
    handle.switch("a")
    handle.detach("a")
    assert len(caplog.messages) == 1


class Around(nn.Module):
    """A model around another."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.lm = inner
        self.value = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.lm(x))


PARTS: dict[str, tuple[Any, Callable[[nn.Module], nn.Module], Any]] = {
    "around": (LoraConfig(["out"]), Around, LoraConfig(["lm.out"])),
    "around, elsewhere": (LoraConfig(["out"]), Around, LoraConfig(["value"])),
    "around biases": (BiasConfig(), Around, LoraConfig(["value"])),
    "around freezing": (FreezeConfig(train=["out"]), Around, BiasConfig(["value"])),
    "a part": (LoraConfig(["inner.0"]), lambda m: m.inner, LoraConfig(["0"])),
    "a part, elsewhere": (LoraConfig(["out"]), lambda m: m.inner, LoraConfig(["0"])),
    "a part of biases": (BiasConfig(), lambda m: m.inner, LoraConfig(["0"])),
    "a copy of a part": (LoraConfig(["inner.0"]), lambda m: deepcopy(m.inner), BiasConfig()),
}


@pytest.mark.parametrize(("config", "other_model", "other"), PARTS.values(), ids=PARTS)
def test_methods_around_or_within_methods_are_refused(
    config: Any, other_model: Callable[[nn.Module], nn.Module], other: Any
) -> None:
    model = fresh("plain")
    before = Picture(model)
    handle = peft_lite.attach(model, config)
    part = other_model(model)
    attached = Picture(model)
    with pytest.raises(ValueError, match=r"shares modules with this|stands in this|no methods"):
        peft_lite.attach(part, other)
    assert Picture(model) == attached
    assert not handle_of(part).methods
    handle.detach()
    assert Picture(model) == before
    if not isinstance(part, Around):
        return
    peft_lite.attach(part, other).detach()
    assert Picture(model) == before


def test_the_whole_attached_model_can_be_copied_and_the_copy_is_on_its_own() -> None:
    model, handle = two(second=BiasConfig())
    copies = [deepcopy(model), deepcopy(handle).model]
    output = of(model, X)
    for copy in copies:
        assert handle_of(copy).model is copy
        assert torch.equal(of(copy, X), output)
        handle_of(copy).switch("a")
        handle_of(copy).fold()
    assert handle.active == ["a", "b"]
    assert torch.equal(of(model, X), output)


# --- one layer under two names ------------------------------------------------------------------


class Shared(nn.Module):
    """T5's way: a table that is a part of two modules; and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(9, 6)
        self.encoder = nn.ModuleDict({"embed": self.shared})
        layer = nn.Linear(6, 6)
        self.layers = nn.Sequential(layer, nn.Tanh(), layer)

    def forward(self, ids: Tensor) -> Tensor:
        return self.layers(self.encoder["embed"](ids)) + self.shared(ids)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(["shared", "layers.0"], r=2),
        DoraConfig(["shared", "layers.0"], r=2),
        IA3Config(["layers.0"]),
        LoraConfig(["shared"], r=2, modules_to_save=["layers.0"]),
    ],
)
def test_a_layer_under_two_names_changes_at_both(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shared().double()
    plain, ids, before = deepcopy(model), torch.arange(9)[None], Picture(model)
    handle = peft_lite.attach(model, config)
    shake(handle.methods["default"].trained())
    tuned = of(model, ids)
    handle.save(tmp_path)
    assert model.encoder["embed"] is model.shared
    assert model.layers[0] is model.layers[2]
    handle.merge()
    torch.testing.assert_close(of(model, ids), tuned, rtol=0, atol=1e-10)
    handle.unmerge()
    torch.testing.assert_close(of(model, ids), tuned, rtol=0, atol=1e-10)
    other = deepcopy(plain)
    peft_lite.load(other, tmp_path)
    torch.testing.assert_close(of(other, ids), tuned, rtol=0, atol=1e-6)
    folded = deepcopy(model)
    handle_of(folded).fold()
    torch.testing.assert_close(of(folded, ids), tuned, rtol=0, atol=1e-10)
    plain.load_state_dict(folded.state_dict())
    torch.testing.assert_close(of(plain, ids), tuned, rtol=0, atol=1e-10)
    handle.detach()
    assert Picture(model) == before


# --- state outside the module tree --------------------------------------------------------------


def test_a_state_dict_that_would_lack_or_repeat_something_is_refused() -> None:
    model, handle = two(BiasConfig(), LoraConfig(["inner.2"], r=2))
    state = model.state_dict()
    handle.merge("b")
    for call in (model.state_dict, lambda: model.load_state_dict(state), model.inner.state_dict):
        with pytest.raises(ValueError, match="count its change twice"):
            call()
    handle.unmerge()
    model.load_state_dict(model.state_dict())
    peft_lite.attach(model, BiasConfig(["inner.0"]), "c")
    with pytest.raises(ValueError, match="lacks what 'a' tuned while it rests"):
        model.state_dict()
    with pytest.raises(ValueError, match="lacks what 'a' tuned"):
        deepcopy(model).state_dict()
    handle.detach("a")
    assert model.state_dict().keys() == state.keys()
    handle.detach()
    assert not model._state_dict_pre_hooks


@pytest.mark.parametrize("targets", [["head"], ["wte"], ["head", "wte"]])
@pytest.mark.parametrize("leave", ["unmerge", "detach"])
def test_a_weight_that_was_untied_has_moved_with_its_model(targets: list[str], leave: str) -> None:
    model = fresh("gpt-neo")
    expected = {n: p.detach().bfloat16() for n, p in fresh("gpt-neo").named_parameters()}
    handle = peft_lite.attach(model, LoraConfig(targets, r=2))
    shake(handle.methods["default"].trained())
    handle.merge(untie=True)
    model.bfloat16()
    getattr(handle, leave)()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with handle.enabled(False):
        of(model, tokens())
    if leave == "unmerge":
        handle.detach()
    assert model.head.weight is model.embeddings.token.weight
    assert {n: p.detach() for n, p in model.named_parameters()}.keys() == expected.keys()
    assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())


def test_a_model_that_is_offloaded_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    for config in (LoraConfig(["out"]), BiasConfig(), FreezeConfig(train=["out"])):
        model = fresh("plain")
        accelerate.cpu_offload(model, torch.device("cpu"))
        with pytest.raises(ValueError, match="offloaded"):
            peft_lite.attach(model, config)
