"""Clip and update against torch's own two calls and against float64, by torch and by Triton."""

import copy
import math
import os

import numpy as np
import pytest
import torch
from torch import nn

from kernels import ClippedAdamW, ClippedSGD
from kernels.backend import resolve
from tests import update_checks as checks
from tests.update_checks import EPS, close, parameters, set_grads, twins

BACKENDS = ["torch", "triton"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_steps_are_those_of_torch(backend: str) -> None:
    checks.many_steps_are_those_of_torch(backend, [(7, 5), (3,), (11, 9), (0, 3)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_error_is_no_larger_than_torchs(backend: str) -> None:
    checks.a_step_is_as_exact_as_torchs(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_give_the_same_bits(backend: str) -> None:
    checks.two_runs_give_the_same_bits(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_moves_is_found(backend: str) -> None:
    checks.what_moves_is_found(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clipped", [True, False])
def test_a_step_of_adamw_is_the_closed_form(backend: str, clipped: bool) -> None:
    params = parameters()
    c = 0.5 if clipped else 1e6
    optimizer = ClippedAdamW(params, 1e-2, (0.9, 0.999), 1e-8, 0.1, c, backend)
    theta = [p.detach().double().numpy().copy() for p in params]
    m, v = ([np.zeros_like(x) for x in theta] for _ in range(2))
    for t in range(1, 4):
        set_grads(t, params)
        g = [p.grad.double().numpy() for p in params]
        norm = math.sqrt(sum((x**2).sum() for x in g))
        clip = min(1.0, c / (norm + 1e-6))
        assert (clip < 1) == clipped
        assert optimizer.step().item() == pytest.approx(norm, rel=1e-6)
        for i, x in enumerate(theta):
            m[i] = 0.9 * m[i] + 0.1 * clip * g[i]
            v[i] = 0.999 * v[i] + 0.001 * (clip * g[i]) ** 2
            x -= 1e-2 * 0.1 * x
            x -= 1e-2 * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    for p, x in zip(params, theta, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), x, rtol=20 * EPS, atol=20 * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("c", "size"), [(0.5, 1.0), (0.01, 1e-4), (1e6, 1.0), (math.inf, 1.0)])
def test_a_step_of_sgd_is_the_closed_form_and_no_longer_than_its_bound(
    backend: str, c: float, size: float
) -> None:
    params = parameters()
    with torch.no_grad():
        for p in params:
            p.mul_(size)
    before = [p.detach().double() for p in params]
    set_grads(0, params, size=size)
    norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in params))
    found = ClippedSGD(params, lr=0.3, max_norm=c, backend=backend).step()
    assert found.item() == pytest.approx(norm, rel=1e-6)
    factor = 0.3 / max(1.0, norm / c)
    moved = 0.0
    for p, x in zip(params, before, strict=True):
        expected = x - factor * p.grad.double()
        torch.testing.assert_close(p.double(), expected, rtol=8 * EPS, atol=8 * EPS * size)
        moved += (p.double() - x).square().sum().item()
    assert math.sqrt(moved) <= 0.3 * min(c, norm) * (1 + 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(backend: str, kind: type, bad: float) -> None:
    params = parameters()
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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
def test_halves_on_two_processes_are_a_step_on_one(backend: str, kind: type) -> None:
    whole = parameters()
    parts = twins(whole)
    one = kind(whole, lr=1e-2, max_norm=0.5, backend=backend)
    first, second = (
        kind(some, lr=1e-2, max_norm=0.5, backend=backend) for some in (parts[:3], parts[3:])
    )
    for step in range(3):
        set_grads(step, whole, parts)
        norm = one.step()
        total = first.sum_of_squares() + second.sum_of_squares()
        for half in (first, second):
            torch.testing.assert_close(half.update(total), norm)
    close(parts, whole, ulps=20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_its_state_is_one_of_torch_and_the_other_way_round(backend: str) -> None:
    ours = parameters()
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5, backend=backend)
    for step in range(3):
        set_grads(step, ours)
        mine.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            q.copy_(p)
    torchs = torch.optim.AdamW(theirs, lr=5.0)
    torchs.load_state_dict(copy.deepcopy(mine.state_dict()))
    assert torchs.param_groups[0]["lr"] == 1e-2
    again = twins(theirs)
    back = ClippedAdamW(again, 7.0, max_norm=0.5, backend=backend)
    back.load_state_dict(copy.deepcopy(torchs.state_dict()))
    for step in range(3, 6):
        set_grads(step, ours, theirs, again)
        mine.step()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        back.step()
    close(ours, theirs, ulps=50)
    close(ours, again, ulps=1)
    assert back.state[again[0]]["step"].item() == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_share_one_norm_and_have_their_own_settings(backend: str) -> None:
    ours = parameters()
    theirs = twins(ours)

    def groups(params: list[nn.Parameter]) -> list[dict[str, object]]:
        return [
            {"params": params[:2], "lr": 1e-2},
            {"params": params[2:], "lr": 3e-2, "weight_decay": 0.3},
        ]

    mine = ClippedAdamW(groups(ours), max_norm=0.5, backend=backend)
    torchs = torch.optim.AdamW(groups(theirs))
    for step in range(3):
        set_grads(step, ours, theirs)
        mine.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 1e-2 / (step + 1)
        torch.testing.assert_close(mine.step(), nn.utils.clip_grad_norm_(theirs, 0.5))
        torchs.step()
    close(ours, theirs, ulps=50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clipping_can_begin_later(backend: str) -> None:
    ours = parameters()
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=math.inf, backend=backend)
    torchs = torch.optim.AdamW(theirs, 1e-2)
    for step in range(4):
        c = math.inf if step < 2 else 0.1
        mine.param_groups[0]["max_norm"] = c
        set_grads(step, ours, theirs)
        mine.step()
        nn.utils.clip_grad_norm_(theirs, c)
        torchs.step()
    close(ours, theirs, ulps=50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_without_gradient_stays(backend: str) -> None:
    params = parameters()
    optimizer = ClippedAdamW(params, 1e-2, backend=backend)
    set_grads(0, params)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    with pytest.raises(ValueError, match="max_norm is 0"):
        ClippedAdamW(params, max_norm=0)
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        ClippedAdamW(params).step()
    with pytest.raises(ValueError, match=r"backend is 'cuda', must be one of auto, torch, triton"):
        resolve("cuda", params[0])
    monkeypatch.delitem(os.environ, "TRITON_INTERPRET", raising=False)
    assert resolve("auto", params[0]) == "torch"
    with pytest.raises(ValueError, match=r"cannot run here: the tensor is on cpu"):
        resolve("triton", params[0])


def test_triton_takes_float32_only_and_says_so() -> None:
    params = [nn.Parameter(torch.randn(4, dtype=torch.float64))]
    params[0].grad = torch.randn(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float32 tensors, not torch\.float64"):
        ClippedAdamW(params, backend="triton").step()
    ClippedAdamW(params).step()
