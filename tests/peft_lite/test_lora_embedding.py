"""LoRA of embedding tables against its closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import LoraConfig
from tests.closed_forms import (
    embedding_forward,
    embedding_gradients,
    lora_count,
    lora_gradients_of_weight,
    lora_scale,
    lora_weight,
)
from tests.peft_lite.peft_models import Picture, output, pair, perturb, tokens
from tests.rounding import DTYPES, close, random

IDS = torch.tensor([[3, 0, 16, 3], [5, 5, 3, 1]])  # some rows twice, most never
any_dtype = pytest.mark.parametrize("dtype", DTYPES)


def table(
    dtype: torch.dtype = torch.float64, V: int = 17, D: int = 6, **fields: Any
) -> tuple[nn.Module, Any, Any]:
    """A table of V rows of width D with a perturbed LoRA: (the model around it, handle, layer)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, D, dtype=dtype))
    handle: Any = peft_lite.attach(model, LoraConfig(["0"], **{"r": 4, "lora_alpha": 10, **fields}))
    perturb(handle)
    return model, handle, model[0]


def numbers(lora: Any) -> tuple[Tensor, Tensor, Tensor]:
    e, a, b = (p.detach().double() for p in (lora.base.weight, lora.lora_a, lora.lora_b))
    return e, a, b


@pytest.mark.parametrize("rslora", [False, True])
@any_dtype
def test_output_is_the_closed_form(dtype: torch.dtype, rslora: bool) -> None:
    model, _, lora = table(dtype, use_rslora=rslora)
    want = embedding_forward(IDS, *numbers(lora), lora_scale(10, 4, rslora))
    y = model(IDS)
    assert (y.dtype, y.shape) == (dtype, (2, 4, 6))
    close(y, want)


@pytest.mark.parametrize("rslora", [False, True])
@any_dtype
def test_gradients_are_scattered_to_the_columns_of_their_tokens(
    dtype: torch.dtype, rslora: bool
) -> None:
    model, _, lora = table(dtype, use_rslora=rslora)
    dy = random(2, 4, 6, seed=2, dtype=dtype)
    model(IDS).backward(dy)
    _, a, b = numbers(lora)
    da, db = embedding_gradients(IDS, dy.double(), a, b, lora_scale(10, 4, rslora))
    close(lora.lora_a.grad, da, dtype)
    close(lora.lora_b.grad, db, dtype)
    unused = [i for i in range(17) if i not in IDS]
    assert not lora.lora_a.grad[:, unused].any()
    assert all(p.grad is None for p in lora.base.parameters())


@any_dtype
def test_merged_unmerged_and_closed_form_agree_pairwise(dtype: torch.dtype) -> None:
    model, handle, lora = table(dtype)
    e, a, b = numbers(lora)
    want = embedding_forward(IDS, e, a, b, 2.5)
    attached, unmerged = Picture(model), model(IDS)
    handle.merge()
    merged = model(IDS)
    close(lora.base.weight, lora_weight(e.T, a, b, 2.5).T)
    close(unmerged, want)
    close(merged, want)
    close(merged, unmerged.detach().double())
    handle.unmerge()
    assert Picture(model) == attached
    assert torch.equal(model(IDS), unmerged)


@any_dtype
def test_at_the_start_a_is_zero_and_nothing_changes_to_the_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(170, 60, dtype=dtype))
    before = model(IDS)
    peft_lite.attach(model, LoraConfig(["0"], r=40, lora_alpha=99))
    lora: Any = model[0]
    assert torch.equal(model(IDS), before)
    assert not lora.lora_a.any()
    assert (lora.lora_a.shape, lora.lora_b.shape) == ((40, 170), (60, 40))
    assert lora.lora_b.std().item() == pytest.approx(1, abs=0.05)


