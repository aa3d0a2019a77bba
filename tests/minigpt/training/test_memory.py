"""Memory of the process, on systems that this machine stands in for."""

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from minigpt.training import memory

BLOCK = 64 * 2**20


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


def test_resident_follows_what_is_held() -> None:
    before = memory.resident()
    block = torch.ones(BLOCK // 4)
    held = memory.resident()
    assert 0.9 * BLOCK < held - before < 1.5 * BLOCK
    del block
    assert memory.resident() < held - 0.9 * BLOCK


def test_the_peak_stays() -> None:
    block = torch.ones(BLOCK // 4)
    held = memory.resident()
    del block
    # the kernel counts some pages late
    assert memory.peak() + 2**20 > held > memory.resident() + 0.5 * BLOCK


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no resource")
@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("freebsd14", 1024)])
def test_systems_without_proc(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """ru_maxrss counts bytes on macOS, KiB elsewhere."""
    import resource

    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5000))
    assert memory.peak() == 5000 * unit


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    info = SimpleNamespace(rss=300, peak_wset=700)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(memory, "STATUS", Path("/nowhere/status"))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: info))
    assert (memory.resident(), memory.peak()) == (300, 700)


HELD = """
import platform
import subprocess
import sys
import torch
from minigpt.training import memory

if sys.argv[1] == "mapped":
    memory.map_large_blocks()
torch.empty(2**22)  # glibc takes blocks up to the largest that was freed from its heap
before = memory.resident()
blocks = [(torch.ones(2**19), torch.ones(2**12)) for _ in range(50)]  # 2 MB and 16 kB in turn
kept = [small for _, small in blocks]
del blocks
print(memory.resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_large_blocks_go_back() -> None:
    def held(how: str) -> int:
        run = [sys.executable, "-c", HELD, how]
        return int(subprocess.run(run, capture_output=True, check=True, text=True).stdout)

    assert held("mapped") < 10 * 2**20 < 50 * 2**20 < held("as ever")
