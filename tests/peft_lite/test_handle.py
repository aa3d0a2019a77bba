"""What the handle promises, for every method on every model it is for."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite.handle import handle_of
from tests.peft_lite.peft_methods import (
    CASES,
    MERGEABLE,
    NO_WEIGHTS,
    TABLES,
    fresh,
    inputs,
    of,
    same,
    shake,
    steps,
    trained,
    trains_in_place,
)
from tests.peft_lite.peft_models import Picture

every_case = pytest.mark.parametrize(("kind", "method"), CASES, ids=map(" - ".join, CASES))


def cases(*methods: str, ours: bool = False) -> Any:
    chosen = [(k, m) for k, m in CASES if m.startswith(methods)]
    if ours:
        chosen = [(k, m) for k, m in chosen if k in ("gpt-neo", "bert")]
    return pytest.mark.parametrize(("kind", "method"), chosen, ids=map(" - ".join, chosen))


def checkpoint_name(model: Any, name: str) -> str:
    return model.names.to_hf(name) if hasattr(model, "names") else name


def mergeable(method: str) -> bool:
    return method.startswith(MERGEABLE)


def shaken(kind: str, method: str) -> tuple[Any, Tensor, Tensor, peft_lite.Handle]:
    """(model, input, output of the base, handle) with the method away from its start."""
    model, x = fresh(kind), inputs(kind)
    base = of(model, x)
    handle = peft_lite.attach(model, TABLES[kind][method])
    shake(trained(model).values())
    return model, x, base, handle


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))


def distance(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|"""
    return float((a.double() - b.double()).norm() / b.double().norm())


@every_case
def test_detach_restores_the_model_after_training(kind: str, method: str) -> None:
    model, x = fresh(kind), inputs(kind)
    first, last, *_ = list(model.parameters())
    first.requires_grad_(False)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 == 0
    before, attributes, base = Picture(model), set(vars(model)), of(model, x)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    handle = peft_lite.attach(model, TABLES[kind][method])
    assert Picture(model) != before
    steps(model, kind)
    if mergeable(method):
        handle.merge()
    handle.detach()
    assert not first.requires_grad
    assert last.requires_grad
    assert set(vars(model)) == attributes
    if method == "freezing":
        moved = {n for n, p in parameters.items() if not torch.equal(p, before.values[n])}
        assert moved == {
            n for n in parameters if trains_in_place(kind, method, checkpoint_name(model, n))
        }
        for name in moved:
            parameters[name].data.copy_(before.values[name])
    assert Picture(model) == before
    assert torch.equal(of(model, x), base)


@every_case
def test_own_parameters_train_and_all_others_stay_to_the_bit(kind: str, method: str) -> None:
    model = fresh(kind)
    base = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    chosen = {n for n in base if trains_in_place(kind, method, checkpoint_name(model, n))}
    peft_lite.attach(model, TABLES[kind][method])
    ids = {id(p) for p, _ in base.values()}
    new = {n: p for n, p in model.named_parameters() if id(p) not in ids}
    start = {n: p.detach().clone() for n, p in new.items()}
    assert chosen or new
    assert {id(p) for p in trained(model).values()} == {
        id(p) for p in [*new.values(), *(base[n][0] for n in chosen)]
    }
    steps(model, kind)
    assert {n for n, (p, value) in base.items() if not torch.equal(p, value)} == chosen
    assert [n for n, p in new.items() if torch.equal(p, start[n])] == []
    for p in model.parameters():
        assert (p.grad is not None) == p.requires_grad
        assert p.grad is None or p.grad.isfinite().all()


@every_case
def test_switched_off_the_model_is_its_base_and_then_the_method_again(
    kind: str, method: str
) -> None:
    model, x, base, handle = shaken(kind, method)
    attached, tuned = Picture(model), of(model, x)
    assert (tuned - base).abs().max() > 1e-3
    if method == "freezing":
        with pytest.raises(ValueError, match="no copy of the old values"), handle.enabled(False):
            pass
    else:
        with handle.enabled(False):
            assert torch.equal(of(model, x), base)
            with handle.enabled(False):
                assert torch.equal(of(model, x), base)
            assert torch.equal(of(model, x), base)
        with pytest.raises(KeyError, match="an accident"), handle.enabled(False):
            raise KeyError("an accident")
    with handle.enabled(True):
        assert torch.equal(of(model, x), tuned)
    assert torch.equal(of(model, x), tuned)
    assert Picture(model) == attached


@every_case
def test_modes_change_no_weight(kind: str, method: str) -> None:
    model = fresh(kind)
    handle = peft_lite.attach(model, TABLES[kind][method])
    assert not any(m.training for m in model.modules() if hasattr(m, "base"))
    shake(trained(model).values())
    for merged in (False, True):
        if merged and mergeable(method):
            handle.merge()
        values = Picture(model).values
        for training in (True, False, True):
            assert model.train(training) is model
            assert all(m.training is training for m in model.modules())
        assert same(Picture(model).values, values)


@cases(*MERGEABLE)
def test_merged_computes_the_same_and_unmerge_restores_to_the_bit(kind: str, method: str) -> None:
    model, x, base, handle = shaken(kind, method)
    attached, tuned = Picture(model), of(model, x)
    for _ in range(2):
        handle.merge()
        assert Picture(model) != attached
        close(of(model, x), tuned)
        assert (of(model, x) - base).abs().max() > 1e-3
        handle.unmerge()
        assert Picture(model) == attached
        assert torch.equal(of(model, x), tuned)


