"""Bottleneck adapters against their closed form, and where they stand in a block."""

from collections import OrderedDict
from functools import partial
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
from minigpt.training.train import checkpoint_activations
from peft_lite import BottleneckConfig
from tests.closed_forms import (
    NON_LINEARITIES,
    adapter_count,
    adapter_forward,
    adapter_gradients,
    adapter_jacobian,
)
from tests.peft_lite.peft_models import Picture, Plain, output, pair, tokens
from tests.rounding import DTYPES, close, random

SIGMAS = list(NON_LINEARITIES)
PLACEMENTS = {"houlsby": 2, "pfeiffer": 1, "parallel": 1}  # adapters in a block
any_sigma = pytest.mark.parametrize("sigma", SIGMAS)
any_dtype = pytest.mark.parametrize("dtype", DTYPES)
any_placement = pytest.mark.parametrize("placement", PLACEMENTS)


def perturb(handle: Any, std: float = 0.5, seed: int = 5) -> None:
    for i, p in enumerate(handle.methods["default"].trained()):
        p.data.copy_(std * random(*p.shape, seed=seed + i))


def layer(
    sigma: str,
    placement: str = "pfeiffer",
    dtype: torch.dtype = torch.float64,
    r: int = 4,
    K: int = 13,
    N: int = 9,
    seed: int = 5,
) -> tuple[Any, Any, Any]:
    """A part K -> N, or K -> N -> K with an adapter beside it: (model, handle, adapter)."""
    torch.manual_seed(seed)
    part: nn.Module = nn.Linear(K, N, dtype=dtype)
    if placement == "parallel":
        part = nn.Sequential(part, nn.Tanh(), nn.Linear(N, K, dtype=dtype))
    model: Any = nn.Sequential(OrderedDict(part=part))
    config = BottleneckConfig(placement, r, sigma, target_modules=["part"])
    handle = peft_lite.attach(model, config)
    perturb(handle, seed=seed)
    return model, handle, model.part


