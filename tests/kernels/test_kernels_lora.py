"""The LoRA product and its gradients against float64, whatever trains and whatever is dropped."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from minigpt_kernels import backend as backends
from minigpt_kernels import lora_linear
from minigpt_kernels.backend import ROUTES, Case
from minigpt_kernels.dropout import unpack
from minigpt_kernels.lora import few_rows, keep
from tests.closed_forms import lora_forward, lora_gradients

SIZES = [(6, 13, 9, 4), (1, 5, 8, 1), (33, 7, 3, 7), (0, 4, 6, 2), (5, 1, 1, 1)]
EPS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def inputs(M: int, K: int, N: int, R: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    random = torch.Generator().manual_seed(M + K)
    shapes = {"x": (M, K), "weight": (N, K), "bias": (N,), "lora_a": (R, K), "lora_b": (N, R)}
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


def trained(tensors: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}


def close(got: Tensor, want: np.ndarray, dtype: torch.dtype) -> None:
    scale = max(1.0, float(np.abs(want).max(initial=0.0)))
    np.testing.assert_allclose(got.detach().double(), want, rtol=0, atol=EPS[dtype] * scale)


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_are_the_closed_form(
    sizes: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    given = trained(inputs(*sizes, dtype), "x", "weight", "bias", "lora_a", "lora_b")
    dy = torch.randn(sizes[0], sizes[2]).to(dtype)
    y = lora_linear(**given, scaling=1.7)
    y.backward(dy)
    x, w, bias, a, b = (t.detach().double() for t in given.values())
    assert y.dtype == dtype
    close(y, lora_forward(x, w, bias, a, b, 1.7), dtype)
    dx, da, db = lora_gradients(x, dy.double(), w, a, b, 1.7)
    wanted = [dx, (dy.double().T @ x).numpy(), dy.double().sum(0).numpy(), da, db]
    for (name, tensor), want in zip(given.items(), wanted, strict=True):
        assert tensor.grad is not None, name
        assert tensor.grad.dtype == dtype
        close(tensor.grad, want, dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    "names",
    [("lora_a",), ("lora_b",), ("x",), ("bias",), ("weight",), ("x", "lora_b"), ("lora_a", "bias")],
)
def test_gradients_come_for_what_trains_and_nothing_else(names: tuple[str, ...], p: float) -> None:
    every = trained(inputs(6, 13, 9, 4), "x", "weight", "bias", "lora_a", "lora_b")
    some = trained(inputs(6, 13, 9, 4), *names)
    dy = torch.randn(6, 9, dtype=torch.float64)
    for given in (every, some):
        lora_linear(**given, scaling=0.6, dropout_p=p, seed=3).backward(dy)
    for name, tensor in some.items():
        assert (tensor.grad is None) == (name not in names)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, every[name].grad)


def test_dropout_is_the_mask_of_its_seed_forward_and_backward() -> None:
    given = trained(inputs(40, 13, 9, 4), "x", "lora_a", "lora_b")
    dy = torch.randn(40, 9, dtype=torch.float64)
    y = lora_linear(**given, scaling=1.7, dropout_p=0.4, seed=11)
    y.backward(dy)
    x, w, bias, a, b = (t.detach() for t in given.values())
    mask = unpack(keep(x, 0.4, torch.tensor(11)), 13).double() / 0.6
    torch.testing.assert_close(
        y.detach(), x @ w.T + bias + 1.7 * (x * mask) @ a.T @ b.T, rtol=1e-12, atol=1e-12
    )
    for name, want in zip(
        ("x", "lora_a", "lora_b"), lora_gradients(x, dy, w, a, b, 1.7, kept=mask), strict=True
    ):
        close(given[name].grad, want, torch.float64)


def test_seeds_differ_unless_the_generator_says_otherwise() -> None:
    given = inputs(40, 13, 9, 4)
    torch.manual_seed(0)
    first, second = (lora_linear(**given, scaling=1.0, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(lora_linear(**given, scaling=1.0, dropout_p=0.5), first)


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (0, 7), (8, 8), (31, 1)])
def test_a_packed_mask_is_an_eighth_and_bit_k_of_a_row_is_element_k(shape: tuple[int, int]) -> None:
    bits = keep(torch.empty(shape), 0.4, torch.tensor(3))
    assert bits.shape == (shape[0], -(-shape[1] // 8))
    mask = unpack(bits, shape[1])
    assert mask.shape == shape
    for (m, k), kept in np.ndenumerate(mask.numpy()):
        assert kept == bool(int(bits[m, k // 8]) >> k % 8 & 1)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_what_is_kept_for_the_backward_pass_is_x_its_image_under_a_and_a_bit_mask(p: float) -> None:
    given = trained(inputs(64, 40, 24, 3, torch.float32), "lora_a", "lora_b")
    kept: list[Tensor] = []

    def pack_hook(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda t: t):
        lora_linear(**given, scaling=1.0, dropout_p=p)
    parameters = {t.data_ptr() for name, t in given.items() if name != "x"}
    saved = {t.data_ptr(): t for t in kept if t.data_ptr() not in parameters}
    bits = 64 * 40 // 8 if p else 0
    assert sum(t.nbytes for t in saved.values()) == 4 * (64 * 40 + 64 * 3) + bits


def test_it_follows_autocast() -> None:
    given = trained(inputs(6, 13, 9, 4, torch.float32), "x", "lora_a", "lora_b")
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(**given, scaling=1.7)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(given[n].grad.dtype == torch.float32 for n in ("x", "lora_a", "lora_b"))
    close(y, lora_forward(*(t.detach() for t in given.values()), 1.7), torch.bfloat16)


def test_strides_and_leading_shapes_do_not_matter() -> None:
    given = inputs(24, 13, 9, 4)
    wide = torch.randn(2, 3, 26, 4, dtype=torch.float64)
    x = wide.transpose(2, 3)[..., ::2]
    assert not x.is_contiguous()
    y = lora_linear(**{**given, "x": x}, scaling=1.7)
    assert y.shape == (2, 3, 4, 9)
    rest = (given[name] for name in ("weight", "bias", "lora_a", "lora_b"))
    close(y.reshape(24, 9), lora_forward(x.reshape(24, 13), *rest, 1.7), torch.float64)


def test_two_runs_give_the_same_bits() -> None:
    results = []
    for _ in range(2):
        given = trained(inputs(64, 40, 24, 3, torch.float32), "x", "lora_a", "lora_b")
        lora_linear(**given, scaling=1.7, dropout_p=0.2, seed=5).sin().sum().backward()
        results.append([given[n].grad for n in ("x", "lora_a", "lora_b")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


ODD = [(6, 13, 9, 4), (33, 70, 131, 7), (1, 64, 16, 1), (0, 5, 6, 2), (600, 19, 35, 17)]


def philox(M: int, K: int, p: float, seed: int) -> Tensor:
    """The mask of the kernel that draws it on a GPU."""
    from minigpt_kernels import lora_triton

    return unpack(lora_triton.keep(torch.empty(M, K), p, torch.tensor(seed)), K)


def drawn(M: int, K: int, p: float, seed: int) -> Tensor:
    """The mask that a CPU draws."""
    return unpack(keep(torch.empty(M, K), p, torch.tensor(seed)), K)


@pytest.mark.parametrize("backend", ["triton", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [*ODD, (70, 64, 96, 80)])
def test_triton_is_the_closed_form_forward_and_backward(
    sizes: tuple[int, int, int, int], p: float, dtype: torch.dtype, backend: str
) -> None:
    M, K, N, _ = sizes
    given = trained(inputs(*sizes, dtype), "x", "weight", "bias", "lora_a", "lora_b")
    dy = torch.randn(M, N).to(dtype)
    y = lora_linear(**given, scaling=1.7, dropout_p=p, seed=5, backend=backend)
    y.backward(dy)
    x, w, bias, a, b = (t.detach().double() for t in given.values())
    kept = (drawn(M, K, p, 5).double() if p else torch.ones(M, K).double()) / (1 - p)
    if p and M * K > 1000:
        assert (kept > 0).double().mean().item() == pytest.approx(1 - p, abs=0.05)
    assert y.dtype == dtype
    close(y, (x @ w.T + bias + 1.7 * (kept * x) @ a.T @ b.T).numpy(), dtype)
    dx, da, db = lora_gradients(x, dy.double(), w, a, b, 1.7, kept=kept)
    wanted = [dx, (dy.double().T @ x).numpy(), dy.double().sum(0).numpy(), da, db]
    for (name, tensor), want in zip(given.items(), wanted, strict=True):
        assert tensor.grad is not None, name
        close(tensor.grad, want, dtype)


@pytest.mark.parametrize("draw", [philox, drawn])
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_dropout_has_probability_p_whatever_the_place(p: float, draw: Any) -> None:
    mask = draw(400, 96, p, 7).double()
    deviation = math.sqrt(p * (1 - p))
    assert abs(mask.mean().item() - (1 - p)) < 4 * deviation / math.sqrt(mask.numel())
    for axis in (0, 1):
        means = mask.mean(axis)
        limit = 5 * deviation / math.sqrt(mask.shape[axis])
        assert (means - (1 - p)).abs().max().item() < limit
    # neighbours know nothing of each other
    centred = (mask - mask.mean()) / deviation
    for step in (1, 2, 4, 8):
        together = (centred[:, step:] * centred[:, :-step]).mean().item()
        assert abs(together) < 5 / math.sqrt(mask.numel())


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_triton_takes_any_strides(backend: str) -> None:
    given = inputs(24, 13, 9, 4, torch.float32)
    views = {
        name: torch.randn(len(t), 2 * t.size(1) + 1)[:, 1::2]
        for name, t in given.items()
        if t.dim() > 1
    }
    assert not any(t.is_contiguous() for t in views.values())
    y = lora_linear(**views, bias=given["bias"], scaling=1.7, backend=backend)
    x, w, a, b = (views[name] for name in ("x", "weight", "lora_a", "lora_b"))
    close(y, lora_forward(x, w, given["bias"], a, b, 1.7), torch.float32)


@pytest.mark.parametrize("backend", ["triton", "fused"])
@pytest.mark.parametrize("sizes", [(6, 13, 9, 4), (33, 70, 131, 7), (16, 32, 64, 16)])
def test_nothing_beside_an_output_is_written(
    sizes: tuple[int, int, int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt_kernels import lora_triton

    rooms = []
    real = torch.Tensor.new_empty

    def room(shape: Any, dtype: torch.dtype) -> Tensor:
        """A tensor between 2,048 numbers of 77 and as many more."""
        n = math.prod(shape)
        rooms.append((n, torch.full((2048 + n + 2048,), 77, dtype=dtype)))
        return rooms[-1][1][2048 : 2048 + n].view(shape)

    def new_empty(t: Tensor, *shape: int, **options: Any) -> Tensor:
        if "device" in options:  # asked for by the interpreter
            return real(t, *shape, **options)
        return room(shape, options.get("dtype", t.dtype))

    given = trained(inputs(*sizes, torch.float32), "x", "lora_a", "lora_b")
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", new_empty)
        patched.setattr(torch, "empty", lambda *shape, dtype, device: room(shape, dtype))
        patched.setattr(torch, "empty_like", lambda t, memory_format: room(t.shape, t.dtype))
        y = lora_linear(**given, scaling=1.7, backend=backend)
        y.backward(torch.ones_like(y))
        bits = lora_triton.keep(given["x"], 0.3, torch.tensor(5))
    assert bits.shape == (sizes[0], -(-sizes[1] // 8))
    assert len(rooms) >= 7  # y, xA, dS, dA, dB, parts, bits
    for n, memory in rooms:
        assert (torch.cat([memory[:2048], memory[2048 + n :]]) == 77).all()


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_triton_gives_the_same_bits_twice_and_others_for_another_seed(backend: str) -> None:
    results = []
    for seed in (5, 5, 6):
        given = trained(inputs(70, 40, 24, 3, torch.float32), "x", "lora_a", "lora_b")
        y = lora_linear(**given, scaling=1.7, dropout_p=0.2, seed=seed, backend=backend)
        y.sin().sum().backward()
        results.append([given[n].grad for n in ("x", "lora_a", "lora_b")])
    first, second, third = results
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("backend", ["triton", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 70, 131, 7), (16, 300, 35, 17), (3, 5, 1, 1), (5, 64, 16, 40)]
)
def test_triton_multiplies_a_few_rows(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    given = inputs(*sizes, dtype)
    y = lora_linear(**given, scaling=1.7, backend=backend)
    assert y.dtype == dtype
    close(y, lora_forward(*(t.double() for t in given.values()), 1.7), dtype)
    given["bias"] = None
    y = lora_linear(**given, scaling=1.7, backend=backend)
    x, w, _, a, b = given.values()
    zero = torch.zeros(sizes[2])
    close(y, lora_forward(x.double(), w.double(), zero, a.double(), b.double(), 1.7), dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ROUTES)
def test_a_compiled_graph_is_whole_and_computes_the_same(
    backend: str, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch 2.11 cannot trace a search for packages
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: pytest.fail("searched"))
    results = []
    for compiled in (False, True):
        given = trained(inputs(24, 13, 9, 4, torch.float32), "x", "bias", "lora_a", "lora_b")

        def step(given: dict[str, Tensor]) -> Tensor:
            return lora_linear(**given, scaling=1.7, dropout_p=p, backend=backend).sin().sum()

        torch.manual_seed(0)
        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        run(given).backward()
        results.append([given[n].grad for n in ("x", "bias", "lora_a", "lora_b")])
    for eager, compiled_ in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled_)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_another_number_of_rows_compiles_once_more_and_no_more(p: float) -> None:
    compilations = []

    def count(graph: Any, inputs: Any) -> Any:
        compilations.append(graph)
        return aot_autograd(fw_compiler=lambda graph, _: graph.forward)(graph, inputs)

    def step(x: Tensor, rest: dict[str, Tensor]) -> Tensor:
        return lora_linear(x, **rest, scaling=1.7, dropout_p=p)

    torch._dynamo.reset()
    run = torch.compile(step, backend=count, fullgraph=True)
    given = trained(inputs(24, 13, 9, 4, torch.float32), "lora_a", "lora_b")
    del given["x"]
    for M in (24, 30, 41, 77, 130):
        assert run(torch.randn(M, 13), given).shape == (M, 9)
    assert len(compilations) <= 2


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("backend", ROUTES)
def test_the_operators_return_the_shapes_they_promise(backend: str, dropped: bool) -> None:
    from minigpt_kernels import lora_operator

    given = trained(inputs(24, 13, 9, 4, torch.float32), "x", "weight", "bias", "lora_a", "lora_b")
    bits = None
    if dropped:
        seed = torch.tensor(3)
        torch.library.opcheck(lora_operator.keep, (given["x"].detach(), 0.3, seed))
        bits = keep(given["x"], 0.3, seed)
    torch.library.opcheck(lora_operator.lora, (*given.values(), bits, 1.7, backend))


@pytest.mark.parametrize("dy", ["constant", "of y"])
@pytest.mark.parametrize(
    "names", [("x", "weight", "bias", "lora_a", "lora_b"), ("lora_a", "lora_b")]
)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("how", [*ROUTES, "compiled", "operator"])
def test_a_product_of_the_hessian_is_that_of_the_plain_expression(
    how: str, p: float, names: tuple[str, ...], dy: str
) -> None:
    dtype = torch.float32 if how in ("triton", "fused") else torch.float64
    given = trained(inputs(12, 13, 9, 4, dtype), *names)
    mask = drawn(12, 13, p, 5).to(dtype) / (1 - p) if p else 1.0
    backend = how if how in ROUTES else "torch"

    def ours(given: dict[str, Tensor]) -> Tensor:
        if how == "operator":
            from minigpt_kernels import lora_operator

            bits = keep(given["x"].detach(), p, torch.tensor(5)) if p else None
            return lora_operator.lora(*given.values(), bits, 1.7 / (1 - p), backend)[0]
        return lora_linear(**given, scaling=1.7, dropout_p=p, seed=5, backend=backend)

    def plain(given: dict[str, Tensor]) -> Tensor:
        x, w, bias, a, b = given.values()
        return x @ w.T + bias + 1.7 * (mask * x) @ a.T @ b.T

    def product(layer: Any) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(9)
        leaves, y = [given[name] for name in names], layer(given)
        loss = y.sin() if dy == "of y" else torch.linspace(-1, 1, y.numel()).view_as(y) * y
        grads = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
        along = [torch.randn(g.shape, generator=random, dtype=dtype) for g in grads]
        total = sum((g * v).sum() for g, v in zip(grads, along, strict=True))
        return torch.autograd.grad(total, leaves, materialize_grads=True)

    layer = torch.compile(ours, backend="eager", fullgraph=True) if how == "compiled" else ours
    for got, want in zip(product(layer), product(plain), strict=True):
        close(got, want.double().numpy(), dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("backend", ROUTES)
def test_tensors_of_other_dtypes_are_multiplied_in_that_of_x(backend: str, p: float) -> None:
    given = inputs(12, 13, 9, 4, torch.float32)
    mixed = {n: t.to(torch.float16 if n in ("x", "weight") else t.dtype) for n, t in given.items()}
    mixed = trained(mixed, "x", "weight", "bias", "lora_a", "lora_b")
    y = lora_linear(**mixed, scaling=1.7, dropout_p=p, seed=5, backend=backend)
    y.sum().backward()
    assert y.dtype == torch.float16
    kept = drawn(12, 13, p, 5).double() / (1 - p) if p else 1.0
    x, w, bias, a, b = (t.detach().double() for t in mixed.values())
    close(y, (x @ w.T + bias + 1.7 * (kept * x) @ a.T @ b.T).numpy(), torch.float16)
    assert all(t.grad is not None and t.grad.dtype == t.dtype for t in mixed.values())


@pytest.mark.parametrize("backend", ROUTES)
def test_a_backward_pass_inside_autocast_keeps_the_dtype_of_the_forward_pass(backend: str) -> None:
    results = []
    for inside in (False, True):
        given = trained(inputs(6, 13, 9, 4, torch.float32), "x", "lora_a", "lora_b")
        y = lora_linear(**given, scaling=1.7, backend=backend)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y.backward(torch.ones_like(y))
        results.append([given[n].grad for n in ("x", "lora_a", "lora_b")])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_mask_does_not_depend_on_the_route() -> None:
    given = inputs(40, 13, 9, 4, torch.float32)
    ys = []
    for backend in ROUTES:
        torch.manual_seed(3)
        ys.append(lora_linear(**given, scaling=1.7, dropout_p=0.5, backend=backend))
    for y in ys[1:]:
        torch.testing.assert_close(y, ys[0], rtol=1e-4, atol=1e-4)


def test_in_bf16_the_error_is_at_most_that_of_the_update_last() -> None:
    random = torch.Generator().manual_seed(0)
    M, K, N, R = 64, 256, 192, 8
    shapes = {"x": (M, K, 1.0), "w": (N, K, K**-0.5), "a": (R, K, K**-0.5), "b": (N, R, 0.03)}
    x, w, a, b = (
        (size * torch.randn(m, n, generator=random)).bfloat16() for m, n, size in shapes.values()
    )
    dy = torch.randn(M, N, generator=random).bfloat16()
    x.requires_grad_()
    y = lora_linear(x, w, None, a, b, 1.7)
    (dx,) = torch.autograd.grad(y, x, dy)
    last = (x @ w.T).addmm(x @ a.T, b.T, alpha=1.7), (dy @ w).addmm(dy @ b, a, alpha=1.7)
    wd, ad, bd = w.double(), a.double(), b.double()
    exact = (
        (x.double() @ wd.T + 1.7 * x.double() @ ad.T @ bd.T),
        (dy.double() @ wd + 1.7 * dy.double() @ bd @ ad),
    )
    for ours, theirs, want in zip((y, dx), last, exact, strict=True):
        rms = [(got.double() - want).square().mean().sqrt().item() for got in (ours, theirs)]
        assert rms[0] <= rms[1]


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_offsets_go_past_two_billion_elements(backend: str) -> None:
    step = 2**30 + 8
    x = torch.empty(2 * step + 3, dtype=torch.float16).as_strided((3, 3), (1, step))
    given = inputs(3, 3, 5, 2, torch.float16)
    x.copy_(given["x"])
    y = lora_linear(**{**given, "x": x}, scaling=1.7, backend=backend)
    close(y, lora_forward(*(t.double() for t in given.values()), 1.7), torch.float16)


@pytest.mark.parametrize("backend", ["triton", "fused"])
def test_kernels_are_launched_on_the_device_of_their_tensors(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = []
    real = torch.cuda.device_of
    monkeypatch.setattr("torch.cuda.device_of", lambda t: entered.append(t) or real(t))
    given = trained(inputs(6, 13, 9, 4, torch.float32), "x", "lora_a", "lora_b")
    lora_linear(**given, scaling=1.7, backend=backend).sum().backward()
    assert len(entered) == 2  # forward, backward


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 6])
def test_a_generation_step_is_the_closed_form(
    rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    counted = lambda *inputs: calls.append(inputs) or few_rows(*inputs)  # noqa: E731
    monkeypatch.setattr("minigpt_kernels.lora.few_rows", counted)
    given = inputs(rows, 13, 9, 4, torch.float32)
    given["bias"] = given["bias"] if bias else None
    with torch.no_grad():
        y = lora_linear(**given, scaling=1.7)
    assert len(calls) == (1 <= rows <= 5)
    x, w, beta, a, b = given.values()
    close(y, lora_forward(x, w, beta if bias else torch.zeros(9), a, b, 1.7), torch.float32)


def test_an_eager_step_loads_neither_the_compiler_nor_triton() -> None:
    program = """
