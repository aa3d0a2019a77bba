"""The choice between interpreted and compiled kernels, by what pytest's `-m` says."""

import pytest

from tests.conftest import only_gpu


@pytest.mark.parametrize("expression", ["gpu", "(gpu)", "gpu and not slow", "not slow and gpu"])
def test_gpu_tests_alone_compile(expression: str) -> None:
    assert only_gpu(expression)


@pytest.mark.parametrize("expression", ["", "not slow", "not gpu", "slow or gpu", "not (gpu)"])
def test_everything_else_is_interpreted(expression: str) -> None:
    assert not only_gpu(expression)
