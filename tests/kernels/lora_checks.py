"""Checks of the LoRA product that run on a GPU (test_gpu_lora.py) and, on small shapes and by
Triton's interpreter, on a CPU (test_lora_checks.py).

Errors are measured against float64 and judged beside HF PEFT's own error on the same inputs.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import peft_lite
from minigpt import GPTNeo
from minigpt.objectives.causal import language_model_loss
from minigpt_kernels import ClippedAdamW, lora_linear
from minigpt_kernels.backend import ROUTES
from minigpt_kernels.dropout import unpack
from minigpt_kernels.lora import keep

Shape = tuple[int, int, int, int]  # M, K, N, R
S = 1.7
SLACK = 3.0  # times PEFT's own error
PLACES = 4.0  # units in the last place
EPS = torch.finfo(torch.float32).eps


def inputs(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor]:
    """x, W, b, A, B and dy; W and A as small as in a model."""
    M, K, N, R = shape
    random = torch.Generator().manual_seed(seed)
    sizes = {
        "x": (M, K, 1.0),
        "weight": (N, K, K**-0.5),
        "bias": (1, N, 1.0),
        "lora_a": (R, K, K**-0.5),
        "lora_b": (N, R, R**-0.5),
        "dy": (M, N, 1.0),
    }
    tensors = {
        name: (size * torch.randn(rows, columns, generator=random)).to(device, dtype)
        for name, (rows, columns, size) in sizes.items()
    }
    tensors["bias"] = tensors["bias"][0]
    for name in ("x", "lora_a", "lora_b"):
        tensors[name].requires_grad_()
    return tensors


def exact(given: dict[str, Tensor], kept: Tensor | float = 1.0) -> dict[str, Tensor]:
    """y, dx, dA and dB in float64; `kept` is the mask over 1 - p."""
    x, w, bias, a, b, dy = (t.detach().double() for t in given.values())
    ds = S * dy @ b
    return {
        "y": x @ w.T + bias + S * (kept * x) @ a.T @ b.T,
        "x": dy @ w + kept * (ds @ a),
        "lora_a": ds.T @ (kept * x),
        "lora_b": S * dy.T @ ((kept * x) @ a.T),
    }


def ours(
    given: dict[str, Tensor], backend: str, p: float = 0.0, seed: int = 5
) -> dict[str, Tensor]:
    """The same by the layer under test, forward and backward."""
    tensors = {name: t for name, t in given.items() if name != "dy"}
    y = lora_linear(**tensors, scaling=S, dropout_p=p, seed=seed, backend=backend)
    names = ("x", "lora_a", "lora_b")
    grads = torch.autograd.grad(y, [given[name] for name in names], given["dy"])
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def of_peft(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same by HF PEFT's layer with factors in the dtype of x."""
    import peft

    N, K = given["weight"].shape
    R = len(given["lora_a"])
    model = nn.Module()
    model.layer = nn.Linear(K, N).to(given["x"])
    config = peft.LoraConfig(r=R, lora_alpha=1, target_modules=["layer"])
    layer: Any = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    layer = layer.base_model.model.layer
    layer.scaling["default"] = S
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        layer.base_layer.weight.copy_(given["weight"])
        layer.base_layer.bias.copy_(given["bias"])
        a.copy_(given["lora_a"])
        b.copy_(given["lora_b"])
    y = layer(given["x"])
    dx, da, db = torch.autograd.grad(y, [given["x"], a, b], given["dy"])
    return {"y": y.detach(), "x": dx, "lora_a": da, "lora_b": db}


def judge(
    results: dict[str, Tensor], want: dict[str, Tensor], theirs: dict[str, Tensor] | None = None
) -> None:
    """Every error is at most SLACK times PEFT's own, beside what rounding makes of the largest
    value: some last places, and those of a float32 sum of as many terms as the longest has.
    """
    terms = max(n for value in want.values() for n in value.shape)
    for name, value in want.items():
        got = results[name]
        assert got.isfinite().all(), name
        rounding = PLACES * torch.finfo(got.dtype).eps + math.sqrt(terms) * EPS
        error = (got.double() - value).abs().max().item()
        theirs_error = 0.0 if theirs is None else (theirs[name].double() - value).abs().max().item()
        allowed = SLACK * theirs_error + rounding * value.abs().max().item()
        assert error <= allowed, f"{name}: {error:.3g} off, {allowed:.3g} allowed"


