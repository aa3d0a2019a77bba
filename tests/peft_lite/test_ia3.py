"""IA3 against its closed form: scaled outputs and scaled inputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import IA3Config
from tests.closed_forms import ia3_forward, ia3_gradients, ia3_weight
from tests.peft_lite.peft_models import Picture, Plain, output, pair, tokens
from tests.rounding import DTYPES, close, random

PAPER = IA3Config(["key", "value", "mlp.down"], ["mlp.down"])
either_side = pytest.mark.parametrize("before", [False, True], ids=["outputs", "inputs"])
any_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
any_dtype = pytest.mark.parametrize("dtype", DTYPES)


def layer(
    before: bool,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    K: int = 13,
    N: int = 9,
    seed: int = 5,
) -> tuple[nn.Module, Any, Any]:
    """A linear layer K -> N with a perturbed IA3: (the model around it, handle, IA3 layer)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N, bias=bias, dtype=dtype))
    handle: Any = peft_lite.attach(model, IA3Config(["0"], ["0"] if before else []))
    ia3: Any = model[0]
    ia3.scale.data.copy_(random(len(ia3.scale), seed=seed))
    return model, handle, ia3


def numbers(ia3: Any) -> tuple[Tensor, Tensor | None, Tensor]:
    bias = None if ia3.base.bias is None else ia3.base.bias.detach().double()
    return ia3.base.weight.detach().double(), bias, ia3.scale.detach().double()


@any_dtype
@any_bias
@either_side
def test_output_is_the_closed_form(before: bool, bias: bool, dtype: torch.dtype) -> None:
    model, _, ia3 = layer(before, bias, dtype)
    assert ia3.scale.shape == ((13,) if before else (9,))
    x = random(2, 5, 13, seed=1, dtype=dtype)
    y = model(x)
    assert y.dtype == dtype
    close(y, ia3_forward(x.double(), *numbers(ia3), before))


@any_dtype
@any_bias
@either_side
def test_gradients_are_the_closed_form(before: bool, bias: bool, dtype: torch.dtype) -> None:
    model, _, ia3 = layer(before, bias, dtype)
    x = random(6, 13, seed=1, dtype=dtype).requires_grad_(True)
    dy = random(6, 9, seed=2, dtype=dtype)
    model(x).backward(dy)
    dx, dl = ia3_gradients(x.detach().double(), dy.double(), *numbers(ia3), before)
    assert x.grad is not None
    close(x.grad, dx)
    close(ia3.scale.grad, dl, dtype)
    assert ia3.scale.grad.dtype == ia3.scale.dtype
    assert all(p.grad is None for p in ia3.base.parameters())


def test_a_scaled_output_scales_the_bias_and_a_scaled_input_does_not() -> None:
    nothing = torch.zeros(1, 13, dtype=torch.float64)
    for before in (False, True):
        model, _, ia3 = layer(before)
        _, bias, scale = numbers(ia3)
        assert bias is not None
        close(model(nothing)[0], bias if before else scale * bias)


@any_dtype
@any_bias
@either_side
def test_merged_unmerged_and_closed_form_agree_pairwise(
    before: bool, bias: bool, dtype: torch.dtype
) -> None:
    model, handle, ia3 = layer(before, bias, dtype)
    x = random(5, 13, seed=1, dtype=dtype)
    attached, unmerged = Picture(model), model(x)
    weight, beta = ia3_weight(*numbers(ia3), before)
    want = x.double().numpy() @ weight.T + (0.0 if beta is None else beta)
    handle.merge()
    merged = model(x)
    close(ia3.base.weight, weight)
    if beta is not None:
        close(ia3.base.bias, beta)
    close(unmerged, want)
    close(merged, want)
    close(merged, unmerged.detach().double())
    handle.unmerge()
    assert Picture(model) == attached
    assert torch.equal(model(x), unmerged)


@any_dtype
@either_side
def test_at_the_start_nothing_changes_to_the_bit(before: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9, dtype=dtype))
    x = random(5, 13, seed=1, dtype=dtype)
    plain = model(x)
    peft_lite.attach(model, IA3Config(["0"], ["0"] if before else []))
    assert torch.equal(model(x), plain)


