"""DoRA against its closed form, for linear layers and tables, with the norm detached and not."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import DoraConfig
from tests.closed_forms import (
    dora_count,
    dora_forward,
    dora_gradients,
    dora_weight,
    lora_scale,
    lora_weight,
)
from tests.peft_lite.peft_models import PROJECTIONS, Picture, Plain, output, pair, tokens
from tests.rounding import DTYPES, close, random

both_norms = pytest.mark.parametrize("detach_norm", [True, False])


def perturb(handle: Any, seed: int = 5) -> None:
    """A, B and magnitudes that are not those of the start, some of them negative."""
    for i, p in enumerate(handle.methods["default"].trained()):
        p.data.copy_(0.5 * random(*p.shape, seed=seed + i))


def layer(
    dtype: torch.dtype = torch.float64, bias: bool = True, **fields: Any
) -> tuple[nn.Module, Any, Any]:
    """A linear layer 13 -> 9 with a perturbed DoRA: (the model around it, handle, DoRA layer)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9, bias=bias, dtype=dtype))
    handle = peft_lite.attach(model, DoraConfig(["0"], **{"r": 4, "lora_alpha": 10, **fields}))
    perturb(handle)
    return model, handle, model[0]


def table(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[nn.Module, Any, Any]:
    """A table of 17 rows of width 6 with a perturbed DoRA."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(17, 6, dtype=dtype))
    handle = peft_lite.attach(model, DoraConfig(["0"], **{"r": 4, "lora_alpha": 10, **fields}))
    perturb(handle)
    return model, handle, model[0]


def numbers(dora: Any) -> dict[str, Any]:
    """What the closed forms take; a table is the linear layer of its transpose, without bias."""
    w = dora.layer.weight.detach().double()
    bias = getattr(dora.layer, "bias", None)
    a, b, m = (p.detach().double() for p in (dora.lora_a, dora.lora_b, dora.magnitude))
    is_table = isinstance(dora.layer, nn.Embedding)
    return {
        "w": w.T if is_table else w,
        "bias": None if bias is None else bias.detach().double(),
        "a": a,
        "b": b,
        "m": m,
    }


def gradients(dora: Any, x: Tensor, dy: Tensor, s: float, **options: Any) -> tuple[Any, ...]:
    given = numbers(dora)
    del given["bias"]
    return dora_gradients(x, dy, **given, s=s, **options)


# --- linear layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_the_closed_form(dtype: torch.dtype, bias: bool, rslora: bool) -> None:
    model, _, dora = layer(dtype, bias, use_rslora=rslora)
    x = random(2, 5, 13, seed=1, dtype=dtype)
    want = dora_forward(x.double(), **numbers(dora), s=lora_scale(10, 4, rslora))
    y = model(x)
    assert y.dtype == dtype
    close(y, want)


@both_norms
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_closed_form(dtype: torch.dtype, bias: bool, detach_norm: bool) -> None:
    model, _, dora = layer(dtype, bias, detach_norm=detach_norm)
    x = random(6, 13, seed=1, dtype=dtype).requires_grad_(True)
    dy = random(6, 9, seed=2, dtype=dtype)
    model(x).backward(dy)
    wanted = gradients(dora, x.detach().double(), dy.double(), 2.5, detached=detach_norm)
    for got, want in zip((x, dora.lora_a, dora.lora_b, dora.magnitude), wanted, strict=True):
        assert got.grad is not None
        assert got.grad.dtype == got.dtype
        close(got.grad, want, dtype)
    assert all(p.grad is None for p in dora.base.parameters())


def test_the_two_ways_to_differentiate_differ_in_a_and_b_alone() -> None:
    results = []
    for detach_norm in (True, False):
        model, _, dora = layer(detach_norm=detach_norm)
        x = random(6, 13, seed=1).requires_grad_(True)
        y = model(x)
        y.backward(random(6, 9, seed=2))
        results.append(
            (y.detach(), x.grad, dora.magnitude.grad, dora.lora_a.grad, dora.lora_b.grad)
        )
    same = [torch.equal(p, q) for p, q in zip(*results, strict=True)]
    assert same == [True, True, True, False, False]


@both_norms
def test_with_the_norm_attached_no_gradient_points_along_the_direction(detach_norm: bool) -> None:
    """|V_i| cannot matter: scaling V_i by 1 + t changes nothing, so <dV_i, V_i> = 0."""
    _, _, dora = layer(detach_norm=detach_norm)
    x, dy = random(6, 13, seed=1), random(6, 9, seed=2)
    with torch.no_grad():  # the first four rows of dV can be read from dA
        dora.lora_a.copy_(torch.eye(4, 13))
        dora.lora_b.copy_(torch.eye(9, 4))
    v = dora.layer.weight.detach() + dora.delta().detach()
    dora(x).backward(dy)
    along = (dora.lora_a.grad * v[:4]).sum(1)
    assert (along.abs().max() < 1e-12) == (not detach_norm)


@both_norms
def test_dropout_acts_on_the_input_of_a_alone(detach_norm: bool) -> None:
    model, _, dora = layer(lora_dropout=0.4, detach_norm=detach_norm)
    model.train()
    x = (1 + random(400, 13, seed=1).abs()).requires_grad_(True)
    dy = random(400, 9, seed=2)
    with torch.no_grad():  # of rank 4, the kept inputs of the first four columns can be read back
        dora.lora_a.copy_(torch.eye(4, 13))
    given = numbers(dora)
    y = model(x)
    y.backward(dy)
    g = given["m"] / torch.tensor(lora_weight(given["w"], given["a"], given["b"], 2.5)).norm(dim=1)
    update = ((y.detach() - given["bias"]) / g - x.detach() @ given["w"].T) / 2.5
    dropped = torch.linalg.lstsq(given["b"], update.T).solution.T  # drop(x), first four columns
    kept = dropped / x.detach()[:, :4]
    is_kept = kept > 0.5
    torch.testing.assert_close(kept, is_kept.double() / 0.6)
    assert is_kept.double().mean().item() == pytest.approx(0.6, abs=4 * 0.49 / math.sqrt(1600))

    mask = torch.ones_like(x.detach())
    mask[:, :4] = is_kept.double() / 0.6
    close(y, dora_forward(x.detach(), **given, s=2.5, kept=mask), roundings=64)
    dx, da, db, dm = gradients(dora, x.detach(), dy, 2.5, detached=detach_norm, kept=mask)
    close(dora.magnitude.grad, dm, roundings=64)
    close(dora.lora_b.grad, db, roundings=64)
    close(dora.lora_a.grad[:, :4], da[:, :4], roundings=64)
    assert x.grad is not None
    close(x.grad, dx, roundings=64)  # columns of A beyond the fourth are zero


def test_in_evaluation_nothing_is_dropped() -> None:
    model, _, dora = layer(lora_dropout=0.4)
    x = random(6, 13, seed=1)
    want = dora_forward(x, **numbers(dora), s=2.5)
    close(model.eval()(x), want)
    assert not torch.allclose(model.train()(x), torch.tensor(want))


def test_the_magnitude_leaves_the_bias_alone() -> None:
    model, _, dora = layer()
    dora.magnitude.data.zero_()
    assert torch.equal(model(random(3, 13, seed=1)), dora.layer.bias.detach().expand(3, 9))


def test_rows_of_the_merged_weight_have_the_length_of_their_magnitude() -> None:
    _, handle, dora = layer()
    handle.merge()
    m = dora.magnitude.detach()
    assert (m < 0).any()
    close(dora.layer.weight.norm(dim=1), m.abs())


def test_a_longer_direction_changes_nothing_since_the_scale_is_inside_the_norm() -> None:
    """With W = 0 the length of s B A cancels, whatever s is."""
    outputs = []
    for alpha in (1, 10, 77):
        model, _, dora = layer(lora_alpha=alpha)
        dora.layer.weight.data.zero_()
        outputs.append(model(random(3, 13, seed=1)).detach())
    close(outputs[1], outputs[0], roundings=64)
    close(outputs[2], outputs[0], roundings=64)


# --- tables -------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 0, 16, 3], [5, 5, 3, 1]])


def one_hot(ids: Tensor, V: int = 17) -> Tensor:
    return nn.functional.one_hot(ids.flatten(), V).double()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_table_are_the_closed_form_of_one_hot_inputs(
    dtype: torch.dtype, rslora: bool
) -> None:
    model, _, dora = table(dtype, use_rslora=rslora)
    want = dora_forward(one_hot(IDS), **numbers(dora), s=lora_scale(10, 4, rslora))
    y = model(IDS)
    assert y.dtype == dtype
    assert dora.magnitude.shape == (6,)
    close(y, want.reshape(2, 4, 6))


@both_norms
def test_gradients_of_a_table_are_the_closed_form(detach_norm: bool) -> None:
    model, _, dora = table(detach_norm=detach_norm)
    dy = random(2, 4, 6, seed=2)
    model(IDS).backward(dy)
    _, *wanted = gradients(dora, one_hot(IDS), dy.view(-1, 6), 2.5, detached=detach_norm)
    for got, want in zip((dora.lora_a, dora.lora_b, dora.magnitude), wanted, strict=True):
        close(got.grad, want)


def test_columns_of_a_merged_table_have_the_length_of_their_magnitude() -> None:
    _, handle, dora = table()
    handle.merge()
    close(dora.layer.weight.norm(dim=0), dora.magnitude.detach().abs())


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [layer, table])
def test_merged_unmerged_and_closed_form_agree_pairwise(of: Any, dtype: torch.dtype) -> None:
    model, handle, dora = of(dtype)
    given = numbers(dora)
    x = random(5, 13, seed=1, dtype=dtype) if of is layer else IDS.flatten()
    rows = x.double() if of is layer else one_hot(x)
    weight = dora_weight(*(given[name] for name in ("w", "a", "b")), 2.5, given["m"])
    bias = 0.0 if given["bias"] is None else given["bias"].numpy()
    before = dora.layer.weight.detach().clone()
    unmerged = model(x)
    handle.merge()
    merged = model(x)
    close(dora.layer.weight, weight if of is layer else weight.T)
    for y in (merged, unmerged):
        close(y, rows.numpy() @ weight.T + bias)
    close(merged, unmerged.detach().double())
    handle.unmerge()
    assert torch.equal(dora.layer.weight, before)
    assert torch.equal(model(x), unmerged)


@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_model_equals_its_twin_with_dense_weights(kind: str, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path)
    handle: Any = peft_lite.attach(ours, DoraConfig([*PROJECTIONS, "position"], r=3, lora_alpha=7))
    random_ = torch.Generator().manual_seed(2)
    for p in handle.methods["default"].trained():
        p.data.add_(0.2 * torch.randn(p.shape, generator=random_))
    before = output(theirs, tokens()).detach()
    for name, dora in handle.methods["default"].wrappers.items():
        given = numbers(dora)
        weight = dora_weight(given["w"], given["a"], given["b"], lora_scale(7, 3), given["m"])
        target = theirs.get_submodule(ours.names.to_hf(name))
        weight = weight.T if isinstance(dora.layer, nn.Embedding) else weight
        target.weight.data = torch.tensor(weight, dtype=torch.float32)
    after = output(theirs, tokens()).detach()
    assert (after - before).abs().max() > 0.05
    close(output(ours, tokens()), after, roundings=200)
    handle.merge()
    close(output(ours, tokens()), after, roundings=200)


# --- the start, and counts ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_at_the_start_nothing_changes(dtype: torch.dtype) -> None:
    model = nn.ModuleList([nn.Linear(13, 9, dtype=dtype), nn.Embedding(17, 6, dtype=dtype)])
    inputs = [random(5, 13, seed=1, dtype=dtype), IDS]
    before = [part(x).detach().double() for part, x in zip(model, inputs, strict=True)]
    handle: Any = peft_lite.attach(model, DoraConfig(["0", "1"], r=3, lora_alpha=99))
    for part, x, want in zip(model, inputs, before, strict=True):
        close(part(x), want, roundings=2)
    linear, embedding = handle.methods["default"].wrappers.values()
    close(linear.magnitude, numbers(linear)["w"].norm(dim=1), roundings=2)
    close(embedding.magnitude, numbers(embedding)["w"].norm(dim=1), roundings=2)


def test_magnitudes_are_float32_under_a_bf16_layer() -> None:
    _, _, dora = layer(torch.bfloat16)
    assert {p.dtype for p in dora.trained()} == {torch.float32}


def test_magnitudes_follow_a_layer_to_another_dtype() -> None:
    model, _, dora = layer(torch.float32)
    model.double()
    x = random(3, 13, seed=1)
    close(model(x), dora_forward(x, **numbers(dora), s=2.5))


def test_count_at_the_size_of_gpt_neo_125m() -> None:
    with torch.device("meta"):
        model = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        handle = peft_lite.attach(model, DoraConfig(["query", "value", "mlp.up", "position"], r=8))
    shapes = [(768, 768)] * 24 + [(3072, 768)] * 12 + [(768, 2048)]
    added = dora_count(8, shapes)
    assert added == 8 * (24 * 1536 + 12 * 3840 + 2816) + 24 * 768 + 12 * 3072 + 768
    counts = handle.report()
    assert (counts.trainable, counts.total) == (added, 125_198_592 + added)
    assert counts.trainable_bytes == 4 * added
    assert counts.share == pytest.approx(100 * added / (125_198_592 + added))


def test_only_its_own_tensors_train_and_the_base_stays_to_the_bit() -> None:
    model = Plain()
    before = Picture(model).values
    handle: Any = peft_lite.attach(model, DoraConfig("all-linear", r=2))
    trained = handle.methods["default"].trained()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
    handle.detach()
    assert all(torch.equal(v, before[n]) for n, v in Picture(model).values.items())


# --- any sizes ----------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    rows=st.integers(0, 5),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    alpha=st.floats(0.25, 32),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    detach_norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_of_any_size_are_the_closed_form(
    rows: int,
    sizes: tuple[int, int, int],
    alpha: float,
    dtype: torch.dtype,
    bias: bool,
    detach_norm: bool,
    seed: int,
) -> None:
    K, N, r = sizes
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(K, N, bias=bias, dtype=dtype))
    config = DoraConfig(["0"], r=r, lora_alpha=alpha, detach_norm=detach_norm)
    handle = peft_lite.attach(model, config)
    perturb(handle, seed)
    dora: Any = model[0]
    x = random(rows, K, seed=seed, dtype=dtype).requires_grad_(True)
    dy = random(rows, N, seed=seed + 1, dtype=dtype)
    y = model(x)
    y.backward(dy)
    given = numbers(dora)
    want = dora_forward(x.detach().double(), **given, s=alpha / r)
    terms = _largest(x, given, alpha / r)  # what is added up may be larger than the sum
    assert np.abs(y.detach().double().numpy() - want).max(initial=0) <= terms * _eps(dtype)
    wanted = gradients(dora, x.detach().double(), dy.double(), alpha / r, detached=detach_norm)
    tensors = (x, dora.lora_a, dora.lora_b, dora.magnitude)
    if dtype == torch.float64:
        for got, gradient in zip(tensors, wanted, strict=True):
            torch.testing.assert_close(got.grad, torch.tensor(gradient), rtol=1e-9, atol=1e-9)
    assert handle.report().trainable == dora_count(r, [(N, K)])
    handle.merge()
    weight = dora_weight(given["w"], given["a"], given["b"], alpha / r, given["m"])
    close(dora.layer.weight, weight)


def _eps(dtype: torch.dtype) -> float:
    return 8 * torch.finfo(dtype).eps


def _largest(x: Tensor, given: dict[str, Any], s: float) -> float:
    """The largest magnitude that the sums of the output can reach."""
    absolute = {name: None if t is None else t.abs() for name, t in given.items()}
    x = x.detach().double().abs()
    norm = torch.tensor(lora_weight(given["w"], given["a"], given["b"], s)).norm(dim=1)
    z = x @ absolute["w"].T + s * x @ absolute["a"].T @ absolute["b"].T
    y = absolute["m"] / norm * z + (0 if given["bias"] is None else absolute["bias"])
    return max(1.0, float(y.max())) if y.numel() else 1.0


def test_a_row_of_zeros_stays_and_lets_everything_train() -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight[2] = 0
    x = torch.randn(4, 7)
    before = model(x)
    handle = peft_lite.attach(model, DoraConfig(["0"], r=2))
    torch.testing.assert_close(model(x), before)
    model(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in handle.methods["default"].trained())
    handle.merge()
    torch.testing.assert_close(model(x), before)