import sys
import torch
from minigpt_kernels import lora_linear
x, w, a, b = (torch.randn(shape, requires_grad=True) for shape in ((8, 6), (5, 6), (2, 6), (5, 2)))
lora_linear(x, w, None, a, b, 2.0, 0.1).sum().backward()
assert not {"torch._dynamo", "triton"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_breakpoint_on_the_equation_fires() -> None:
    lines = []

    def trace(frame: Any, event: str, _: Any) -> Any:
        if event == "call" and frame.f_code.co_filename.endswith("lora.py"):
            lines.append(frame.f_code.co_name)
        return None

    given = trained(inputs(6, 13, 9, 4, torch.float32), "lora_a", "lora_b")
    sys.setprofile(trace)
    try:
        lora_linear(**given, scaling=1.7)
    finally:
        sys.setprofile(None)
    assert lines == ["lora_linear", "forward", "remember"]


def test_triton_refuses_what_it_cannot_multiply() -> None:
    with pytest.raises(ValueError, match=r"takes torch\.bfloat16.*the input is torch\.float64"):
        lora_linear(**inputs(6, 13, 9, 4), scaling=1.7, backend="triton")


CASE = Case((9, 0), "bfloat16", 8192, 4096, 4096, 16, False)


def test_a_route_is_that_of_its_measured_case_and_torch_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "measured.csv"
    header = "capability,dtype,M,K,N,R,dropout,route"
    path.write_text(f"# gpu: x\n{header}\n9.0,bfloat16,8000,4096,4096,16,False,fused\n")
    table = backends.read(path)
    assert table == {CASE: "fused"}
    monkeypatch.setattr(backends, "TABLE", table)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def route(M: int, N: int = 4096, dtype: torch.dtype = torch.bfloat16, p: bool = False) -> str:
        x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(M, 4096))
        return backends.choose("auto", x, torch.empty(N, 16, device="meta"), p)

    assert [route(M) for M in (4096, 4097, 8192, 8193)] == ["torch", "fused", "fused", "torch"]
    assert {route(8192, N=8192), route(8192, dtype=torch.float16), route(8192, p=True)} == {"torch"}
    path.write_text(f"{header}\n9.0,bfloat16,8000,4096,4096,16,False,cublas\n")
    with pytest.raises(ValueError, match="'cublas', must be in torch, triton, fused"):
        backends.read(path)


@pytest.mark.parametrize("p", [2.0, 1.0, -0.1, math.nan])
@pytest.mark.parametrize("backend", ROUTES)
def test_a_dropout_that_is_no_probability_below_one_is_refused(backend: str, p: float) -> None:
    given = inputs(6, 13, 9, 4, torch.float32)
    with pytest.raises(ValueError, match=rf"dropout_p is {p}, must lie in \[0, 1\)"):
        lora_linear(**given, scaling=1.7, dropout_p=p, backend=backend)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'cuda', must be one of auto, torch, triton, fused"):
        lora_linear(**inputs(6, 13, 9, 4), scaling=1.7, backend="cuda")
