"""The LoRA kernels on a GPU: `python -m pytest -m gpu` (alone, for the other tests interpret them).

Against float64 beside HF PEFT's own error, dropout by the mask that is drawn, decoding,
the same bits twice, CUDA graphs, torch.compile, memory access, and a whole training.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minigpt import GPTNeo, GPTNeoConfig
from minigpt.data.text import IGNORED
from minigpt_kernels import lora_linear
from minigpt_kernels.backend import ROUTES
from tests.kernels import lora_checks as checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    # of the thread that runs the backward pass
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),
]
ROOT = Path(__file__).parents[2]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    (4096, 768, 768, 8),
    (4096, 768, 3072, 8),
    (2048, 4096, 4096, 16),
    (1000, 1024, 520, 64),
    (333, 130, 77, 5),  # no multiple of 16: element by element
    (129, 2056, 136, 17),  # rows of 16 bytes, no whole tile
    (64, 64, 64, 128),
    (1, 16, 24, 1),
]
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SANITIZED = """
import torch
from tests.kernels import lora_checks as checks
for dtype in (torch.bfloat16, torch.float32):
    for shape in ((70, 48, 33, 5), (130, 64, 136, 16)):
        for backend in ("triton", "fused"):
            checks.ours(checks.inputs(shape, dtype, "cuda"), backend)
            checks.check_dropout(shape, dtype, "cuda", backend=backend)

torch.cuda.synchronize()
"""


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_beside_peft(shape: checks.Shape, dtype: torch.dtype, backend: str) -> None:
    checks.check_beside_peft(shape, dtype, "cuda", backend)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("p", [0.05, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_dropout(shape: checks.Shape, dtype: torch.dtype, p: float, backend: str) -> None:
    checks.check_dropout(shape, dtype, "cuda", p, backend)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 4096, 4096, 16), (16, 4096, 14336, 64), (3, 130, 77, 5), (7, 768, 768, 8)]
)
def test_decoding(shape: checks.Shape, dtype: torch.dtype, backend: str) -> None:
    checks.check_decoding(shape, dtype, "cuda", backend)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8192, 768, 768, 8), (1001, 130, 77, 5)])
def test_two_runs(shape: checks.Shape, dtype: torch.dtype, backend: str) -> None:
    checks.check_two_runs(shape, dtype, "cuda", backend)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore")  # what inductor says of the machine
def test_compiled(p: float, backend: str) -> None:
    shape = (512, 256, 320, 8)
    checks.check_compiled(shape, torch.bfloat16, "cuda", "inductor", p, backend)


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_cuda_graph_replays_and_drops_anew(p: float, backend: str) -> None:
    given = checks.inputs((512, 256, 320, 8), torch.bfloat16, "cuda")
    tensors = {name: t for name, t in given.items() if name != "dy"}
    leaves = [given[name] for name in ("x", "lora_a", "lora_b")]

    def step() -> list[torch.Tensor]:
        y = lora_linear(**tensors, scaling=checks.S, dropout_p=p, backend=backend)
        return [y, *torch.autograd.grad(y, leaves, given["dy"])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    results = []
    for i in range(2):
        with torch.no_grad():  # a graph reads what its inputs hold when it is replayed
            given["x"].copy_(checks.inputs((512, 256, 320, 8), torch.bfloat16, "cuda", i)["x"])
        graph.replay()
        results.append([t.clone() for t in held])
        if p == 0:
            names = ("y", "x", "lora_a", "lora_b")
            checks.judge(dict(zip(names, results[-1], strict=True)), checks.exact(given))
    graph.replay()  # the same x as before
    again = [torch.equal(a, b) for a, b in zip(held, results[-1], strict=True)]
    assert all(again) if p == 0 else not any(again)


def memcheck(script: str) -> None:
    """Runs a script under compute-sanitizer, which finds accesses out of bounds."""
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c"]
    done = subprocess.run(
        [*command, script],
        cwd=ROOT,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not os.path.exists(SANITIZER), reason="compute-sanitizer is not installed")
def test_no_access_out_of_bounds() -> None:
    memcheck(SANITIZED)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 5e-3), (torch.float32, 1e-5)])
def test_fifty_steps_of_gpt_neo_125m_are_those_of_the_torch_route(
    dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    model = GPTNeo(GPTNeoConfig(hidden_size=768, num_layers=12, num_heads=12)).to("cuda", dtype)
    ids = torch.randint(50257, (5, 4, 128), device="cuda")
    labels = torch.full_like(ids, IGNORED)
    labels[..., :-1] = ids[..., 1:]
    batches = [{"input_ids": ids[i % 5], "labels": labels[i % 5]} for i in range(50)]
    checks.check_same_losses(model, batches, tolerance, "all-linear")