def numbers(adapter: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W_down, b_down, W_up, b_up)"""
    down, c, up, d = (
        p.detach().double()
        for p in (adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias)
    )
    return down, c, up, d


def grads(adapter: Any) -> list[Tensor]:
    names = ("down_weight", "down_bias", "up_weight", "up_bias")
    return [getattr(adapter, name).grad for name in names]


@any_dtype
@any_sigma
def test_an_adapter_after_a_part_reads_what_the_part_gives(sigma: str, dtype: torch.dtype) -> None:
    model, _, adapter = layer(sigma, dtype=dtype)
    x = random(2, 5, 13, seed=1, dtype=dtype)
    h = adapter.base(x).detach().double()
    y = model(x)
    assert y.dtype == dtype
    close(y, h.numpy() + adapter_forward(h, *numbers(adapter), sigma))


@any_dtype
@any_sigma
def test_an_adapter_beside_a_part_reads_what_the_part_gets(sigma: str, dtype: torch.dtype) -> None:
    model, _, adapter = layer(sigma, "parallel", dtype)
    x = random(2, 5, 13, seed=1, dtype=dtype)
    h = adapter.base(x).detach().double()
    y = model(x)
    assert y.dtype == dtype
    close(y, h.numpy() + adapter_forward(x.double(), *numbers(adapter), sigma))


@any_dtype
@any_sigma
def test_gradients_after_a_part_are_the_closed_form(sigma: str, dtype: torch.dtype) -> None:
    model, _, adapter = layer(sigma, dtype=dtype)
    x = random(6, 13, seed=1, dtype=dtype).requires_grad_(True)
    dy = random(6, 9, seed=2, dtype=dtype)
    model(x).backward(dy)
    down, c, up, _ = numbers(adapter)
    h = adapter.base(x).detach().double()
    dh, *wanted = adapter_gradients(h, dy.double(), down, c, up, sigma)
    w = adapter.base.weight.detach().double().numpy()
    assert x.grad is not None
    close(x.grad, (dy.double().numpy() + dh) @ w)
    for got, want in zip(grads(adapter), wanted, strict=True):
        close(got, want, dtype)
    assert all(p.grad is None for p in adapter.base.parameters())


@any_sigma
def test_gradients_beside_a_part_are_the_closed_form(sigma: str) -> None:
    model, _, adapter = layer(sigma, "parallel")
    x, dy = random(6, 13, seed=1).requires_grad_(True), random(6, 13, seed=2)
    model(x).backward(dy)
    down, c, up, _ = numbers(adapter)
    dx, *wanted = adapter_gradients(x.detach(), dy, down, c, up, sigma)
    alone = x.detach().requires_grad_(True)
    adapter.base(alone).backward(dy)
    assert x.grad is not None
    assert alone.grad is not None
    close(x.grad, alone.grad + torch.tensor(dx))
    for got, want in zip(grads(adapter), wanted, strict=True):
        close(got, want)


@any_sigma
def test_the_jacobian_is_the_identity_and_a_matrix_of_rank_r(sigma: str) -> None:
    model, _, adapter = layer(sigma, K=9, N=9)
    adapter.base.weight.data.copy_(torch.eye(9))  # h = x
    adapter.base.bias.data.zero_()
    x = random(9, seed=1)
    down, c, up, _ = numbers(adapter)
    change = adapter_jacobian(x, down, c, up, sigma)
    assert 0 < np.linalg.matrix_rank(change) <= 4
    jacobian = torch.autograd.functional.jacobian(model, x)
    assert isinstance(jacobian, Tensor)
    close(jacobian, np.eye(9) + change)


@any_placement
@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_at_the_start_nothing_changes_to_the_bit(kind: str, placement: str, tmp_path: Path) -> None:
    model, _ = pair(kind, tmp_path)
    before = output(model, tokens())
    handle: Any = peft_lite.attach(model, BottleneckConfig(placement, 5))
    assert torch.equal(output(model, tokens()), before)
    adapters = handle.methods["default"].wrappers
    assert len(adapters) == 2 * PLACEMENTS[placement]
    for adapter in adapters.values():
        assert adapter.down_weight.any()
        assert not adapter.up_weight.any()
        assert not adapter.up_bias.any()


def test_w_down_starts_uniform_within_one_over_the_root_of_the_width() -> None:
    model: Any = nn.Sequential(nn.Linear(40, 900))
    peft_lite.attach(model, BottleneckConfig(r=16, target_modules=["0"]))
    down = model[0].down_weight
    assert down.shape == (16, 900)
    assert 0.99 / 30 < down.abs().max() <= 1 / 30


# our part -> the same part of `transformers`
TWINS = {
    ("gpt-neo", "attention.output"): "transformer.h.{}.attn.attention.out_proj",
    ("gpt-neo", "mlp.down"): "transformer.h.{}.mlp.c_proj",
    ("gpt-neo", "mlp"): "transformer.h.{}.mlp",
    ("bert", "attention.output"): "bert.encoder.layer.{}.attention.output.dense",
    ("bert", "mlp.down"): "bert.encoder.layer.{}.output.dense",
}


def add_adapter(given: Any, sigma: str, module: nn.Module, inputs: Any, h: Tensor) -> Tensor:
    return h + torch.tensor(adapter_forward(h.detach(), *given, sigma)).to(h.dtype)


def add_beside(given: Any, sigma: str, kept: list[Tensor], *hook: Any) -> Tensor:
    h: Tensor = hook[-1]
    return h + torch.tensor(adapter_forward(kept.pop().detach(), *given, sigma)).to(h.dtype)


def keep(kept: list[Tensor], module: nn.Module, inputs: Any) -> None:
    kept.append(inputs[0])


@any_placement
@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_adapters_stand_within_the_block_before_the_residual(
    kind: str, placement: str, tmp_path: Path
) -> None:
    """The twin gets the closed form through hooks at the parts that the papers name."""
    ours, theirs = pair(kind, tmp_path)
    handle: Any = peft_lite.attach(ours, BottleneckConfig(placement, 5, "gelu"))
    perturb(handle)
    before = output(theirs, tokens())
    for name, adapter in handle.methods["default"].wrappers.items():
        _, i, part = name.split(".", 2)
        given = numbers(adapter)
        if placement != "parallel":
            target = theirs.get_submodule(TWINS[kind, part].format(i))
            target.register_forward_hook(partial(add_adapter, given, "gelu"))
            continue
        kept: list[Tensor] = []
        down = TWINS[kind, "mlp.down"].format(i)
        up = f"transformer.h.{i}.mlp.c_fc"
        if kind == "bert":
            up = f"bert.encoder.layer.{i}.intermediate.dense"
        theirs.get_submodule(up).register_forward_pre_hook(partial(keep, kept))
        theirs.get_submodule(down).register_forward_hook(partial(add_beside, given, "gelu", kept))
    after = output(theirs, tokens()).detach()
    assert (after - before).abs().max() > 0.05
    close(output(ours, tokens()), after, roundings=200)


def test_adapters_stand_before_dropout(tmp_path: Path) -> None:
    """With everything dropped the block hands on its input, whatever the adapters say."""
    model, _ = pair("gpt-neo", tmp_path)
    handle = peft_lite.attach(model, BottleneckConfig("houlsby", 5))
    perturb(handle)
    block = model.blocks[0]
    x = random(1, 6, 24, seed=1, dtype=torch.float32)
    assert not torch.equal(block(x, None, True, None), x)
    block.dropout.p = 1.0
    block.dropout.train()
    assert torch.equal(block(x, None, True, None), x)


@any_placement
def test_activation_checkpoints_leave_the_gradients_as_they_are(
    placement: str, tmp_path: Path
) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    handle: Any = peft_lite.attach(model, BottleneckConfig(placement, 5, "silu"))
    perturb(handle)
    trained = handle.methods["default"].trained()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        output(model, tokens()).square().mean().backward()
        return [p.grad.clone() for p in trained]

    plain = gradients()
    checkpoint_activations(model.blocks)
    for got, want in zip(gradients(), plain, strict=True):
        assert got.any()
        close(got, want)


@any_placement
def test_count_at_the_size_of_gpt_neo_125m(placement: str) -> None:
    with torch.device("meta"):
        model = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        counts = peft_lite.attach(model, BottleneckConfig(placement, 64)).report()
    added = 12 * PLACEMENTS[placement] * adapter_count(768, 64)
    assert adapter_count(768, 64) == 99_136
    assert (counts.trainable, counts.total) == (added, 125_198_592 + added)
    assert counts.trainable_bytes == 4 * added
    assert counts.share == pytest.approx(100 * added / (125_198_592 + added))


@any_placement
def test_count_at_the_size_of_bert_base(placement: str) -> None:
    with torch.device("meta"):
        model = minigpt.Bert(minigpt.BertConfig(), "classification", 2)
        counts = peft_lite.attach(model, BottleneckConfig(placement, 48)).report()
    added = 12 * PLACEMENTS[placement] * (2 * 768 * 48 + 48 + 768)
    assert (counts.trainable, counts.total) == (added, 109_483_778 + added)


def test_adapters_are_float32_under_a_bf16_part() -> None:
    _, handle, adapter = layer("relu", dtype=torch.bfloat16)
    assert {p.dtype for p in adapter.trained()} == {torch.float32}
    assert handle.report().trainable_bytes == 4 * adapter_count(9, 4)


def test_adapters_train_and_the_base_stays_to_the_bit() -> None:
    model = Plain()
    before = Picture(model).values
    config = BottleneckConfig(r=3, target_modules=["inner.0", "out"])
    handle: Any = peft_lite.attach(model, config)
    trained = handle.methods["default"].trained()
    assert sum(p.numel() for p in trained) == adapter_count(12, 3) + adapter_count(3, 3)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained}
    optimizer = torch.optim.AdamW(trained, 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 7)).square().mean().backward()
        optimizer.step()
    handle.detach()
    assert all(torch.equal(v, before[n]) for n, v in Picture(model).values.items())


@settings(deadline=None, derandomize=True, database=None, max_examples=40)
@given(
    rows=st.integers(0, 5),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 6)),
    sigma=st.sampled_from(SIGMAS),
    placement=st.sampled_from(["pfeiffer", "parallel"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_adapters_of_any_size_are_the_closed_form(
    rows: int,
    sizes: tuple[int, int, int],
    sigma: str,
    placement: str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    K, N, r = sizes
    model, handle, adapter = layer(sigma, placement, dtype, r, K, N, seed)
    x = random(rows, K, seed=seed + 1, dtype=dtype)
    h = adapter.base(x).detach()
    read = (x if placement == "parallel" else h).double()
    given = numbers(adapter)
    y = model(x)
    want = h.double().numpy() + adapter_forward(read, *given, sigma)
    largest = 1 + np.abs(want).max(initial=0.0)
    limit = 8 * (h.size(-1) + r) * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(y.double(), torch.tensor(want), rtol=0, atol=limit)
    assert handle.report().trainable == adapter_count(h.size(-1), r)
    if dtype == torch.float64:
        dy = random(*y.shape, seed=seed + 2)
        y.backward(dy)
        _, *wanted = adapter_gradients(read, dy, *given[:3], sigma)
        for got, gradient in zip(grads(adapter), wanted, strict=True):
            torch.testing.assert_close(got, torch.tensor(gradient), rtol=1e-9, atol=1e-9)