@pytest.mark.parametrize("kind", ["gpt-neo", "bert", "plain"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_merged_nothing_is_left_to_compute(kind: str, method: str) -> None:
    model, x, _, handle = shaken(kind, method)
    handle.merge()
    merged = of(model, x)
    for p in trained(model).values():
        p.data.fill_(torch.nan)
    assert torch.equal(of(model, x), merged)


@cases(*NO_WEIGHTS, "bias", "freezing")
def test_what_is_no_change_of_a_weight_is_not_merged(kind: str, method: str) -> None:
    model, x, _, handle = shaken(kind, method)
    attached, tuned = Picture(model), of(model, x)
    reason = "nothing to merge" if method in ("bias", "freezing") else "cannot merge 'default'.*no"
    with pytest.raises(ValueError, match=reason):
        handle.merge()
    with pytest.raises(ValueError, match="nothing to unmerge"):
        handle.unmerge()
    assert Picture(model) == attached
    assert torch.equal(of(model, x), tuned)


@cases(*MERGEABLE, "bias", "freezing", ours=True)
@pytest.mark.parametrize("merged", [False, True])
def test_fold_leaves_a_plain_model_that_can_be_saved(
    kind: str, method: str, merged: bool, tmp_path: Path
) -> None:
    plain = {n: type(m) for n, m in fresh(kind).named_modules()}
    model, x, _, handle = shaken(kind, method)
    tuned = of(model, x)
    if merged and mergeable(method):
        handle.merge()
    handle.fold()
    assert {n: type(m) for n, m in model.named_modules()} == plain
    assert all(p.requires_grad for p in model.parameters())
    close(of(model, x), tuned)
    minigpt.save(model, tmp_path)
    assert same(minigpt.load(tmp_path).state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="detached"):
        handle.fold()
    peft_lite.attach(model, TABLES[kind][method])


@cases(*NO_WEIGHTS)
def test_what_is_no_change_of_a_weight_is_not_folded(
    kind: str, method: str, tmp_path: Path
) -> None:
    model, x, _, handle = shaken(kind, method)
    attached, tuned = Picture(model), of(model, x)
    with pytest.raises(ValueError, match="cannot merge 'default'"):
        handle.fold()
    assert Picture(model) == attached
    assert torch.equal(of(model, x), tuned)
    if kind in ("gpt-neo", "bert"):
        with pytest.raises(ValueError, match="fold or detach"):
            minigpt.save(model, tmp_path)


@every_case
def test_a_copy_has_a_method_of_its_own(kind: str, method: str) -> None:
    model, x, base, handle = shaken(kind, method)
    attached, tuned = Picture(model), of(model, x)
    other: nn.Module = copy.deepcopy(model)
    assert torch.equal(of(other, x), tuned)
    twin_handle = handle_of(other)
    assert twin_handle is not handle
    assert same(twin_handle.state(), handle.state())
    steps(other, kind)
    assert not same(twin_handle.state(), handle.state())
    assert not torch.equal(of(other, x), tuned)
    assert Picture(model) == attached
    twin_handle.detach()
    if method != "freezing":
        assert torch.equal(of(other, x), base)
    assert torch.equal(of(model, x), tuned)
    assert Picture(model) == attached


@every_case
def test_a_state_dict_brings_the_method_back(kind: str, method: str) -> None:
    model, x, _, handle = shaken(kind, method)
    other = fresh(kind)
    peft_lite.attach(other, TABLES[kind][method])
    other.load_state_dict(model.state_dict())
    assert torch.equal(of(other, x), of(model, x))
    assert same(handle_of(other).state(), handle.state())


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_method_moves_to_another_dtype_with_its_model(
    kind: str, method: str, dtype: torch.dtype
) -> None:
    expected = fresh(kind).to(dtype)
    model, x, _, handle = shaken(kind, method)
    tuned = of(model, x)
    model.to(dtype)
    x = x if x.dtype == torch.long else x.to(dtype)
    output = of(model, x)
    assert output.dtype == dtype
    limit = 1e-5 if dtype == torch.float64 else 0.1
    assert distance(output, tuned) < limit
    if mergeable(method):
        handle.merge()
        assert distance(of(model, x), output) < limit
        handle.unmerge()
    assert torch.equal(of(model, x), output)
    if method != "freezing":
        with handle.enabled(False):
            assert torch.equal(of(model, x), of(expected, x))
        handle.detach()
        assert same(Picture(model).values, Picture(expected).values)


@cases(*MERGEABLE)
def test_a_merged_model_that_moves_to_another_dtype_gives_its_base_back(
    kind: str, method: str
) -> None:
    expected = fresh(kind).to(torch.bfloat16)
    model, x, _, handle = shaken(kind, method)
    handle.merge()
    merged = of(model, x)
    model.to(torch.bfloat16)
    x = x if x.dtype == torch.long else x.to(torch.bfloat16)
    assert distance(of(model, x), merged) < 0.1
    handle.unmerge()
    handle.detach()
    assert same(Picture(model).values, Picture(expected).values)
    assert torch.equal(of(model, x), of(expected, x))


@every_case
def test_saved_and_loaded_it_computes_the_same(kind: str, method: str, tmp_path: Path) -> None:
    model, x, _, handle = shaken(kind, method)
    handle.save(tmp_path)
    other = fresh(kind)
    loaded = peft_lite.load(other, tmp_path)
    close(of(other, x), of(model, x))
    assert loaded.active == handle.active == ["default"]
    if "mlp" not in method:
        assert {n for n, _ in trained(other).items()} == {n for n, _ in trained(model).items()}
    assert same(loaded.state(), handle.state())
