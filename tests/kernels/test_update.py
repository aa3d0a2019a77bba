"""Clip and update against torch's own two calls and against float64, by torch and by Triton."""

import copy
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minigpt_kernels import ClippedAdamW, ClippedSGD, update_triton
from minigpt_kernels.backend import resolve
from tests.kernels import update_checks as checks
from tests.kernels.update_checks import EPS, close, parameters, set_grads, twins

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
@pytest.mark.parametrize(("c", "size"), checks.BOUNDS)
def test_a_step_of_sgd_is_the_closed_form_and_no_longer_than_its_bound(
    backend: str, c: float, size: float
) -> None:
    checks.a_step_of_sgd_is_the_closed_form(backend, c, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(backend: str, kind: type, bad: float) -> None:
    checks.a_norm_that_is_not_finite_changes_nothing(backend, kind, bad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
def test_halves_on_two_processes_are_a_step_on_one(backend: str, kind: type) -> None:
    whole = parameters()
    parts = twins(whole)
    optimizer = kind(whole, lr=1e-2, max_norm=0.5, backend=backend)
    first, second = (
        kind(some, lr=1e-2, max_norm=0.5, backend=backend) for some in (parts[:3], parts[3:])
    )
    for step in range(3):
        set_grads(step, whole, parts)
        norm = optimizer.step()
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


def strange(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of another layout, (4, 6), and the memory it lies in."""
    random = torch.Generator().manual_seed(len(kind))
    memory = torch.randn(8, 12, generator=random)
    views = {
        "contiguous": memory[:4, :6].contiguous(),
        "transposed": memory[:6, :4].t(),
        "sliced": memory[::2, 1::2],
        "expanded": memory[:1, :6].expand(4, 6),
        "reversed strides": memory[:6, :4].contiguous().t(),
    }
    return views[kind], memory


LAYOUTS = ["contiguous", "transposed", "sliced", "reversed strides"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("theta", LAYOUTS)
@pytest.mark.parametrize("grad", [*LAYOUTS, "expanded"])
@pytest.mark.parametrize("moment", LAYOUTS)
def test_tensors_of_any_layout_are_updated_rightly(
    backend: str, theta: str, grad: str, moment: str
) -> None:
    p = nn.Parameter(strange(theta)[0])
    q = nn.Parameter(p.detach().contiguous().double())
    other = parameters([(9,)])[0]  # an ordinary one beside it
    mine = ClippedAdamW([p, other], 1e-2, weight_decay=0.1, max_norm=math.inf, backend=backend)
    torchs = torch.optim.AdamW([q], 1e-2, weight_decay=0.1, foreach=False)
    for step in range(3):
        g, memory = strange(grad)
        p.grad, untouched = g, memory.clone()
        q.grad = g.contiguous().double()
        other.grad = torch.ones(9)
        mine.step()
        torchs.step()
        if grad in ("sliced", "expanded", "transposed"):
            assert torch.equal(memory, untouched)  # nothing beside the gradient was written
        if step == 0:
            for name in ("exp_avg", "exp_avg_sq"):
                value = strange(moment)[0].abs_()
                mine.state[p][name] = value
                torchs.state[q][name] = value.double().clone(memory_format=torch.contiguous_format)
    torch.testing.assert_close(p.double(), q, rtol=20 * EPS, atol=20 * EPS)
    for name in ("exp_avg", "exp_avg_sq"):
        ours, theirs = mine.state[p][name].double(), torchs.state[q][name]
        torch.testing.assert_close(ours, theirs, rtol=20 * EPS, atol=20 * EPS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded"])
def test_a_gradient_of_any_layout_at_the_same_address_is_found(
    backend: str, kind: type, layout: str
) -> None:
    p = nn.Parameter(torch.ones(4, 6))
    q = nn.Parameter(torch.ones(4, 6))
    clipped, other = (kind([x], lr=0.1, max_norm=0.5, backend=backend) for x in (p, q))
    view = strange(layout)[0]
    for g in (torch.as_strided(view, (4, 6), (6, 1)), view):
        p.grad, q.grad = g, g.clone(memory_format=torch.contiguous_format)
        clipped.step()
        other.step()
        assert torch.equal(p, q)


@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
def test_half_precision_lives_beside_single(kind: type) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    ours = [nn.Parameter(p.detach().to(t)) for t in dtypes for p in parameters([(7, 5), (9001,)])]
    theirs = [nn.Parameter(p.detach().double()) for p in ours]
    clipped = kind(ours, lr=0.1, max_norm=100)
    other = kind(theirs, lr=0.1, max_norm=100)
    before = [p.detach().clone() for p in ours]
    for step in range(3):
        random = torch.Generator().manual_seed(step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=random).to(p.dtype)
            q.grad = p.grad.double()
        torch.testing.assert_close(clipped.step().double(), other.step(), rtol=1e-5, atol=0)
    for p, q, x in zip(ours, theirs, before, strict=True):
        assert not torch.equal(p, x)
        # each of three steps rounds theta, and the moments that move it by about lr
        eps = torch.finfo(p.dtype).eps
        limit = 3 * eps * (q.abs().max().item() + 4 * 0.1) + 3e-6  # the norm is in float32
        assert (p.double() - q).abs().max() <= limit


def test_a_parameter_cut_at_the_same_address_is_found() -> None:
    p = nn.Parameter(torch.ones(10))
    optimizer = ClippedAdamW([p], backend="triton")
    p.grad = torch.ones(10)
    optimizer.step()
    whole, p.grad = p.data, None
    p.data = p.data[:4]
    p.grad = torch.ones(4)
    before = whole.clone()
    with pytest.raises(ValueError, match=r"\[10\] on cpu beside .* \[4\] on cpu"):
        optimizer.step()
    assert torch.equal(whole, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_may_join_later(backend: str) -> None:
    ours = parameters()
    theirs = twins(ours)
    mine = ClippedAdamW(ours[:6], 1e-2, max_norm=0.5, backend=backend)
    torchs = torch.optim.AdamW(theirs[:6], 1e-2)
    for step in range(5):
        set_grads(step, ours, theirs)
        if step < 2:
            ours[3].grad = theirs[3].grad = None  # has made fewer steps than the others
        if step < 3:
            for p in (*ours[6:], *theirs[6:]):
                p.grad = None
        if step == 3:
            for optimizer, params in ((mine, ours), (torchs, theirs)):
                optimizer.add_param_group({"params": params[6:], "lr": 3e-2})
        torch.testing.assert_close(mine.step(), nn.utils.clip_grad_norm_(theirs, 0.5))
        torchs.step()
    close(ours, theirs, ulps=50)
    assert [mine.state[p]["step"].item() for p in (ours[0], ours[3], ours[7])] == [5, 3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_of_one_size_take_turns(backend: str) -> None:
    ours = parameters([(5000,)] * 2)
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5, backend=backend)
    torchs = torch.optim.AdamW(theirs, 1e-2)
    for step, turn in enumerate((0, 0, 1, 0, 1, 1, 1)):
        set_grads(step, ours, theirs)
        ours[1 - turn].grad = theirs[1 - turn].grad = None
        mine.step()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        close(ours, theirs, ulps=50)
    assert [mine.state[p]["step"].item() for p in ours] == [3, 4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_state_loaded_between_steps_counts_from_there(backend: str) -> None:
    ours = parameters()
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5, backend=backend)
    torchs = torch.optim.AdamW(theirs, 1e-2)
    for step in range(6):
        set_grads(step, ours, theirs)
        mine.step()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
        if step == 1:
            kept = copy.deepcopy(mine.state_dict()), copy.deepcopy(torchs.state_dict())
        if step == 3:
            mine.load_state_dict(kept[0])
            torchs.load_state_dict(kept[1])
    close(ours, theirs, ulps=50)
    assert mine.state[ours[2]]["step"].item() == 4


def test_a_state_of_torchs_own_keeps_our_clip() -> None:
    params = parameters()
    torchs = torch.optim.AdamW(params, 5.0)
    set_grads(0, params)
    torchs.step()
    mine = ClippedAdamW(params, 1e-2, max_norm=0.25)
    mine.load_state_dict(copy.deepcopy(torchs.state_dict()))
    assert mine.param_groups[0]["lr"] == 5.0
    assert mine.param_groups[0]["max_norm"] == 0.25
    mine.step()
    other = torch.optim.AdamW(params, amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad is True, must be False"):
        mine.load_state_dict(other.state_dict())
    assert mine.state[params[0]]["step"].item() == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_goes_on_by_itself(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = ClippedAdamW(model.parameters(), 0.1, max_norm=0.5, backend=backend)
    set_grads(0, [*model.parameters()])
    optimizer.step()
    other, twin = copy.deepcopy((model, optimizer))
    before = [p.detach().clone() for p in model.parameters()]
    set_grads(1, [*other.parameters()])
    twin.step()
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before, strict=True))
    set_grads(1, [*model.parameters()])
    optimizer.step()
    close([*other.parameters()], [*model.parameters()], ulps=0)
    assert optimizer.state[model.weight]["step"].item() == 2


def test_any_groups_take_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    class Counted:
        def __init__(self, kernel: object) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int]) -> object:
            launched.append(grid)
            return self.kernel[grid]

    for name in ("squares_kernel", "adamw_kernel"):
        monkeypatch.setattr(update_triton, name, Counted(getattr(update_triton, name)))
    params = parameters()
    groups = [{"params": [p], "lr": 0.1 * k} for k, p in enumerate(params)]
    optimizer = ClippedAdamW(groups, backend="triton")
    for step in range(3):
        set_grads(step, params)
        optimizer.step()
        assert len(launched) == 2 * (step + 1)
    assert launched[:2] == [(15,), (15,)]  # programs


def test_settings_are_written_where_they_were() -> None:
    ours = parameters([(5,), (6,)])
    theirs = twins(ours)
    groups = [{"params": [p]} for p in ours]
    mine = ClippedAdamW(groups, 1e-2, max_norm=0.5, backend="triton")
    set_grads(0, ours)
    mine.step()
    tables = mine._launches
    assert tables is not None
    where, version = tables.settings.data_ptr(), tables.settings._version
    mine.step()
    assert tables.settings._version == version
    mine.param_groups[1].update(lr=3e-2, max_norm=0.1, betas=(0.0, 0.5), eps=1e-3, weight_decay=0.2)
    mine.write_settings()
    assert tables.settings.data_ptr() == where
    assert tables.settings[1].tolist() == [3e-2, 0.1, 1e-3, 0.2, 0.0, 0.5]
    version = tables.settings._version
    mine.step()
    assert tables.settings._version == version
    ClippedAdamW(theirs).write_settings()  # nothing on the device yet, nothing to do


def test_the_tables_are_built_once() -> None:
    params = parameters()
    optimizer = ClippedAdamW(params, backend="triton")
    set_grads(0, params)
    optimizer.step()
    tables = optimizer._launches
    assert tables is not None
    built = tables.table, tables.chunks
    for _ in range(2):
        optimizer.step()
        assert (tables.table, tables.chunks) == built
    optimizer.zero_grad()
    set_grads(1, params)
    params[0].grad = torch.empty(70)[35:].view(7, 5).copy_(params[0].grad)
    optimizer.step()
    assert tables.table is not built[0]
    assert tables.chunks is built[1]


@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize("size", [16, 18, 4096, 4098, 4100])
def test_chunks_of_any_alignment_and_length_live_side_by_side(offset: int, size: int) -> None:
    ours = [nn.Parameter(torch.empty(n + 4)[k : k + n]) for n, k in ((size, offset), (8192, 0))]
    with torch.no_grad():
        for p in ours:
            p.normal_()
    theirs = twins(ours)
    set_grads(0, ours, theirs)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5, backend="triton")
    mine.step()
    torchs = torch.optim.AdamW(theirs, 1e-2)
    nn.utils.clip_grad_norm_(theirs, 0.5)
    torchs.step()
    close(ours, theirs, ulps=20)


def within(values: torch.Tensor, filling: float, offset: int = 64) -> torch.Tensor:
    """The same numbers, with `offset` others before them and 64 behind."""
    n = values.numel()
    memory = torch.full((offset + n + 64,), filling)
    return memory[offset : offset + n].copy_(values)


def beside(view: torch.Tensor) -> torch.Tensor:
    """What lies before and behind it."""
    first, n = view.storage_offset(), view.numel()
    memory = view.as_strided((view.untyped_storage().nbytes() // 4,), (1,), 0)
    return torch.cat([memory[:first], memory[first + n :]])


@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("size", [1, 510, 512, 4100])
def test_nothing_beside_a_tensor_is_read_or_written(kind: type, size: int) -> None:
    random = torch.Generator().manual_seed(size)
    p, q = (nn.Parameter(torch.linspace(-1, 1, size)) for _ in range(2))
    p.data = within(p.data, 7.0)
    clipped, other = (kind([x], lr=0.1, max_norm=0.5, backend="triton") for x in (p, q))
    written = [p.data]
    for step in range(2):
        q.grad = torch.randn(size, generator=random)
        p.grad = within(q.grad, math.nan)
        clipped.step()
        other.step()
        if kind is ClippedAdamW and step == 0:
            for name in ("exp_avg", "exp_avg_sq"):
                clipped.state[p][name] = within(clipped.state[p][name], 7.0)
                written.append(clipped.state[p][name])
    assert torch.equal(p, q)
    assert all((beside(view) == 7).all() for view in written)


@pytest.mark.parametrize("size", [16, 18])
@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        *((ClippedAdamW, name) for name in (None, "theta", "grad", "exp_avg", "exp_avg_sq")),
        *((ClippedSGD, name) for name in (None, "theta", "grad")),
    ],
)
def test_four_numbers_are_read_at_once_where_every_tensor_allows_it(
    kind: type, moved: str | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU stops at four numbers that are not aligned; the interpreter would read them."""
    first, p = parameters([(16,), (size,)])
    optimizer = kind([first, p], lr=0.1, backend="triton")
    set_grads(0, [first, p])
    if moved == "theta":
        p.data = within(p.data, 0.0, offset=1)
    if moved == "grad":
        p.grad = within(p.grad, 0.0, offset=1)
    if kind is ClippedAdamW:
        optimizer.step()
        state = optimizer.state[p]
        if moved in state:
            state[moved] = within(state[moved], 0.0, offset=1)
    said: list[int] = []

    def checked(name: str, size: int) -> None:
        """What a function calls a multiple of VECTOR elements is one."""
        real = getattr(update_triton, name)

        def call(*given: Any) -> Any:
            value = real(*given)
            assert value.handle.data.item() % (size * given[-1]) == 0
            said.append(given[-1])
            return value

        monkeypatch.setattr(update_triton, name, call)

    checked("pointer", 4)
    optimizer.step()
    squares = 1 if moved == "grad" or size % 4 else 4
    update = 1 if moved or size % 4 else 4
    tensors = 4 if kind is ClippedAdamW else 2
    assert said == [4, squares, *[4] * tensors, *[update] * tensors]
    checked("length_of", 1)
    optimizer.step()


def three_steps(backend: str, compiler: str | None) -> list[torch.Tensor]:
    """Three norms and the parameters after them, the whole step inside torch.compile or not."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 4, generator=random), torch.randn(5, 2, generator=random)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = ClippedAdamW(model.parameters(), 1e-2, max_norm=0.3, backend=backend)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss = (model(x) - y).square().mean()
        loss.backward()
        norm = optimizer.step()
        optimizer.zero_grad()
        return norm

    torch._dynamo.reset()
    run = torch.compile(step, backend=compiler) if compiler else step
    return [*(run(x, y) for _ in range(3)), *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_training_function_makes_the_same_steps(backend: str, compiler: str) -> None:
    pairs = zip(three_steps(backend, compiler), three_steps(backend, None), strict=True)
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected, rtol=20 * EPS, atol=20 * EPS)


def test_a_step_is_not_traced() -> None:
    params = parameters([(3,)])
    set_grads(0, params)
    torch._dynamo.reset()
    run = torch.compile(ClippedAdamW(params).step, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
        run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loading_copies_into_the_tensors_that_are_there(backend: str, layout: str) -> None:
    ours = [nn.Parameter(torch.ones(4, 6)), *parameters()]
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5, backend=backend)
    other = ClippedAdamW(theirs, 1e-2, max_norm=0.5, backend=backend)
    for step in range(3):
        set_grads(step, ours, theirs)
        mine.step()
        if step < 2:
            other.step()
    state = other.state_dict()
    state["state"][0]["exp_avg_sq"] = strange(layout)[0].abs_()
    other.state[theirs[0]]["exp_avg_sq"] = state["state"][0]["exp_avg_sq"].contiguous().clone()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    before = [value for p in ours for value in mine.state[p].values()]
    mine.load_state_dict(state)
    after = [value for p in ours for value in mine.state[p].values()]
    assert all(a is b for a, b in zip(before, after, strict=True))
    set_grads(3, ours, theirs)
    mine.step()
    other.step()
    close(ours, theirs, ulps=0)
    mine.load_state_dict(ClippedAdamW(theirs).state_dict())  # of no step at all
    assert all(
        a is b and not a.any()
        for a, b in zip(mine.state[ours[1]].values(), after[3:6], strict=True)
    )


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    params = parameters([(3,), (4,)])
    optimizer = ClippedAdamW(params)
    set_grads(0, params)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state_dict())
    wrong = copy.deepcopy(kept)
    wrong["state"][1]["exp_avg"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"exp_avg of shape \[3\] .* \[4\]"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(kept)
    wrong["state"][1]["momentum_buffer"] = wrong["state"][1].pop("exp_avg")
    with pytest.raises(ValueError, match="momentum_buffer, step, must have exp_avg, exp_avg_sq"):
        optimizer.load_state_dict(wrong)
    wrong = copy.deepcopy(kept)
    wrong["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr is nan"):
        optimizer.load_state_dict(wrong)
    for i, p in enumerate(params):
        assert all(
            torch.equal(value, kept["state"][i][k]) for k, value in optimizer.state[p].items()
        )


SENSELESS = [
    ({"lr": math.nan}, "lr is nan, must be a number, at least 0 and finite"),
    ({"lr": -1e-3}, "lr is -0.001"),
    ({"lr": math.inf}, "lr is inf"),
    ({"lr": "1e-3"}, "lr is 1e-3"),
    ({"betas": (1.5, 2)}, r"betas are \(1.5, 2\), must be two numbers from 0 to below 1"),
    ({"betas": (0.9, 1.0)}, r"betas are \(0.9, 1.0\)"),
    ({"betas": (0.9, math.nan)}, "betas are"),
    ({"betas": (0.9,)}, "betas are"),
    ({"eps": -1e-8}, "eps is -1e-08"),
    ({"eps": math.inf}, "eps is inf"),
    ({"weight_decay": math.nan}, "weight_decay is nan"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"weight_decay": math.inf}, "weight_decay is inf"),
    ({"max_norm": math.nan}, "max_norm is nan"),
    ({"maximize": True}, "maximize is True, must be False"),
]


@pytest.mark.parametrize(("settings", "message"), SENSELESS)
def test_a_setting_out_of_its_range_is_refused(settings: dict, message: str) -> None:
    params = parameters([(3,), (4,)])
    optimizer = ClippedAdamW(params[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], **settings})
    assert len(optimizer.param_groups) == 1
    if "maximize" not in settings:
        with pytest.raises(ValueError, match=message):
            ClippedAdamW(params, **settings)
    set_grads(0, params)
    optimizer.step()
    before = params[0].detach().clone()
    optimizer.param_groups[0].update(settings)
    for call in (optimizer.step, optimizer.sum_of_squares, optimizer.write_settings):
        with pytest.raises(ValueError, match=message):
            call()
    assert torch.equal(params[0], before)


def test_zero_is_a_setting_like_others() -> None:
    """Without eps, decay or memory of gradients AdamW moves each number by eta."""
    p = nn.Parameter(torch.tensor([1.0, -2.0]))
    p.grad = torch.tensor([3.0, -0.5])
    optimizer = ClippedAdamW([p], 0.25, (0.0, 0.0), 0.0, 0.0)
    optimizer.step()
    torch.testing.assert_close(p.data, torch.tensor([0.75, -1.75]))
    optimizer.param_groups[0]["lr"] = 0.0
    before = p.detach().clone()
    optimizer.step()
    assert torch.equal(p, before)


def test_a_parameter_that_cannot_be_updated_is_refused() -> None:
    expanded = nn.Parameter(torch.ones(1).expand(3))
    optimizer = ClippedSGD(parameters([(3,)]), lr=0.1)
    with pytest.raises(ValueError, match=r"shape \[3\] is expanded"):
        optimizer.add_param_group({"params": [expanded]})
    with pytest.raises(ValueError, match="complex64, must be of real floating-point numbers"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3, dtype=torch.cfloat))]})
    assert len(optimizer.param_groups) == 1
    sparse = nn.Embedding(5, 2, sparse=True)
    sparse(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"layout is torch.sparse_coo, must be torch.strided"):
        ClippedAdamW(sparse.parameters()).step()


def test_what_makes_no_sense_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    with pytest.raises(ValueError, match="max_norm is 0"):
        ClippedAdamW(params, max_norm=0)
    optimizer = ClippedAdamW(params[:2])
    with pytest.raises(ValueError, match="max_norm is -1"):
        optimizer.add_param_group({"params": params[2:], "max_norm": -1})
    assert len(optimizer.param_groups) == 1
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
