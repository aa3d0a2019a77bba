"""The 4-bit kernels on a GPU: `python -m pytest -m gpu` (alone, for other tests interpret them).

The weight bit for bit, also past 2^32 numbers and beside bitsandbytes; products and gradients
against float64; the same bits twice; CUDA graphs, torch.compile, memory.
"""

import os
from dataclasses import replace

import pytest
import torch

from minigpt_kernels import nf4
from minigpt_kernels.nf4_linear import dense, nf4_linear
from tests.kernels import nf4_checks as checks
from tests.kernels.lora_checks import judge
from tests.kernels.test_gpu_lora import SANITIZER, memcheck

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    # of the thread that runs the backward pass
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [
    (1, 4096, 4096),
    (16, 4096, 2048),
    (17, 768, 3072),
    (64, 1024, 520),
    (65, 1024, 520),
    (2048, 768, 768),
    (3, 160, 77),  # 2.5 blocks a row
    (5, 131, 7),  # no whole bytes a row
    (0, 64, 64),
]
SANITIZED = """
import torch
from tests.kernels import nf4_checks as checks
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((3, 160, 77), (64, 96, 33), (5, 131, 7)):
        for double in (False, True):
            checks.check_product(shape, dtype, "cuda", double)
            checks.check_dequantize(shape[1:], 64, double, dtype, "cuda")

torch.cuda.synchronize()
"""


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16, torch.float64])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("block", nf4.BLOCKS)
def test_a_weight_has_the_bits_of_the_plain_codec(
    block: int, double: bool, dtype: torch.dtype
) -> None:
    for shape in ((1,), (3, 7), (33, 65), (130, 131), (1024, 768)):
        checks.check_dequantize(shape, block, double, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_of_bitsandbytes_has_its_bits(dtype: torch.dtype) -> None:
    checks.check_bitsandbytes((1024, 768), dtype, "cuda")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_and_gradients_are_those_of_float64(
    shape: checks.Shape, dtype: torch.dtype, double: bool
) -> None:
    checks.check_product(shape, dtype, "cuda", double)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 160, 77), (64, 1024, 520)])
def test_strides_do_not_matter(shape: checks.Shape, dtype: torch.dtype) -> None:
    checks.check_product(shape, dtype, "cuda", bias=False, strided=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (64, 768, 768), (512, 768, 768)])
def test_two_runs_give_the_same_bits(shape: checks.Shape, dtype: torch.dtype) -> None:
    checks.check_two_runs(shape, dtype, "cuda")


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.filterwarnings("ignore")  # what inductor says of the machine
def test_compiled(double: bool) -> None:
    checks.check_compiled("cuda", "inductor", "auto", double)


def test_few_rows_need_no_memory_for_the_weight() -> None:
    it = checks.quantized((4096, 1024), True).to("cuda", torch.bfloat16)
    x = torch.randn(16, 1024, device="cuda", dtype=torch.bfloat16)
    nf4_linear(x, it)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nf4_linear(x, it)
    assert torch.cuda.max_memory_allocated() - before < it.nbytes / 4


def test_a_cuda_graph_replays() -> None:
    it = checks.quantized((512, 256), True).to("cuda", torch.float32)
    w = dense(it, torch.float32).double()
    x = torch.randn(16, 256, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        nf4_linear(x, it)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = nf4_linear(x, it)
    for _ in range(2):
        x.normal_()
        graph.replay()
        judge({"y": y}, {"y": x.double() @ w.T})


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory < 1.6e10,
    reason="needs 16 GB",
)
def test_offsets_go_past_four_billion_numbers() -> None:
    N, K = 2**16 + 1, 2**16
    packed = torch.randint(256, (N * K // 2,), dtype=torch.uint8, device="cuda")
    scales = torch.rand(N * K // 64, device="cuda") + 0.5
    it = nf4.Quantized(packed, scales, None, None, torch.Size((N, K)), torch.bfloat16)
    last = replace(
        it, packed=packed[-K // 2 :], scales=scales[-K // 64 :], shape=torch.Size((1, K))
    )
    want = nf4.dequantize(last.to("cpu", torch.bfloat16))
    assert torch.equal(dense(it)[-1:].cpu(), want)
    x = torch.randn(1, K, device="cuda")
    y = nf4_linear(x, it)[:, -1:]
    judge({"y": y}, {"y": x.double() @ dense(last, torch.float32).double().T})


@pytest.mark.skipif(not os.path.exists(SANITIZER), reason="compute-sanitizer is not installed")
def test_no_access_out_of_bounds() -> None:
    memcheck(SANITIZED)