def mask(given: dict[str, Tensor], p: float, seed: int) -> Tensor:
    """What dropout keeps, over 1 - p."""
    x = given["x"].detach()
    bits = keep(x, p, torch.full((), seed, device=x.device))
    return unpack(bits, x.size(1)).double() / (1 - p)


# --- checks -------------------------------------------------------------------------------------


def check_beside_peft(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> None:
    given = inputs(shape, dtype, device)
    judge(ours(given, backend), exact(given), of_peft(given))


def check_dropout(
    shape: Shape, dtype: torch.dtype, device: str, p: float = 0.3, backend: str = "triton"
) -> None:
    given = inputs(shape, dtype, device)
    kept = mask(given, p, 5)
    drawn = (kept > 0).double().mean().item()
    assert abs(drawn - (1 - p)) < 6 * (p * (1 - p) / kept.numel()) ** 0.5
    judge(ours(given, backend, p, seed=5), exact(given, kept))


@torch.no_grad()
def check_decoding(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> None:
    given = inputs(shape, dtype, device)
    tensors = {name: t for name, t in given.items() if name != "dy"}
    y = lora_linear(**tensors, scaling=S, backend=backend)
    judge({"y": y}, {"y": exact(given)["y"]})
    assert torch.equal(lora_linear(**tensors, scaling=S, backend=backend), y)


def check_two_runs(shape: Shape, dtype: torch.dtype, device: str, backend: str) -> None:
    given = inputs(shape, dtype, device)
    first, second, other = (ours(given, backend, 0.2, seed) for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def check_compiled(
    shape: Shape, dtype: torch.dtype, device: str, compiler: str, p: float, backend: str
) -> None:
    """One graph, and the same results as without it."""
    given = inputs(shape, dtype, device)
    tensors = {name: t for name, t in given.items() if name != "dy"}

    def layer(tensors: dict[str, Tensor]) -> Tensor:
        return lora_linear(**tensors, scaling=S, dropout_p=p, seed=5, backend=backend)

    torch._dynamo.reset()
    y = torch.compile(layer, backend=compiler, fullgraph=True)(tensors)
    leaves = [given[name] for name in ("x", "lora_a", "lora_b")]
    results = [y, *torch.autograd.grad(y, leaves, given["dy"])]
    kept = mask(given, p, 5) if p else 1.0
    names = ("y", "x", "lora_a", "lora_b")
    judge(dict(zip(names, (t.detach() for t in results), strict=True)), exact(given, kept))


@contextmanager
def forced(route: str) -> Iterator[None]:
    """Every LoRA product takes this route."""
    product = partial(lora_linear, backend=route)
    with patch("peft_lite.lora.lora_linear", product):
        yield


def losses(
    model: GPTNeo, method: peft_lite.LoraConfig, batches: list[dict[str, Tensor]], route: str
) -> list[float]:
    """Of a training from the model's present weights; the model is left as it was."""
    torch.manual_seed(0)
    handle = peft_lite.attach(model, method)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ClippedAdamW(trained, lr=1e-3)
    losses = []
    with forced(route):
        for batch in batches:
            loss = language_model_loss(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    handle.detach()
    return torch.stack(losses).tolist()


def check_same_losses(
    model: GPTNeo, batches: list[dict[str, Tensor]], tolerance: float, targets: Any
) -> None:
    """A training by each Triton route is one by the torch route."""
    model.train()
    config = peft_lite.LoraConfig(targets, r=8, lora_alpha=16)
    by_torch, *others = (losses(model, config, batches, route) for route in ROUTES)
    assert by_torch[-1] < by_torch[0]
    for route, other in zip(ROUTES[1:], others, strict=True):
        for step, (a, b) in enumerate(zip(by_torch, other, strict=True), 1):
            assert abs(a - b) <= tolerance * abs(a), f"step {step}: {a} by torch, {b} by {route}"
