"""Checks of the clipped update that hold on any device: the CPU runs them through torch and through
the interpreter of Triton, a GPU through the compiled kernels.
"""

import copy
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from minigpt_kernels import ClippedAdamW, ClippedSGD

SHAPES = [(7, 5), (3,), (40, 9), (9001,), (0, 3), (1,), (8192,), (2, 8193)]
BOUNDS = [(0.5, 1.0), (0.01, 1e-4), (1e6, 1.0), (math.inf, 1.0)]  # c, size of the gradient
EPS = torch.finfo(torch.float32).eps


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu", seed: int = 0
) -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random).to(device)) for shape in shapes]


def twins(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_grads(step: int, *lists: list[nn.Parameter], size: float = 1.0) -> None:
    random = torch.Generator().manual_seed(100 + step)
    for group in zip(*lists, strict=True):
        grad = size * torch.randn(group[0].shape, generator=random)
        for p in group:
            p.grad = grad.to(p.device, p.dtype, copy=True)


def close(ours: list[nn.Parameter], theirs: list[nn.Parameter], ulps: float) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=ulps * EPS, atol=ulps * EPS)


def many_steps_are_those_of_torch(
    backend: str, shapes: Sequence[tuple[int, ...]], device: str = "cpu", steps: int = 100
) -> None:
    ours = parameters(shapes, device)
    theirs = twins(ours)
    settings = {"lr": 3e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    mine = ClippedAdamW(ours, **settings, max_norm=0.7, backend=backend)
    torchs = torch.optim.AdamW(theirs, **settings)
    for step in range(steps):
        set_grads(step, ours, theirs, size=0.01 * (1 + step % 20))  # clipped now and then
        norm = mine.step()
        expected = nn.utils.clip_grad_norm_(theirs, 0.7)
        torchs.step()
        torch.testing.assert_close(norm, expected)
        assert norm.dim() == 0
        assert norm.device == ours[0].device
    assert all(mine.state[p]["step"].item() == steps for p in ours)
    close(ours, theirs, ulps=100)


def a_step_is_as_exact_as_torchs(backend: str, device: str = "cpu") -> None:
    """The errors against float64 after some steps, beside those of clip_grad_norm_ and AdamW."""
    ours = parameters(device=device)
    theirs = twins(ours)
    theta = [p.detach().double().cpu().numpy() for p in ours]
    m, v = ([np.zeros_like(x) for x in theta] for _ in range(2))
    mine = ClippedAdamW(ours, 1e-2, weight_decay=0.1, max_norm=0.5, backend=backend)
    torchs = torch.optim.AdamW(theirs, 1e-2, weight_decay=0.1)
    for t in range(1, 4):
        set_grads(t, ours, theirs)
        g = [p.grad.double().cpu().numpy() for p in ours]
        norm = math.sqrt(sum((x**2).sum() for x in g))
        clip = min(1.0, 0.5 / (norm + 1e-6))
        assert mine.step().item() == pytest.approx(norm, rel=4 * EPS)
        nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        for i, x in enumerate(theta):
            m[i] = 0.9 * m[i] + 0.1 * clip * g[i]
            v[i] = 0.999 * v[i] + 0.001 * (clip * g[i]) ** 2
            x -= 1e-2 * 0.1 * x
            x -= 1e-2 * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)

    def error(params: list[nn.Parameter]) -> float:
        pairs = zip(params, theta, strict=True)
        return max(np.abs(p.detach().double().cpu().numpy() - x).max(initial=0) for p, x in pairs)

    largest = max(np.abs(x).max(initial=0) for x in theta)
    assert error(ours) <= 2 * error(theirs) + EPS * largest


def two_runs_give_the_same_bits(backend: str, device: str = "cpu") -> None:
    runs = []
    for _ in range(2):
        params = parameters(device=device)
        optimizer = ClippedAdamW(params, 1e-2, max_norm=0.5, backend=backend)
        for step in range(3):
            set_grads(step, params)
            optimizer.step()
        runs.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def what_moves_is_found(backend: str, device: str = "cpu") -> None:
    """Gradients, parameters and state at other addresses, with the old memory still there, so that
    a stale address would be read and written without a trace.
    """
    ours = parameters(device=device)
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5, backend=backend)
    torchs = torch.optim.AdamW(theirs, 1e-2)
    old = []

    def both() -> None:
        nonlocal step
        set_grads(step, theirs)
        for p, q in zip(ours, theirs, strict=True):
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(q.grad)  # in place: only what is moved below is elsewhere
        mine.step()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        close(ours, theirs, ulps=50)
        step += 1

    step = 0
    both()
    both()
    for p in ours[::2]:  # other gradients
        old.append(p.grad)
        p.grad = torch.empty_like(p)
    both()
    for p in ours[1::3]:  # other memory under the same gradient
        old.append(p.grad.data)
        p.grad.data = torch.empty_like(p)
    both()
    for p in ours[1::2]:  # other memory under the same parameter
        old.append(p.data)
        p.data = p.data.clone()
    both()
    for p in ours[::3]:  # another entry of the state, other memory under the same one
        state = mine.state[p]
        old += [state["exp_avg"], state["exp_avg_sq"].data]
        state["exp_avg"] = state["exp_avg"].clone()
        state["exp_avg_sq"].data = state["exp_avg_sq"].clone()
    both()
    states = [(mine.state[p], torchs.state[q]) for p, q in zip(ours, theirs, strict=True)]
    for state in states[3]:
        state["step"].fill_(1)  # a count set in place
    both()
    assert [state["step"].item() for state in states[3]] == [2, 2]
    for state in states[6]:
        state["step"] = state["step"] + 5  # another count
    both()
    mine.state[ours[2]], torchs.state[theirs[2]] = {}, {}  # nothing left of a parameter's state
    both()
    both()


def a_step_of_sgd_is_the_closed_form(
    backend: str, c: float, size: float, device: str = "cpu"
) -> None:
    """And no longer than its bound."""
    params = parameters(device=device)
    with torch.no_grad():
        for p in params:
            p.mul_(size)
    before = [p.detach().double() for p in params]
    set_grads(0, params, size=size)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
    total = ClippedSGD(params, lr=0.3, max_norm=c, backend=backend).step()
    assert total.item() == pytest.approx(norm, rel=1e-6)
    factor = 0.3 / max(1.0, norm / c)
    moved = 0.0
    for p, x in zip(params, before, strict=True):
        expected = x - factor * p.grad.double()
        torch.testing.assert_close(p.double(), expected, rtol=8 * EPS, atol=8 * EPS * size)
        moved += (p.double() - x).square().sum().item()
    assert math.sqrt(moved) <= 0.3 * min(c, norm) * (1 + 1e-5)


def a_norm_that_is_not_finite_changes_nothing(
    backend: str, kind: type, bad: float, device: str = "cpu"
) -> None:
    params = parameters(device=device)
    optimizer = kind(params, lr=1e-2, backend=backend)
    set_grads(0, params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = copy.deepcopy(optimizer.state_dict()["state"])
    set_grads(1, params)
    params[2].grad[3, 4] = bad
    assert not optimizer.step().isfinite()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    for i, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, state[i][name]) for name, value in entries.items())
    set_grads(2, params)
    assert optimizer.step().isfinite()
    assert not torch.equal(params[0], before[0])
