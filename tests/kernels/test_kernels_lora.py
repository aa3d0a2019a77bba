"""The LoRA product and its gradients against float64, whatever trains and whatever is dropped."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from minigpt_kernels import Lora, lora_linear, lora_linears
from minigpt_kernels.dispatch import Measured, look_up
from minigpt_kernels.lora_torch import keep, unpack
from minigpt_kernels.reference import lora_linear as reference
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
    mask = unpack(keep(x, 0.4, 11), 13).double() / 0.6
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
def test_a_packed_mask_is_an_eighth_and_comes_back(shape: tuple[int, int]) -> None:
    bits = keep(torch.empty(shape), 0.4, 3)
    assert bits.shape == (shape[0], -(-shape[1] // 8))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) >= 0.4
    assert torch.equal(unpack(bits, shape[1]), mask)


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
    own = {t.data_ptr(): t for t in kept if t.data_ptr() not in parameters}
    bits = 64 * 40 // 8 if p else 0
    assert sum(t.nbytes for t in own.values()) == 4 * (64 * 40 + 64 * 3) + bits


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
    torch.testing.assert_close(y, reference(**{**given, "x": x.contiguous()}, scaling=1.7))


def test_two_runs_give_the_same_bits() -> None:
    found = []
    for _ in range(2):
        given = trained(inputs(64, 40, 24, 3, torch.float32), "x", "lora_a", "lora_b")
        lora_linear(**given, scaling=1.7, dropout_p=0.2, seed=5).sin().sum().backward()
        found.append([given[n].grad for n in ("x", "lora_a", "lora_b")])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


ODD = [(6, 13, 9, 4), (33, 70, 131, 7), (1, 64, 16, 1), (0, 5, 6, 2), (600, 19, 35, 17)]


def philox(M: int, K: int, p: float, seed: int) -> Tensor:
    """The mask of the kernels."""
    from minigpt_kernels import lora_triton

    return lora_triton.unpack(lora_triton.keep(torch.empty(M, K), p, torch.tensor(seed)), K)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", ODD)
def test_triton_is_the_closed_form_forward_and_backward(
    sizes: tuple[int, int, int, int], p: float, dtype: torch.dtype
) -> None:
    M, K, N, _ = sizes
    given = trained(inputs(*sizes, dtype), "x", "weight", "bias", "lora_a", "lora_b")
    dy = torch.randn(M, N).to(dtype)
    y = lora_linear(**given, scaling=1.7, dropout_p=p, seed=5, backend="triton")
    y.backward(dy)
    x, w, bias, a, b = (t.detach().double() for t in given.values())
    kept = (philox(M, K, p, 5).double() if p else torch.ones(M, K).double()) / (1 - p)
    if p and M * K > 1000:
        assert (kept > 0).double().mean().item() == pytest.approx(1 - p, abs=0.05)
    assert y.dtype == dtype
    close(y, (x @ w.T + bias + 1.7 * (kept * x) @ a.T @ b.T).numpy(), dtype)
    dx, da, db = lora_gradients(x, dy.double(), w, a, b, 1.7, kept=kept)
    wanted = [dx, (dy.double().T @ x).numpy(), dy.double().sum(0).numpy(), da, db]
    for (name, tensor), want in zip(given.items(), wanted, strict=True):
        assert tensor.grad is not None, name
        close(tensor.grad, want, dtype)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_triton_drops_with_probability_p_whatever_the_place(p: float) -> None:
    mask = philox(400, 96, p, 7).double()
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


def test_triton_takes_any_strides() -> None:
    given = inputs(24, 13, 9, 4, torch.float32)
    views = {
        name: torch.randn(len(t), 2 * t.size(1) + 1)[:, 1::2]
        for name, t in given.items()
        if t.dim() > 1
    }
    assert not any(t.is_contiguous() for t in views.values())
    y = lora_linear(**views, bias=given["bias"], scaling=1.7, backend="triton")
    x, w, a, b = (views[name] for name in ("x", "weight", "lora_a", "lora_b"))
    close(y, lora_forward(x, w, given["bias"], a, b, 1.7), torch.float32)


def test_triton_gives_the_same_bits_twice_and_others_for_another_seed() -> None:
    found = []
    for seed in (5, 5, 6):
        given = trained(inputs(70, 40, 24, 3, torch.float32), "x", "lora_a", "lora_b")
        y = lora_linear(**given, scaling=1.7, dropout_p=0.2, seed=seed, backend="triton")
        y.sin().sum().backward()
        found.append([given[n].grad for n in ("x", "lora_a", "lora_b")])
    first, second, third = found
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def three(M: int, K: int, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Query, key and value of one x: other widths, ranks and scalings, one without a bias."""
    found = []
    for i, (N, R, scaling) in enumerate([(9, 4, 1.7), (5, 2, 0.6), (9, 7, -1.1)]):
        given = inputs(M + i, K, N, R, dtype)
        del given["x"]
        found.append({**given, "bias": None if i == 1 else given["bias"], "scaling": scaling})
    return found


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("torch", torch.float64), ("torch", torch.float32), ("triton", torch.float32)],
)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_siblings_are_the_closed_forms_of_each(backend: str, dtype: torch.dtype, p: float) -> None:
    M, K = 40, 13
    x = inputs(M, K, 1, 1, dtype)["x"].requires_grad_()
    loras = [
        {n: t.requires_grad_() if isinstance(t, Tensor) else t for n, t in one.items()}
        for one in three(M, K, dtype)
    ]
    ys = lora_linears(x, [Lora(**one) for one in loras], p, seed=5, backend=backend)
    dys = [torch.randn(y.shape, dtype=torch.float64).to(dtype) for y in ys]
    torch.autograd.backward(ys, dys)
    mask = philox(M, K, p, 5) if backend == "triton" else unpack(keep(x, p, 5), K)
    kept = mask.double() / (1 - p) if p else torch.ones(M, K).double()
    dx = np.zeros((M, K))
    for one, y, dy in zip(loras, ys, dys, strict=True):
        w, a, b = (one[n].detach().double() for n in ("weight", "lora_a", "lora_b"))
        own, s = x.detach().double(), one["scaling"]
        bias = torch.zeros(len(w)) if one["bias"] is None else one["bias"].detach()
        close(y, (own @ w.T + bias.double() + s * (kept * own) @ a.T @ b.T).numpy(), dtype)
        more, da, db = lora_gradients(own, dy.double(), w, a, b, s, kept=kept)
        dx += more
        close(one["lora_a"].grad, da, dtype)
        close(one["lora_b"].grad, db, dtype)
        close(one["weight"].grad, (dy.double().T @ own).numpy(), dtype)
        if one["bias"] is not None:
            close(one["bias"].grad, dy.double().sum(0).numpy(), dtype)
    assert x.grad is not None
    close(x.grad, dx, dtype)


