"""The linear layer of the models against torch's own, whichever product computes it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.models import linear
from minigpt.models.linear import Linear
from minigpt_kernels import lora_linear
from tests.closed_forms import lora_forward


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A width from 24 on counts as wide."""
    monkeypatch.setattr(linear, "WIDE", 24)


def layer(K: int, N: int, bias: bool, dtype: torch.dtype) -> Linear:
    torch.manual_seed(K + N)
    return Linear(K, N, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("N", [7, 32, 37])
@pytest.mark.parametrize(
    "shape", [(13,), (1, 13), (0, 13), (5, 13), (6, 13), (2, 3, 13), (2, 0, 13)]
)
def test_output_and_gradients_are_those_of_a_plain_layer(
    shape: tuple[int, ...], N: int, bias: bool, dtype: torch.dtype
) -> None:
    ours = layer(13, N, bias, dtype)
    x = torch.randn(shape, dtype=dtype)
    dy = torch.randn(*shape[:-1], N, dtype=dtype)
    results: list[list[Tensor]] = []
    for forward in (ours, lambda x: F.linear(x, ours.weight, ours.bias)):
        ours.zero_grad()
        inputs = x.clone().requires_grad_(True)
        y = forward(inputs)
        y.backward(dy)
        results.append([y, inputs.grad, *(p.grad for p in ours.parameters())])
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("rows", [0, 1, 5, 6])
def test_few_rows_are_one_to_five(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(linear, "few_rows", lambda *inputs: calls.append(inputs) or inputs[0])
    layer(7, 7, True, torch.float32)(torch.randn(rows, 7))
    assert len(calls) == (1 <= rows <= 5)


@pytest.mark.parametrize(
    ("N", "apart"), [(16, False), (23, False), (24, True), (32, False), (37, True)]
)
def test_rows_are_stored_apart_where_they_are_wide_and_unaligned(
    N: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it is torch's own product, which can be differentiated twice."""
    calls = []
    counted = lambda *inputs: calls.append(inputs) or F.linear(*inputs)  # noqa: E731
    monkeypatch.setattr(linear._WideRows, "apply", counted)
    layer(13, N, True, torch.float32)(torch.randn(9, 13))
    assert len(calls) == apart


@pytest.mark.parametrize("frozen", ["weight", "bias", "x", "all"])
def test_gradients_of_a_wide_layer_come_for_what_trains(frozen: str) -> None:
    ours = layer(13, 37, True, torch.float64)
    x = torch.randn(9, 13, dtype=torch.float64, requires_grad=frozen not in ("x", "all"))
    ours.weight.requires_grad_(frozen not in ("weight", "all"))
    ours.bias.requires_grad_(frozen not in ("bias", "all"))
    y = ours(x)
    assert y.requires_grad == (frozen != "all")
    if frozen != "all":
        y.sum().backward()
    for tensor in (x, ours.weight, ours.bias):
        assert (tensor.grad is not None) == tensor.requires_grad


def test_rows_of_a_wide_layer_begin_a_multiple_of_sixteen_apart() -> None:
    y = layer(13, 37, False, torch.float32)(torch.randn(9, 13))
    assert y.stride() == (48, 1)
    assert y.view(3, 3, 37).flatten(0, 1).shape == (9, 37)


@pytest.mark.parametrize("N", [7, 37])
@pytest.mark.parametrize("rows", [2, 9])
def test_autocast_is_followed(rows: int, N: int) -> None:
    ours = layer(13, N, True, torch.float32)
    x = torch.randn(rows, 13)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = ours(x), F.linear(x, ours.weight, ours.bias)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5, 6])
def test_a_lora_layer_decodes_to_its_closed_form(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(s) for s in ((rows, 13), (9, 13), (4, 13), (9, 4)))
    beta = torch.randn(9) if bias else None
    y = lora_linear(x[None], w, beta, a, b, 1.7)
    assert y.shape == (1, rows, 9)
    expected = lora_forward(x, w, beta, a, b, 1.7)
    torch.testing.assert_close(y[0].double(), torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_lora_layer_of_few_rows_still_trains() -> None:
    torch.manual_seed(0)
    x, w, a, b = (torch.randn(s) for s in ((3, 13), (9, 13), (4, 13), (9, 4)))
    a.requires_grad_(True)
    lora_linear(x, w, None, a, b, 1.7).sum().backward()
    assert a.grad is not None
    assert a.grad.any()
