"""Clip and update on a GPU, by the compiled kernels: what the CPU's tests check, then what only
a GPU can show: no synchronisation, two launches, CUDA graphs.
"""

import copy
import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from minigpt_kernels import ClippedAdamW, ClippedSGD
from minigpt_kernels.paged import PinnedMemory
from tests.kernels import update_checks as checks
from tests.kernels.update_checks import close, parameters, set_grads, twins

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
MANY = [(8, 1024)] * 440 + [(1,), (3,), (0, 5), (1023,), (64, 1024), (4097,), (768,), (2**21,)]


def test_a_hundred_steps_are_those_of_torch() -> None:
    checks.many_steps_are_those_of_torch("auto", checks.SHAPES, "cuda")


def test_hundreds_of_tensors_are_as_torchs() -> None:
    checks.many_steps_are_those_of_torch("auto", MANY, "cuda", steps=5)


def test_the_error_is_no_larger_than_torchs() -> None:
    checks.a_step_is_as_exact_as_torchs("auto", "cuda")


def test_two_runs_give_the_same_bits() -> None:
    checks.two_runs_give_the_same_bits("auto", "cuda")


def test_what_moves_is_found() -> None:
    checks.what_moves_is_found("auto", "cuda")


@pytest.mark.parametrize(("c", "size"), checks.BOUNDS)
def test_a_step_of_sgd_is_the_closed_form_and_no_longer_than_its_bound(
    c: float, size: float
) -> None:
    checks.a_step_of_sgd_is_the_closed_form("auto", c, size, "cuda")


@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(kind: type, bad: float) -> None:
    checks.a_norm_that_is_not_finite_changes_nothing("auto", kind, bad, "cuda")


def test_what_is_not_float32_takes_torchs_way() -> None:
    ours = [nn.Parameter(p.detach().bfloat16()) for p in parameters([(7, 5), (9001,)], "cuda")]
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5)
    torchs = torch.optim.AdamW(theirs, 1e-2, fused=True)
    for step in range(3):
        set_grads(step, ours, theirs)
        mine.step()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        torchs.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-2, atol=1e-3)  # torch rounds the clipped gradient


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
def test_the_host_never_waits(kind: type) -> None:
    params = parameters(device="cuda")
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    optimizer = kind(params, lr=1e-2, max_norm=0.5)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(4):
            for p, g in zip(params, grads[step], strict=True):
                p.grad = g
            optimizer.param_groups[0].update(lr=1e-2 / (step + 1), max_norm=0.5 + step)
            optimizer.step()
            params[1].grad = None  # the tables are built again
            optimizer.update(optimizer.sum_of_squares())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
