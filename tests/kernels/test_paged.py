"""Paged optimizer state against the unpaged optimizer, bit for bit.

torch.cpu has streams that do nothing, so the CPU runs the copies of a GPU in the order in which the
host asks for them; that no other order is possible is seen from what the streams wait for.
"""

import copy
import itertools
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_kernels import ClippedAdamW
from minigpt_kernels.paged import MappedMemory, PinnedMemory, paged_memory
from tests.kernels.update_checks import SHAPES, parameters, set_grads, twins
from tests.processes import PRELOADED

SETTINGS = {"lr": 1e-2, "weight_decay": 0.1, "max_norm": 0.5}
KINDS = ["mapped", "pinned"]
INTERPRETED = [(7, 5), (0, 3), (4099,)]  # two chunks


def memory(kind: str, folder: Path, params: Sequence[Tensor]) -> Any:
    return MappedMemory(folder, params) if kind == "mapped" else PinnedMemory()


def step(i: int, *optimizers: ClippedAdamW) -> None:
    """The gradients are clipped; in step 3 the norm is infinite.  Both ways of making a step."""
    lists = [[p for group in o.param_groups for p in group["params"]] for o in optimizers]
    set_grads(i, *lists)
    for optimizer, params in zip(optimizers, lists, strict=True):
        if i == 3:
            params[0].grad[0] = torch.inf
        norm = optimizer.step() if i % 2 else optimizer.update(optimizer.sum_of_squares())
        assert norm > 0.5


