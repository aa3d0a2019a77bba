"""What is recorded of a step, and what runs again."""

import torch
from torch import nn

from benchmarks.products import Products


def test_a_linear_layer_has_three_products_and_they_run_again() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(7, 3, requires_grad=True)
    with Products() as products:
        layer(x).square().sum().backward()
    names = sorted(function.overloadpacket.__name__ for function, _, _ in products.calls)
    assert names == ["addmm", "mm", "mm"]  # y, dx, dW
    before = layer.weight.grad.clone()
    with Products() as again:
        products.run()
    assert [f for f, _, _ in again.calls] == [f for f, _, _ in products.calls]
    assert torch.equal(layer.weight.grad, before)


def test_what_is_no_product_is_not_recorded() -> None:
    with Products() as products:
        (torch.randn(3, 4) * 2).softmax(-1).sum()
    assert products.calls == []
