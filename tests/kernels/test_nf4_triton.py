"""The 4-bit kernels by Triton's interpreter, their routes, and the operator of torch.compile."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from minigpt_kernels import nf4, nf4_linear
from tests.kernels import nf4_checks as checks
from tests.kernels.lora_checks import judge

SHAPES = [(1,), (31, 33), (48, 32), (130, 131)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", nf4.BLOCKS)
def test_a_weight_has_the_bits_of_the_plain_codec(
    block: int, double: bool, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        checks.check_dequantize(shape, block, double, dtype, "cpu")


def test_a_state_of_bitsandbytes_has_its_bits() -> None:
    with torch.compiler.set_stance("force_eager"):  # its CPU code compiles itself for each shape
        checks.check_bitsandbytes((130, 131), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 3, 17, 64, 65])
def test_products_and_gradients_are_those_of_float64(
    rows: int, double: bool, dtype: torch.dtype
) -> None:
    checks.check_product((rows, 160, 70), dtype, "cpu", double)  # 2.5 blocks a row


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("shape", [(3, 32, 1), (17, 96, 33), (5, 33, 7), (1, 1, 1), (2, 288, 32)])
def test_shapes_and_strides_do_not_matter(shape: checks.Shape, strided: bool, bias: bool) -> None:
    checks.check_product(shape, torch.float32, "cpu", True, bias, strided)


@pytest.mark.parametrize("block", [32, 128, 4096])
def test_rows_that_are_no_whole_number_of_blocks(block: int) -> None:
    checks.check_product((3, 160, 70), torch.float32, "cpu", block=block)


def test_offsets_go_past_two_billion_elements() -> None:
    step = 2**30 + 8
    x = torch.empty(2 * step + 32, dtype=torch.float16).as_strided((3, 32), (step, 1))
    x.copy_(torch.randn(3, 32))
    it = checks.quantized((5, 32), True)
    y = nf4_linear.product(x, it, backend="triton")
    judge({"y": y}, {"y": x.double() @ nf4.dequantize(it, x.dtype).double().T})


def test_two_runs_give_the_same_bits() -> None:
    checks.check_two_runs((17, 160, 70), torch.float32, "cpu")


# --- routes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "K", "dtype", "dense"),
    [
        (64, 96, torch.float32, 0),
        (65, 96, torch.float32, 1),
        (1, 40, torch.float32, 1),
        (1, 96, torch.float64, 1),
    ],
)
def test_few_rows_are_multiplied_without_a_dense_weight(
    rows: int, K: int, dtype: torch.dtype, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt_kernels import nf4_triton

    launched = []
    real = nf4_triton.dequantize
    monkeypatch.setattr(nf4_triton, "dequantize", lambda *it: launched.append(it) or real(*it))
    x, it = torch.randn(rows, K, dtype=dtype), checks.quantized((9, K), True)
    y = nf4_linear.product(x, it, backend="triton")
    assert len(launched) == dense
    judge({"y": y}, {"y": x.double() @ nf4.dequantize(it, dtype).double().T})


def test_each_function_takes_the_route_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt_kernels import nf4_triton

    routes: list[str] = []
    monkeypatch.setattr(nf4_linear, "resolve", lambda backend, _: {"auto": "triton"}[backend])
    for name in ("product", "dequantize"):
        real = getattr(nf4_triton, name)
        taken = lambda *inputs, name=name, real=real: routes.append(name) or real(*inputs)  # noqa: E731
        monkeypatch.setattr(nf4_triton, name, taken)
    it, x, dy = checks.quantized((9, 32), True), torch.randn(3, 32), torch.randn(3, 9)
    w = nf4.dequantize(it).double()
    judge({"y": nf4_linear.product(x, it)}, {"y": x.double() @ w.T})
    judge({"x": nf4_linear.product_turned(dy, it)}, {"x": dy.double() @ w})
    assert torch.equal(nf4_linear.dense(it), w.float())
    assert routes == ["product", "dequantize", "dequantize"]


def test_a_route_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    it, x = checks.quantized((9, 32), True), torch.randn(3, 32)
    with pytest.raises(ValueError, match="'fused', must be one of auto, torch, triton"):
        nf4_linear.nf4_linear(x, it, backend="fused")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for call in (
        lambda: nf4_linear.nf4_linear(x, it, backend="triton"),
        lambda: nf4_linear.product_turned(x[:, :9], it, backend="triton"),
        lambda: nf4_linear.dense(it, backend="triton"),
    ):
        with pytest.raises(ValueError, match="'triton' cannot run here: the tensor is on cpu"):
            call()


def test_an_eager_step_loads_neither_the_compiler_nor_triton() -> None:
    program = """
import sys
import torch
from minigpt_kernels.nf4 import quantize
from minigpt_kernels.nf4_linear import nf4_linear
x = torch.randn(3, 64, requires_grad=True)
nf4_linear(x, quantize(torch.randn(5, 64))).sum().backward()
assert not {"torch._dynamo", "triton"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_backward_pass_inside_autocast_keeps_the_dtype_of_the_forward_pass(backend: str) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    it = checks.quantized((9, 64), True)
    y = nf4_linear.nf4_linear(x, it, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    judge({"x": dx}, {"x": torch.ones(3, 9).double() @ nf4.dequantize(it).double()})


# --- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_a_compiled_graph_is_whole_and_computes_the_same(backend: str, double: bool) -> None:
    checks.check_compiled("cpu", "aot_eager", backend, double)


def test_another_number_of_rows_compiles_once_more_and_no_more() -> None:
    compilations = []

    def count(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return aot_autograd(fw_compiler=lambda graph, _: graph.forward)(graph, inputs)

    torch._dynamo.reset()
    it = checks.quantized((9, 64), True)
    run = torch.compile(lambda x: nf4_linear.nf4_linear(x, it), backend=count, fullgraph=True)
    for M in (24, 30, 41, 77, 130):
        x = torch.randn(M, 64, requires_grad=True)
        assert run(x).shape == (M, 9)
    assert len(compilations) <= 2


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("double", [False, True])
def test_the_operator_returns_the_shape_it_promises(double: bool, turned: bool) -> None:
    it = checks.quantized((9, 64), double)
    stored = (it.packed, it.scales, it.scales_of_scales, it.offset)
    x = torch.randn(3, 9 if turned else 64, requires_grad=True)
    bias = None if turned else torch.randn(9, requires_grad=True)
    inputs = (x, bias, *stored, it.shape, it.block, turned, "torch")
    torch.library.opcheck(torch.ops.minigpt.nf4, inputs)


def test_the_operator_has_first_and_second_derivatives() -> None:
    it = checks.quantized((9, 64), True)
    stored = (it.packed, it.scales, it.scales_of_scales, it.offset)
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    b = torch.randn(9, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, b: Tensor) -> Tensor:
        return torch.ops.minigpt.nf4(x, b, *stored, it.shape, it.block, False, "torch") ** 2

    assert torch.autograd.gradcheck(run, (x, b))
    assert torch.autograd.gradgradcheck(run, (x, b))
