"""Checks of the 4-bit kernels that run on a GPU (test_gpu_nf4.py) and, on small shapes and by
Triton's interpreter, on a CPU (test_nf4_triton.py).

The weight is compared with kernels/nf4.py bit for bit, the products with float64.
"""

import pytest
import torch
from torch import Tensor

from minigpt_kernels import nf4
from minigpt_kernels.nf4 import Quantized
from minigpt_kernels.nf4_linear import dense, nf4_linear
from tests.kernels.lora_checks import judge

Shape = tuple[int, int, int]  # M, K, N


def quantized(shape: tuple[int, ...], double: bool, block: int = 64) -> Quantized:
    """A weight on the CPU, small as a model's; its scales differ by a factor of 30."""
    random = torch.Generator().manual_seed(len(shape) + block)
    w = shape[-1] ** -0.5 * torch.randn(shape, generator=random)
    w.view(-1)[-block:] *= 30
    return nf4.quantize(w, block, double)


def check_dequantize(
    shape: tuple[int, ...], block: int, double: bool, dtype: torch.dtype, device: str
) -> None:
    it = quantized(shape, double, block)
    w = dense(it.to(device, it.dtype), dtype, backend="triton")
    assert w.shape == shape
    assert w.dtype == dtype
    assert w.device.type == device
    assert torch.equal(w.cpu(), nf4.dequantize(it, dtype))


def check_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    """The bits that it dequantises from its own state on this device."""
    bnb = pytest.importorskip("bitsandbytes.functional")
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    scales = (state.absmax, state.state2.absmax, state.offset)
    it = Quantized(packed.view(-1), *scales, w.shape, w.dtype)
    assert torch.equal(dense(it, backend="triton"), bnb.dequantize_4bit(packed, state))


def check_product(
    shape: Shape,
    dtype: torch.dtype,
    device: str,
    double: bool = True,
    bias: bool = True,
    strided: bool = False,
    block: int = 64,
) -> None:
    """Y and the gradients, with W as it is in `dtype`; `strided`: x is part of a transposed one."""
    M, K, N = shape
    random = torch.Generator().manual_seed(M)
    x, dy = torch.randn(M, K, generator=random), torch.randn(M, N, generator=random)
    x, dy = x.to(device, dtype), dy.to(device, dtype)
    b = torch.randn(2 * N, generator=random).to(device, dtype)[::2] if bias else None
    if strided:
        wide = x.new_zeros(K + 3, M + 2).T
        wide[1:-1, 2:-1] = x
        x = wide[1:-1, 2:-1]
    given = [t.detach().requires_grad_() for t in (x, b) if t is not None]
    it = quantized((N, K), double, block)
    w = nf4.dequantize(it, dtype).double().to(device)
    y = nf4_linear(given[0], it.to(device, dtype), *given[1:], backend="triton")
    assert (y.shape, y.dtype) == ((M, N), dtype)
    results = dict(zip(("x", "bias"), torch.autograd.grad(y, given, dy), strict=False))
    want = {"y": x.double() @ w.T, "x": dy.double() @ w}
    if b is not None:
        want["y"] += b.double()
        want["bias"] = dy.double().sum(0)
    if M:
        judge({"y": y.detach(), **results}, want)


def check_two_runs(shape: Shape, dtype: torch.dtype, device: str) -> None:
    M, K, N = shape
    it, x = quantized((N, K), True).to(device, dtype), torch.randn(M, K).to(device, dtype)
    first, second = (nf4_linear(x, it, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def check_compiled(device: str, compiler: str, backend: str, double: bool) -> None:
    """One graph, and the bits of an eager run, forward and backward."""
    it = quantized((70, 96), double).to(device, torch.float32)
    x, b = torch.randn(2, 5, 96).to(device), torch.randn(70).to(device)

    def layer(x: Tensor, b: Tensor) -> Tensor:
        return nf4_linear(x, it, b, backend).sin()

    torch._dynamo.reset()
    results = []
    for run in (layer, torch.compile(layer, backend=compiler, fullgraph=True)):
        given = [t.clone().requires_grad_() for t in (x, b)]
        y = run(*given)
        results.append([y.detach(), *torch.autograd.grad(y.sum(), given)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)
