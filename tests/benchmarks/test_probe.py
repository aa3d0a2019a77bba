"""The probe: every candidate is right, a wrong one is named, Triton's compile for a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import probe
from benchmarks.common import read
from benchmarks.lora_sides import SCALING, inputs
from benchmarks.paper import Shape

ROOT = Path(__file__).parents[2]
# the interpreter and the compiler need processes of their own
COMPILE = """
import json
from benchmarks import probe_kernels as p
from minigpt_kernels.compile_check import Job, compile_one
from minigpt_kernels.lora_triton import launch
pointers = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "s_ptr", "b_ptr", "y_ptr"), "*bf16")
flags = {"BIAS": False, "DROP": False}
jobs = [Job("pointers", p.expand_kernel, 90, pointers | {"bits_ptr": "*u8"},
            flags | p.sizes(p.POINTERS), launch(p.POINTERS), ("x_k", "w_k", "b_r"),
            needs_hgmma=True)]
for tile in p.TMA:
    for late in (False, True):
        boxes = {"x_desc": [tile.BM, tile.BK], "w_desc": [tile.BN, tile.BK],
                 "y_desc": [tile.BM, tile.BN]}
        described = {name: f"tensordesc<bf16{box}>" for name, box in boxes.items()}
        constants = flags | {"TRANSPOSED": False, "LATE": late} | p.sizes(tile)
        jobs.append(Job(f"TMA {tile.BN} {late}", p.expand_tma_kernel, 90,
                        pointers | {"bits_ptr": "*u8"} | described, constants, launch(tile),
                        ("b_r",), needs_hgmma=True))
flags_drop = constants | {"DROP": True}
jobs.append(Job(f"TMA {tile.BN} drop", p.expand_tma_kernel, 90, jobs[-1].pointers, flags_drop,
                launch(tile), ("b_r",), needs_hgmma=True))
results = [(job, compile_one(job)) for job in jobs]
print(json.dumps({job.name: [r.faults(job), r.instructions] for job, r in results}))
"""


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize(
    "shape", [Shape(16, 64, 48, 8), Shape(24, 160, 136, 24), Shape(1, 64, 16, 3)]
)
def test_every_candidate_computes_its_product(shape: Shape, triton: bool) -> None:
    if triton:
        pytest.importorskip("triton")
    given = inputs(shape, torch.float16, "cpu", 0)
    x, w, a, b, dy = (t.detach().double() for t in given)
    xa, ds = (SCALING * x @ a.T).half().double(), (SCALING * dy @ b).half().double()
    want = {
        "y": [x @ w.T + xa @ b.T],
        "dx": [dy @ w + ds @ a],
        "expand": [xa @ b.T],
        "x to y": [x @ w.T + SCALING * x @ a.T @ b.T],
        "shrink": [SCALING * x @ a.T],
        "dS, dB": [SCALING * dy @ b, dy.T @ xa],
        "dA": [ds.T @ x],
    }
    groups = probe.groups(given, triton)
    assert set(groups) == {"ceiling", *want}
    checked = 0
    for name, values in want.items():
        for candidate, run in groups[name].candidates.items():
            results = run()
            assert len(results) == len(values)
            for got, value in zip(results, values, strict=True):
                # some roundings of fp16, of values that are at most the largest
                off = (got.double() - value).abs().max() / value.abs().max()
                assert off < 4 * torch.finfo(torch.float16).eps, f"{name}: {candidate}"
                checked += 1
    assert checked == (12 if not triton else 27 + (shape.M <= probe.FEW))


def test_a_wrong_candidate_is_named_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = torch.ones(2, 2), torch.full((2, 2), float("nan"))

    def groups(*_: object) -> dict[str, probe.Group]:
        def give(t: Tensor) -> probe.Candidate:
            return lambda: (t,)

        both = {"right": give(right), "wrong": give(wrong)}
        return {"y": probe.Group((right.double(),), both)}

    monkeypatch.setattr(probe, "groups", groups)
    failed: list[str] = []
    rows = probe.measure(Shape(2, 2, 2, 1), torch.float32, "cpu", 3, failed)
    assert failed == ["y: wrong at (2, 2, 2, 1)"]
    assert [(row["candidate"], row["round"]) for row in rows] == [("right", i) for i in range(3)]


def test_the_program_writes_its_file_and_says_what_it_had_no_time_for(tmp_path: Path) -> None:
    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks.probe", "--out", str(tmp_path)]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        return subprocess.run(
            [*command, "--rounds", "2", "--threads", "1", *more],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    _, rows = read(tmp_path / "probe.csv")
    assert {row["group"] for row in rows} >= {"ceiling", "y", "dx", "dA"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    late = run("--seconds", "-1")
    assert late.returncode == 1
    assert "no time for (16, 64, 48, 8)" in late.stderr


def test_the_kernels_compile_for_hopper_without_a_fault() -> None:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == 6
    for name, (faults, instructions) in results.items():
        assert faults == [], name
        assert ("UTMALDG" in instructions) == name.startswith("TMA")