def shake(handle: Any) -> None:
    for i, p in enumerate(handle.methods["default"].trained()):
        p.data.add_(0.3 * random(*p.shape, seed=i).to(p.dtype))


@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_model_equals_its_twin_with_dense_weights(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)
    handle: Any = peft_lite.attach(ours, PAPER)
    shake(handle)
    plain = output(theirs, tokens()).detach()
    wrappers = handle.methods["default"].wrappers
    assert {n.split(".", 2)[2] for n in wrappers} == {
        "attention.key",
        "attention.value",
        "mlp.down",
    }
    for name, ia3 in wrappers.items():
        target = theirs.get_submodule(ours.names.to_hf(name))
        weight, bias = ia3_weight(*numbers(ia3), before=name.endswith("mlp.down"))
        target.weight.data = torch.tensor(weight, dtype=torch.float32)
        if bias is not None:
            target.bias.data = torch.tensor(bias, dtype=torch.float32)
    dense = output(theirs, tokens()).detach()
    assert (dense - plain).abs().max() > 0.02
    close(output(ours, tokens()), dense, roundings=200)
    handle.merge()
    close(output(ours, tokens()), dense, roundings=200)


def test_count_at_the_size_of_gpt_neo_125m() -> None:
    with torch.device("meta"):
        handle = peft_lite.attach(minigpt.GPTNeo(minigpt.GPTNeoConfig()), PAPER)
    counts = handle.report()
    added = 12 * (768 + 768 + 3072)
    assert (counts.trainable, counts.total) == (added, 125_198_592 + added)
    assert (counts.trainable, counts.trainable_bytes) == (55_296, 4 * 55_296)
    assert counts.share == pytest.approx(100 * 55_296 / 125_253_888)


def test_count_at_the_size_of_bert_base() -> None:
    with torch.device("meta"):
        handle = peft_lite.attach(minigpt.Bert(minigpt.BertConfig(), "classification", 2), PAPER)
    counts = handle.report()
    assert (counts.trainable, counts.total) == (55_296, 109_483_778 + 55_296)


def test_scales_are_float32_under_a_bf16_layer() -> None:
    for before in (False, True):
        _, handle, ia3 = layer(before, dtype=torch.bfloat16)
        assert ia3.scale.dtype == torch.float32
        assert handle.report().trainable_bytes == 4 * len(ia3.scale)


def test_scales_train_and_the_base_stays_to_the_bit() -> None:
    model = Plain()
    before = Picture(model).values
    handle: Any = peft_lite.attach(model, IA3Config(["inner.0", "inner.2", "out"], ["inner.2"]))
    trained = handle.methods["default"].trained()
    assert [p.shape for p in trained] == [(12,), (12,), (3,)]
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
    assert not any(torch.equal(p, torch.ones_like(p)) for p in trained)
    handle.detach()
    assert all(torch.equal(v, before[n]) for n, v in Picture(model).values.items())


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    rows=st.integers(0, 5),
    K=st.integers(1, 9),
    N=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    before=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_of_any_size_are_the_closed_form(
    rows: int, K: int, N: int, dtype: torch.dtype, bias: bool, before: bool, seed: int
) -> None:
    model, handle, ia3 = layer(before, bias, dtype, K, N, seed)
    x = random(rows, K, seed=seed + 1, dtype=dtype).requires_grad_(True)
    dy = random(rows, N, seed=seed + 2, dtype=dtype)
    y = model(x)
    y.backward(dy)
    limit = 8 * (K + rows) * torch.finfo(dtype).eps  # of sums of products of normal numbers
    want = ia3_forward(x.detach().double(), *numbers(ia3), before)
    dx, dl = ia3_gradients(x.detach().double(), dy.double(), *numbers(ia3), before)
    for got, expected in ((y, want), (x.grad, dx), (ia3.scale.grad, dl)):
        torch.testing.assert_close(got.double(), torch.tensor(expected), rtol=0, atol=limit)
    assert handle.report().trainable == (K if before else N)
    weight, _ = ia3_weight(*numbers(ia3), before)
    handle.merge()
    close(ia3.base.weight, weight, roundings=1)