def test_of_siblings_only_what_trains_gets_a_gradient() -> None:
    x = inputs(6, 13, 1, 1)["x"]
    loras = three(6, 13)
    chosen = [loras[0]["lora_b"], loras[2]["lora_a"], loras[2]["bias"]]
    for tensor in chosen:
        tensor.requires_grad_()
    sum(y.sin().sum() for y in lora_linears(x, [Lora(**one) for one in loras])).backward()
    every = [t for one in loras for t in one.values() if isinstance(t, Tensor)]
    assert {id(t) for t in every if t.grad is not None} == {id(t) for t in chosen}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 70, 131, 7), (16, 300, 35, 17), (3, 5, 1, 1), (5, 64, 16, 40)]
)
def test_triton_decodes_a_few_rows(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    given = inputs(*sizes, dtype)
    y = lora_linear(**given, scaling=1.7, backend="triton")
    assert y.dtype == dtype
    close(y, lora_forward(*(t.double() for t in given.values()), 1.7), dtype)
    given["bias"] = None
    y = lora_linear(**given, scaling=1.7, backend="triton")
    x, w, _, a, b = given.values()
    zero = torch.zeros(sizes[2])
    close(y, lora_forward(x.double(), w.double(), zero, a.double(), b.double(), 1.7), dtype)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(140, 72, 264, 16), (200, 40, 136, 24), (3, 128, 8, 8)])
