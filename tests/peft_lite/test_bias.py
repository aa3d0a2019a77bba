"""Bias tuning against its closed form."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import minigpt
import peft_lite
from minigpt.training.train import checkpoint_activations
from peft_lite import BiasConfig
from tests.peft_lite.peft_models import Picture, Plain, output, pair, tokens
from tests.rounding import DTYPES, close, random


def layer(dtype: torch.dtype = torch.float64, K: int = 13, N: int = 9) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(K, N, dtype=dtype))
    return model, peft_lite.attach(model, BiasConfig())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_of_a_bias_is_the_sum_over_rows(dtype: torch.dtype) -> None:
    model, _ = layer(dtype)
    x = random(2, 5, 13, seed=1, dtype=dtype).requires_grad_(True)
    dy = random(2, 5, 9, seed=2, dtype=dtype)
    model(x).backward(dy)
    close(model[0].bias.grad, dy.double().sum((0, 1)))
    assert x.grad is not None
    close(x.grad, dy.double() @ model[0].weight.detach().double())
    assert model[0].weight.grad is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_moved_by_d_moves_the_output_by_d(dtype: torch.dtype) -> None:
    model, _ = layer(dtype)
    x, d = random(5, 13, seed=1, dtype=dtype), random(9, seed=2, dtype=dtype)
    before = model(x).detach().double()
    start = model[0].bias.detach().double().clone()
    model[0].bias.data.add_(d)
    moved = model[0].bias.detach().double() - start
    close(moved, d.double(), dtype)
    close(model(x), before + moved)


def test_a_step_of_descent_is_the_closed_form() -> None:
    model, handle = layer()
    x, dy = random(6, 13, seed=1), random(6, 9, seed=2)
    w, b = (p.detach().clone() for p in (model[0].weight, model[0].bias))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model(x).backward(dy)
    optimizer.step()
    close(model[0].bias, b - 0.1 * dy.sum(0))
    assert torch.equal(model[0].weight, w)
    handle.detach()
    assert torch.equal(model[0].bias, b)


def test_the_bias_of_a_norm_trains_and_its_scale_does_not() -> None:
    model = nn.Sequential(nn.LayerNorm(9, dtype=torch.float64))
    peft_lite.attach(model, BiasConfig())
    dy = random(2, 5, 9, seed=2)
    model(random(2, 5, 9, seed=1)).backward(dy)
    norm: Any = model[0]
    close(norm.bias.grad, dy.sum((0, 1)))
    assert norm.weight.grad is None


@pytest.mark.parametrize("kind", ["gpt-neo", "bert", "bert masked"])
def test_gradients_are_those_of_the_biases_of_the_twin_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    ours, theirs = pair(kind, tmp_path)
    before = output(ours, tokens())
    peft_lite.attach(ours, BiasConfig())
    assert torch.equal(output(ours, tokens()), before)
    dy = torch.randn(before.shape, generator=torch.Generator().manual_seed(4))
    output(ours, tokens()).backward(dy)
    output(theirs, tokens()).backward(dy)
    wanted = {n: p.grad for n, p in theirs.named_parameters() if n.endswith("bias")}
    largest = max(g.abs().max().item() for g in wanted.values())
    gradients = {
        ours.names.to_hf(n): p.grad for n, p in ours.named_parameters() if p.grad is not None
    }
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():  # the softmax does not feel a bias of the keys
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_activation_checkpoints_leave_the_gradients_as_they_are(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    handle: Any = peft_lite.attach(model, BiasConfig())
    trained = handle.methods["default"].trained()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        output(model, tokens()).square().mean().backward()
        return [p.grad.clone() for p in trained]

    plain = gradients()
    checkpoint_activations(model.blocks)
    for got, want in zip(gradients(), plain, strict=True):
        assert got.any()
        close(got, want)


@pytest.mark.parametrize(
    ("kind", "patterns", "count"),
    [
        # a block: the attention's output D, the MLP's 4 D and D, two norms D each
        ("gpt-neo", None, 12 * (768 + 4 * 768 + 768 + 2 * 768) + 768),
        ("gpt-neo", ["mlp"], 12 * 5 * 768),
        ("gpt-neo", ["mlp.c_fc"], 12 * 4 * 768),
        ("gpt-neo", r"norm\.bias$", 25 * 768),
        # a block: query, key, value, output, 4 D, D and two norms; then norm, pooler, classes
        ("bert", None, 12 * (4 * 768 + 5 * 768 + 2 * 768) + 768 + 768 + 2),
        ("bert", ["query", "intermediate"], 12 * (768 + 4 * 768)),
        ("bert", ["attention.self"], 12 * 3 * 768),
    ],
)
def test_counts_at_the_published_sizes(kind: str, patterns: Any, count: int) -> None:
    with torch.device("meta"):
        model: nn.Module = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        if kind == "bert":
            model = minigpt.Bert(minigpt.BertConfig(), "classification", 2)
        counts = peft_lite.attach(model, BiasConfig(patterns)).report()
    total = {"gpt-neo": 125_198_592, "bert": 109_483_778}[kind]
    assert (counts.trainable, counts.total) == (count, total)
    assert (counts.trainable_bytes, counts.total_bytes) == (4 * count, 4 * total)
    assert counts.share == pytest.approx(100 * count / total)
    if patterns is None:
        assert count == {"gpt-neo": 74_496, "bert": 102_914}[kind]


def test_biases_train_and_the_rest_stays_to_the_bit() -> None:
    model = Plain()
    before = Picture(model).values
    handle: Any = peft_lite.attach(model, BiasConfig())
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trained) == {"inner.0.bias", "inner.2.bias"}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
    after = Picture(model).values
    assert all(torch.equal(v, before[n]) != (n in trained) for n, v in after.items())
    handle.detach()
    assert all(torch.equal(v, before[n]) for n, v in Picture(model).values.items())


def test_a_model_without_biases_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match="Sequential has no bias"):
        peft_lite.attach(model, BiasConfig())


@settings(deadline=None, derandomize=True, database=None, max_examples=30)
@given(
    rows=st.integers(0, 5),
    K=st.integers(1, 9),
    N=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_layers_of_any_size_are_the_closed_form(
    rows: int, K: int, N: int, dtype: torch.dtype, seed: int
) -> None:
    model, handle = layer(dtype, K, N)
    x, dy = random(rows, K, seed=seed, dtype=dtype), random(rows, N, seed=seed + 1, dtype=dtype)
    d = random(N, seed=seed + 2, dtype=dtype)
    before = model(x).detach()
    start = model[0].bias.detach().clone()
    with torch.no_grad():
        model[0].bias.add_(d)
    y = model(x)
    y.backward(dy)
    limit = 8 * (K + rows) * torch.finfo(dtype).eps
    for got, want in (
        (y.double() - before.double(), (model[0].bias - start).double().expand(rows, N)),
        (model[0].bias.grad.double(), dy.double().sum(0)),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=limit)
    assert handle.report().trainable == N
    with handle.enabled(False):
        assert torch.equal(model(x), before)