def assert_same(mine: ClippedAdamW, other: ClippedAdamW) -> None:
    for a, b in zip(mine.param_groups, other.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p, q)
            assert mine.state[p].keys() == other.state[q].keys()
            for name, value in mine.state[p].items():
                assert value.dtype == other.state[q][name].dtype
                assert torch.equal(value, other.state[q][name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("backend", "dtypes"),
    [
        ("triton", [torch.float32]),
        ("torch", [torch.float32]),
        ("torch", [torch.bfloat16]),
        ("torch", [torch.float64]),
        ("torch", [torch.bfloat16, torch.float32, torch.float64]),
    ],
)
def test_a_paged_step_gives_the_same_bits(
    kind: str, backend: str, dtypes: list[torch.dtype], tmp_path: Path
) -> None:
    kinds = itertools.cycle(dtypes)
    shapes = [*SHAPES, (0, 2)] if backend == "torch" else INTERPRETED
    paged = [nn.Parameter(p.detach().to(next(kinds))) for p in parameters(shapes)]
    plain = twins(paged)
    one = ClippedAdamW(plain, **SETTINGS, backend=backend)
    other = ClippedAdamW(paged, **SETTINGS, backend=backend, memory=memory(kind, tmp_path, paged))
    for i in range(6):
        step(i, one, other)
    assert_same(other, one)
    assert other.state[paged[0]]["step"] == 5


@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_what_comes_later(kind: str, tmp_path: Path) -> None:
    """Groups of their own rates, a transposed tensor, one without a gradient at first, one that is
    added, and a state that begins again.
    """
    params = [*parameters(), nn.Parameter(torch.randn(6, 4).T)]
    optimizers = []
    for paged in (False, True):
        some = twins(params)
        some[-1] = nn.Parameter(params[-1].detach().T.clone().T)
        groups = [{"params": some[:3]}, {"params": some[3:], "lr": 0.3}]
        place = memory(kind, tmp_path, some) if paged else None
        optimizers.append(ClippedAdamW(groups, **SETTINGS, memory=place))
    added = [nn.Parameter(torch.ones(5, 2)) for _ in optimizers]
    for i in range(6):
        if i == 4:
            for optimizer, p in zip(optimizers, added, strict=True):
                optimizer.add_param_group({"params": [p]})
                optimizer.state[optimizer.param_groups[0]["params"][0]] = {}
        step(i, *optimizers)
    assert_same(*optimizers)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_from_unpaged_to_paged_and_back(kind: str, tmp_path: Path) -> None:
    lists = [parameters(), parameters(), parameters()]
    straight, first = (ClippedAdamW(some, **SETTINGS) for some in lists[:2])
    second = ClippedAdamW(lists[2], **SETTINGS, memory=memory(kind, tmp_path, lists[2]))
    for i in range(6):
        step(i, straight, first if i in (0, 1, 5) else second)
        if i in (1, 4):
            source, target = (first, second) if i == 1 else (second, first)
            with torch.no_grad():
                for p, q in zip(
                    source.param_groups[0]["params"], target.param_groups[0]["params"], strict=True
                ):
                    q.copy_(p)
            before = {id(t) for s in target.state.values() for t in s.values()}
            target.load_state_dict(source.state_dict())
            after = {id(t) for s in target.state.values() for t in s.values()}
            assert before <= after  # loaded into the tensors that are there
    assert_same(first, straight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_a_state_of_its_own(kind: str, tmp_path: Path) -> None:
    params = parameters()
    mine = ClippedAdamW(params, **SETTINGS, memory=memory(kind, tmp_path, params))
    plain = ClippedAdamW(twins(params), **SETTINGS)
    step(0, mine, plain)
    other = copy.deepcopy(mine)
    before = copy.deepcopy(plain)
    assert type(other.memory) is type(mine.memory)
    step(1, mine, plain)
    assert_same(other, before)
    step(1, other)
    assert_same(other, plain)
    assert_same(mine, plain)


# Files


def left(folder: Path) -> list[str]:
    return [str(f.relative_to(folder)) for f in folder.rglob("*")]


def mappings(folder: Path) -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if str(folder) in line]


linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")


@linux
def test_a_cpus_state_is_one_file_without_a_name(tmp_path: Path) -> None:
    params = parameters()
    optimizer = ClippedAdamW(params, memory=paged_memory(params, tmp_path / "new"))
    step(1, optimizer)
    (mapping,) = mappings(tmp_path)
    assert "(deleted)" in mapping
    first, last = (int(end, 16) for end in mapping.split()[0].split("-"))
    for p in params:
        for name in ("exp_avg", "exp_avg_sq"):
            assert first <= optimizer.state[p][name].data_ptr() < last or not p.numel()
    assert left(tmp_path) == ["new"]
    del optimizer
    assert not mappings(tmp_path)


def hold(folder: Path, ready: Any) -> None:
    """A process that has paged state and waits to be killed."""
    params = parameters()
    optimizer = ClippedAdamW(params, memory=paged_memory(params, folder))
    step(1, optimizer)
    ready.send(mappings(folder))
    signal.pause()


@linux
def test_a_kill_leaves_no_file(tmp_path: Path) -> None:
    processes = get_context("forkserver")
    processes.set_forkserver_preload(PRELOADED)
    ours, theirs = processes.Pipe()
    held = processes.Process(target=hold, args=(tmp_path, theirs))
    held.start()
    assert ours.recv()
    held.kill()
    held.join()
    assert held.exitcode == -signal.SIGKILL
    assert left(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="allocates no blocks here")
def test_blocks_are_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a full disk would end the process when a page is written."""
    files: list[os.stat_result] = []

    def fallocate(descriptor: int, offset: int, size: int) -> None:
        allocate(descriptor, offset, size)
        files.append(os.fstat(descriptor))

    allocate = os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    MappedMemory(tmp_path, [torch.zeros(100_000), torch.zeros(0), torch.zeros(3)])
    (file,) = files
    assert file.st_size >= 2 * 4 * 100_003
    assert file.st_blocks * 512 >= file.st_size


def test_no_room_is_told_before_anything_is_mapped(tmp_path: Path) -> None:
    params = parameters([(50_000, 3)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"no room for [\d,]+ bytes of .*state in .*file: "):
        paged_memory(params, tmp_path / "file")
    with pytest.raises(ValueError, match=r"File too large|No space left"):
        MappedMemory(tmp_path, [torch.empty(2**55, device="meta")])
    assert left(tmp_path) == ["file"]
    with pytest.raises(ValueError, match="on a CPU the state is a file in the run's folder"):
        paged_memory(params, None)
    with pytest.raises(ValueError, match="the parameters are on meta, must be on cpu or cuda"):
        paged_memory([torch.empty(3, device="meta")], tmp_path)


# The order of a GPU's copies


class Stream:
    """Knows which operations, its own and others', are over when its next one begins."""

    def __init__(self, device: torch.device | None = None, name: str = "copies") -> None:
        self.name = name
        self.over: set[int] = set()

    def record_event(self) -> set[int]:
        return set(self.over)

    def wait_event(self, event: set[int]) -> None:
        self.over |= event

    def wait_stream(self, other: "Stream") -> None:
        self.over |= other.over


class Watch(TorchDispatchMode):
    """In the place of torch.cuda: what touches the same memory, and neither waits for the other."""

    WATCHED = ("aten.empty", "aten.copy_", "aten._fused_adamw_")

    def __init__(self) -> None:
        super().__init__()
        self.now = self.updates = Stream(name="updates")
        self.operations: list[tuple[str, list[int]]] = []  # and the addresses they touch
        self.races: list[tuple[str, str]] = []
        self.synchronized = 0  # operations before

    def module(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(
            Stream=Stream,
            current_stream=lambda device: self.updates,
            stream=self.stream,
            synchronize=self.synchronize,
        )

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.now = stream
        yield
        self.now = self.updates

    def synchronize(self, device: torch.device) -> None:
        self.synchronized = len(self.operations)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func)
        if name.startswith(self.WATCHED):
            touched = addresses([*args, result])
            for i, (before, others) in enumerate(self.operations):
                if i not in self.now.over and not {*touched}.isdisjoint(others):
                    self.races.append((before, name))
            self.now.over.add(len(self.operations))
            self.operations.append((name, touched))
        return result


def addresses(values: Iterable[Any]) -> list[int]:
    found = []
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            found.append(value.data_ptr())
        elif isinstance(value, list | tuple):
            found += addresses(value)
    return found


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[Watch, list[str]]:
    """A step on five parameters; what it does to m of which, in the host's order."""
    params = parameters([(5, 3), (40,), (7,), (2, 2), (9,)])
    optimizer = ClippedAdamW(params, **SETTINGS, memory=PinnedMemory())
    step(0, optimizer)
    set_grads(1, params)
    with monkeypatch.context() as patch, Watch() as watch:
        patch.setattr(torch, "get_device_module", watch.module)
        optimizer.step()
    of = {optimizer.state[p]["exp_avg"].data_ptr(): i for i, p in enumerate(params)}
    of |= {p.data_ptr(): i for i, p in enumerate(params)}
    order = []
    for name, touched in watch.operations:
        match name, [of.get(address) for address in touched[:2]]:
            case "aten.copy_.default", [None, int(i)]:
                order.append(f"fetch {i}")
            case "aten.copy_.default", [int(i), None]:
                order.append(f"store {i}")
            case _, [int(i), *_]:
                order.append(f"update {i}")
    return watch, order


def test_no_two_streams_touch_the_same_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, order = watched(monkeypatch)
    assert watch.races == []
    assert watch.synchronized == len(watch.operations)  # then the host may read
    begin = "fetch 0, fetch 1, update 0, store 0, fetch 2, update 1, store 1, fetch 3, update 2"
    assert ", ".join(order).startswith(begin)
    assert len(order) == 5 * 3


@pytest.mark.parametrize("lost", ["wait_stream", "updates", "copies"])
def test_a_lost_wait_would_be_seen(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wait = Stream.wait_event

    def wait_event(self: Stream, event: set[int]) -> None:
        if self.name != lost:
            wait(self, event)

    monkeypatch.setattr(Stream, "wait_event", wait_event)
    if lost == "wait_stream":
        monkeypatch.setattr(Stream, lost, lambda self, other: None)
    assert watched(monkeypatch)[0].races