def test_descriptors_are_the_closed_form(
    sizes: tuple[int, int, int, int], p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt_kernels import lora_triton, tiles

    monkeypatch.setattr(tiles, "family", lambda device: 90)
    launched = []
    real = lora_triton.expand_tma_kernel

    class Counted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            launched.append(grid)
            return real[grid]

    monkeypatch.setattr(lora_triton, "expand_tma_kernel", Counted())
    M, K, N, _ = sizes
    dtype = torch.float16
    given = trained(inputs(*sizes, dtype), "x", "lora_a", "lora_b")
    dy = torch.randn(M, N).to(dtype)
    y = lora_linear(**given, scaling=1.7, dropout_p=p, seed=5, backend="triton")
    y.backward(dy)
    assert len(launched) == 2  # y and dx
    x, w, bias, a, b = (t.detach().double() for t in given.values())
    kept = philox(M, K, p, 5).double() / (1 - p) if p else torch.ones(M, K).double()
    close(y, (x @ w.T + bias + 1.7 * (kept * x) @ a.T @ b.T).numpy(), dtype)
    for name, want in zip(
        ("x", "lora_a", "lora_b"),
        lora_gradients(x, dy.double(), w, a, b, 1.7, kept=kept),
        strict=True,
    ):
        close(given[name].grad, want, dtype)


def test_a_descriptor_is_for_aligned_rows_that_lie_apart() -> None:
    from minigpt_kernels.lora_triton import _by_descriptor as described

    x, w, y = (torch.empty(shape, dtype=torch.float16) for shape in ((8, 32), (16, 32), (8, 16)))
    assert described(x, w, y)
    assert described(x, torch.empty(32, 16, dtype=torch.float16).T, y)
    assert not described(x[:1].expand(8, 32), w, y)
    assert not described(torch.empty(8, 36, dtype=torch.float16)[:, :32], w, y)
    assert not described(torch.empty(8, 40, dtype=torch.float16)[:, 4:36], w, y)
    assert not described(x[:, ::2], w[:, :16], y)
    assert not described(x.float(), w.float(), y.float())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_compiled_graph_is_whole_and_computes_the_same(backend: str, p: float) -> None:
    found = []
    for compiled in (False, True):
        x = inputs(24, 13, 1, 1, torch.float32)["x"].requires_grad_()
        loras = [
            {n: t.requires_grad_() if isinstance(t, Tensor) else t for n, t in one.items()}
            for one in three(24, 13, torch.float32)
        ]

        def step(x: Tensor, loras: list[dict[str, Any]]) -> Tensor:
            ys = lora_linears(x, [Lora(**one) for one in loras], p, backend=backend)
            return torch.stack([y.sin().sum() for y in ys]).sum()

        torch.manual_seed(0)
        run = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
        run(x, loras).backward()
        found.append([t.grad for one in loras for t in one.values() if isinstance(t, Tensor)])
    for eager, compiled_ in zip(*found, strict=True):
        torch.testing.assert_close(eager, compiled_)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operators_return_the_shapes_they_promise(backend: str, dropped: bool) -> None:
    from minigpt_kernels import lora_op

    x = torch.randn(24, 13, requires_grad=True)
    loras = three(24, 13, torch.float32)
    columns = [
        [x.new_empty(0) if one[n] is None else one[n].requires_grad_() for one in loras]
        for n in ("weight", "bias", "lora_a", "lora_b")
    ]
    p = 0.3 if dropped else 0.0
    bits = None
    if dropped and backend == "triton":
        seed = torch.tensor(3)
        torch.library.opcheck(lora_op.keep, (x.detach(), p, seed))
        bits = lora_op.keep(x.detach(), p, seed)
    elif dropped:
        bits = keep(x, p, 3)
    scalings = [one["scaling"] for one in loras]
    needs = [True, *[True] * 3, True, False, True, *[True] * 6]  # x, W, b (one is none), A, B
    torch.library.opcheck(lora_op.lora, (backend, p, scalings, bits, x, *columns, needs))


def test_triton_refuses_what_it_cannot_multiply() -> None:
    with pytest.raises(ValueError, match=r"takes torch\.bfloat16.*the input is torch\.float64"):
        lora_linear(**inputs(6, 13, 9, 4), scaling=1.7, backend="triton")


ROW = Measured((9, 0), "bfloat16", 8192, 4096, 4096, 16, False, "triton")
SMALL = ROW._replace(M=4096, K=768, N=768, R=8, route="torch")


@pytest.mark.parametrize(
    ("sizes", "capability", "dtype", "dropout", "route"),
    [
        ((8192, 4096, 4096, 16), (9, 0), "bfloat16", False, "triton"),
        ((5000, 4096, 8192, 32), (9, 0), "bfloat16", False, "triton"),
        ((4096, 768, 768, 8), (9, 0), "bfloat16", False, "torch"),
        ((4000, 4096, 4096, 16), (9, 0), "bfloat16", False, "torch"),
        ((8192, 4096, 4096, 16), (8, 0), "bfloat16", False, "torch"),
        ((8192, 4096, 4096, 16), (9, 0), "float16", False, "torch"),
        ((8192, 4096, 4096, 16), (9, 0), "bfloat16", True, "torch"),
        ((0, 4096, 4096, 16), (9, 0), "bfloat16", False, "torch"),
    ],
)
def test_the_route_is_that_of_the_nearest_measured_row(
    sizes: tuple[int, ...], capability: tuple[int, int], dtype: str, dropout: bool, route: str
) -> None:
    assert look_up([SMALL, ROW], capability, dtype, sizes, dropout) == route
    assert look_up([], capability, dtype, sizes, dropout) == "torch"