def test_the_first_step_reaches_a_and_the_second_b() -> None:
    model, _, lora = table()
    lora.lora_a.data.zero_()
    optimizer = torch.optim.SGD(lora.trained(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        model(IDS).square().sum().backward()
        assert lora.lora_a.grad.any()
        assert bool(lora.lora_b.grad.any()) == (step == 1)
        optimizer.step()


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("gpt-neo", ["token", "position"]), ("bert", ["token", "position", "segment"])],
)
def test_model_equals_its_twin_with_dense_tables(
    kind: str, targets: list[str], tmp_path: Path
) -> None:
    """A tied head keeps its weight: the update belongs to the table alone."""
    ours, theirs = pair(kind, tmp_path)
    handle: Any = peft_lite.attach(ours, LoraConfig(targets, r=3, lora_alpha=7))
    perturb(handle)
    if kind == "gpt-neo":
        theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    before = output(theirs, tokens()).detach()
    wrappers = handle.methods["default"].wrappers
    assert len(wrappers) == len(targets)
    for name, lora in wrappers.items():
        e, a, b = numbers(lora)
        target = theirs.get_submodule(ours.names.to_hf(name))
        target.weight.data = torch.tensor(lora_weight(e.T, a, b, 7 / 3).T, dtype=torch.float32)
    after = output(theirs, tokens())
    assert (after - before).abs().max() > 0.05
    y = output(ours, tokens())
    close(y, after.detach(), roundings=200)

    dy = torch.randn(after.shape, generator=torch.Generator().manual_seed(4))
    after.backward(dy)
    y.backward(dy)
    for name, lora in wrappers.items():
        de = theirs.get_submodule(ours.names.to_hf(name)).weight.grad
        _, a, b = numbers(lora)
        da, db = lora_gradients_of_weight(de.T, a, b, 7 / 3)
        close(lora.lora_a.grad, da, roundings=500)
        close(lora.lora_b.grad, db, roundings=500)


def test_ids_that_are_not_in_the_table_are_refused_as_by_the_table_itself() -> None:
    model, _, _ = table()
    with pytest.raises(IndexError):
        model(torch.tensor([17]))


def test_a_and_b_are_float32_under_a_bf16_table() -> None:
    _, handle, lora = table(torch.bfloat16)
    assert lora.lora_a.dtype == lora.lora_b.dtype == torch.float32
    assert handle.report().trainable_bytes == 4 * lora_count(4, [(6, 17)])


def test_count_at_the_size_of_gpt_neo_125m() -> None:
    with torch.device("meta"):
        model = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        handle = peft_lite.attach(model, LoraConfig(["wte", "wpe"], r=8))
    added = lora_count(8, [(768, 50257), (768, 2048)])
    counts = handle.report()
    assert added == 8 * (50257 + 768 + 2048 + 768)
    assert (counts.trainable, counts.total) == (added, 125_198_592 + added)
    assert counts.share == pytest.approx(100 * added / (125_198_592 + added))


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    ids=st.lists(st.integers(0, 10**6), max_size=7),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    alpha=st.floats(0.25, 32),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_tables_of_any_size_are_the_closed_form(
    ids: list[int], sizes: tuple[int, int, int], alpha: float, dtype: torch.dtype, seed: int
) -> None:
    V, D, r = sizes
    model, handle, lora = table(dtype, V, D, r=r, lora_alpha=alpha)
    index = torch.tensor([i % V for i in ids], dtype=torch.long)
    dy = random(len(ids), D, seed=seed, dtype=dtype)
    y = model(index)
    y.backward(dy)
    e, a, b = numbers(lora)
    s = alpha / r
    da, db = embedding_gradients(index, dy.double(), a, b, s)
    limit = 16 * (len(ids) + r) * max(1.0, s) * torch.finfo(dtype).eps
    for got, want in (
        (y, embedding_forward(index, e, a, b, s)),
        (lora.lora_a.grad, da),
        (lora.lora_b.grad, db),
    ):
        torch.testing.assert_close(got.double(), torch.tensor(want), rtol=0, atol=limit)
    assert handle.report().trainable == lora_count(r, [(D, V)])
    handle.merge()
    close(lora.base.weight, lora_weight(e.T, a, b, s).T, roundings=2)