def test_a_step_is_two_launches_and_nothing_else(kind: type) -> None:
    params = parameters(MANY, "cuda")
    groups = [{"params": params[:100]}, {"params": params[100:], "lr": 3e-3}]
    optimizer = kind(groups, lr=1e-2)
    set_grads(0, params)
    optimizer.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        optimizer.step()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in on_gpu if not name.startswith("Optimizer.")]  # torch's own label
    assert len(kernels) == 2, kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_state_gives_the_same_bits_and_leaves_the_gpu(dtype: torch.dtype) -> None:
    shapes = [*checks.SHAPES, *[(2**22,)] * 12]
    plain = [nn.Parameter(p.detach().to(dtype)) for p in parameters(shapes, "cuda")]
    paged = twins(plain)
    optimizers, used = [], []
    for params, memory in ((plain, None), (paged, PinnedMemory())):
        optimizer = ClippedAdamW(params, 1e-2, max_norm=0.5, memory=memory)
        before = torch.cuda.memory_allocated()
        for step in range(4):
            set_grads(step, params)
            optimizer.step() if step % 2 else optimizer.update(optimizer.sum_of_squares())
            optimizer.zero_grad()
        used.append(torch.cuda.memory_allocated() - before)
        optimizers.append(optimizer)
    for p, q in zip(plain, paged, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizers[1].state[q].items():
            assert torch.equal(optimizers[0].state[p][name].cpu(), value.cpu())
            assert name == "step" or value.is_pinned() or not value.numel()
    assert used[0] > 24 * 2**22 * plain[0].itemsize
    assert used[1] < 2**20


def test_a_captured_step_counts_and_follows_the_settings() -> None:
    ours = parameters(device="cuda")
    theirs = twins(ours)
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5)
    torchs = torch.optim.AdamW(theirs, 1e-2)

    def torch_step(c: float) -> torch.Tensor:
        norm = nn.utils.clip_grad_norm_(theirs, c)
        torchs.step()
        return norm

    set_grads(0, ours, theirs)
    mine.step()
    torch_step(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = mine.step()
    for step in range(1, 5):
        set_grads(step, theirs)
        for p, q in zip(ours, theirs, strict=True):
            p.grad.copy_(q.grad)
        for optimizer in (mine, torchs):
            optimizer.param_groups[0].update(lr=1e-2 / step, weight_decay=0.1 * step)
        mine.param_groups[0]["max_norm"] = 0.1 * step
        mine.write_settings()
        graph.replay()
        torch.testing.assert_close(norm, torch_step(0.1 * step))
        close(ours, theirs, ulps=50)
        assert mine.state[ours[0]]["step"].item() == step + 1
    set_grads(5, ours, theirs)  # and without the graph
    mine.step()
    torch_step(0.4)
    close(ours, theirs, ulps=50)


def test_a_whole_training_step_can_be_captured() -> None:
    """As torch's documentation does it: the gradients come from the capture's own memory, so that
    the table of addresses is built within it.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).cuda()
    x, y = torch.randn(16, 64, device="cuda"), torch.randn(16, 8, device="cuda")
    optimizer = ClippedAdamW(model.parameters(), 1e-2, max_norm=0.3)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        (model(x) - y).square().mean().backward()
        return optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.zero_grad()
            step(model, optimizer)
    torch.cuda.current_stream().wait_stream(stream)
    other, twin = copy.deepcopy((model, optimizer))

    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = step(model, optimizer)
    torch.empty(2**24, device="cuda").fill_(math.nan)  # what was freed is written over
    for i in range(4):
        x.normal_()
        optimizer.param_groups[0]["lr"] = twin.param_groups[0]["lr"] = 1e-2 / (i + 1)
        optimizer.write_settings()
        graph.replay()
        twin.zero_grad()
        torch.testing.assert_close(norm, step(other, twin))
        close([*model.parameters()], [*other.parameters()], ulps=100)


@pytest.mark.parametrize("what", ["first step", "settings"])
def test_a_capture_refuses_what_a_replay_would_undo(what: str) -> None:
    params = parameters(device="cuda")
    optimizer = ClippedAdamW(params, 1e-2)
    set_grads(0, params)
    if what == "settings":
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
    before = [p.detach().clone() for p in params]
    torch.cuda.synchronize()
    with (
        pytest.raises(ValueError, match=r"make a step, or call write_settings\(\), before it"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))


def test_a_graph_goes_on_from_a_loaded_state() -> None:
    """It updates the tensors that the state has then, not memory that loading has freed."""
    ours = parameters(device="cuda")
    mine = ClippedAdamW(ours, 1e-2, max_norm=0.5)
    set_grads(0, ours)
    mine.step()
    theirs = twins(ours)
    other = ClippedAdamW(theirs, 1e-2, max_norm=0.5)
    saved = copy.deepcopy(mine.state_dict())
    other.load_state_dict(copy.deepcopy(saved))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mine.step()
    graph.replay()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    mine.load_state_dict(saved)
    trap = [torch.full_like(p, math.nan) for p in ours for _ in range(4)]  # in freed memory
    graph.replay()
    set_grads(0, theirs)
    other.step()
    close(ours, theirs, ulps=0)
    assert all(mine.state[p]["step"].item() == 2 for p in ours)
    assert all(t.isnan().all() for t in trap)


def test_halves_count_a_step_once() -> None:
    ours = parameters(device="cuda")
    theirs = twins(ours)
    mine, other = (ClippedAdamW(params, 1e-2, max_norm=0.5) for params in (ours, theirs))
    for step in range(3):
        set_grads(step, ours, theirs)
        mine.sum_of_squares()  # to look at it counts nothing
        mine.update(mine.sum_of_squares())
        other.step()
    close(ours, theirs, ulps=20)
    assert all(mine.state[p]["step"].item() == 3 for p in ours)


@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded"])
def test_a_gradient_of_any_layout_is_read_rightly(kind: type, layout: str) -> None:
    memory = torch.randn(16, 16, device="cuda")
    views = {
        "transposed": memory[:12, :8].t(),
        "sliced": memory[::2, 2:14],
        "expanded": memory[:1, :12].expand(8, 12),
    }
    p, q = (nn.Parameter(torch.ones(8, 12, device="cuda")) for _ in range(2))
    p.grad, q.grad = views[layout], views[layout].contiguous()
    kept = memory.clone()
    for x in (p, q):
        kind([x], lr=0.1, max_norm=0.5).step()
    assert torch.equal(p, q)
    assert torch.equal(memory, kept)


@pytest.mark.parametrize("kind", [ClippedAdamW, ClippedSGD])
def test_dtypes_and_layouts_side_by_side_take_torchs_way(kind: type) -> None:
    start = torch.randn(8, 12, device="cuda")
    ours = [
        nn.Parameter(start.clone()),
        nn.Parameter(start.bfloat16()),
        nn.Parameter(start.double()),
        nn.Parameter(start.t().contiguous().t()),
        nn.Parameter(torch.stack([start, start], -1)[..., 0]),
    ]
    theirs = [nn.Parameter(p.detach().double().contiguous()) for p in ours]
    ours_clipped, other = (kind(params, lr=0.1, max_norm=1.0) for params in (ours, theirs))
    for _ in range(3):
        g = torch.randn(8, 12, device="cuda")
        for p, q in zip(ours, theirs, strict=True):
            p.grad = g.to(p.dtype)
            q.grad = p.grad.double()
        torch.testing.assert_close(ours_clipped.step().double(), other.step(), rtol=1e-5, atol=0)
    for p, q in zip(ours, theirs, strict=True):
        limit = 3 * torch.finfo(p.dtype).eps * (q.abs().max().item() + 0.4) + 3e-6
        assert (p.double() - q).abs().max().item() <= limit


def test_a_step_after_a_capture_that_never_ran() -> None:
    """Its table of addresses was not filled: another has to be."""
    params = parameters(device="cuda")
    optimizer = ClippedAdamW(params, 1e-2, max_norm=0.5)
    expected = twins(params)
    other = torch.optim.AdamW(expected, 1e-2)
    for step in range(3):
        set_grads(step, params, expected)
        if step == 1:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                optimizer.step()
        optimizer.step()
        nn.utils.clip_grad_norm_(expected, 0.5)
        other.step()
    close(params, expected, ulps=50)
