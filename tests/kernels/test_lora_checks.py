"""The GPU's checks on small shapes, by Triton's interpreter."""

import pytest
import torch

from minigpt_kernels.backend import ROUTES
from tests.kernels import lora_checks as checks
from tests.tiny import batch, gpt_neo

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_lora.py has them")
SHAPES = [(37, 48, 33, 5), (130, 64, 80, 16), (1, 16, 24, 1)]


@pytest.mark.parametrize("backend", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_beside_peft(shape: checks.Shape, dtype: torch.dtype, backend: str) -> None:
    checks.check_beside_peft(shape, dtype, "cpu", backend)


@pytest.mark.parametrize("backend", ["triton", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropout(dtype: torch.dtype, backend: str) -> None:
    checks.check_dropout((37, 48, 33, 5), dtype, "cpu", backend=backend)


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_decoding(backend: str) -> None:
    checks.check_decoding((3, 130, 70, 5), torch.float32, "cpu", backend)


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_two_runs(backend: str) -> None:
    checks.check_two_runs((530, 20, 17, 3), torch.float32, "cpu", backend)


@pytest.mark.parametrize("backend", ["triton", "fused"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_compiled(p: float, backend: str) -> None:
    checks.check_compiled((37, 48, 33, 5), torch.float32, "cpu", "aot_eager", p, backend)


def test_training() -> None:
    batches = [batch(0)] * 6
    checks.check_same_losses(gpt_neo(), batches, 1e-5, "all-linear")


def test_a_wrong_result_is_not_let_through() -> None:
    given = checks.inputs((37, 48, 33, 5), torch.float32, "cpu")
    results, want, theirs = checks.ours(given, "torch"), checks.exact(given), checks.of_peft(given)
    checks.judge(results, want, theirs)
    for name in want:
        wrong = {**results, name: results[name] * (1 + 2e-5)}
        with pytest.raises(AssertionError, match=f"^{name}: "):
            checks.judge(wrong, want, theirs)
        with pytest.raises(AssertionError, match=f"^{name}: "):
            checks.judge(wrong, want)
