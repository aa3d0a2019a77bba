"""Kernels compile for GPUs that are not here, and what is wrong with one is seen."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
# the interpreter and the compiler need processes of their own
SCRIPT = """
import json
from dataclasses import replace
from minigpt_kernels.compile_check import compile_one, every_job
jobs = {(job.name, job.capability): job for job in every_job()}
good = jobs["y bf16 128x128 r16", 90]
spills = replace(good, options={"num_warps": 2, "num_stages": 3})
large = replace(good, options={"num_warps": 8, "num_stages": 7})
scalar = replace(jobs["y fp32 64x64 r16", 90], needs_hgmma=True)
rounded = jobs["dequantize fp32 double", 90]
unrounded = replace(rounded, options={"num_warps": 4})
chosen = {"good": good, "spills": spills, "large": large, "scalar": scalar}
found = {}
for name, job in {**chosen, "rounded": rounded, "unrounded": unrounded}.items():
    result = compile_one(job)
    found[name] = [result.faults(job), result.registers, result.instructions]
print(json.dumps({"names": [[j.name, j.capability] for j in jobs.values()], "found": found}))
"""


def test_faults_of_a_compiled_kernel_are_named() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    faults, registers, instructions = answer["found"]["good"]
    assert faults == []
    assert 64 < registers < 256
    assert "HGMMA" in instructions.split()
    assert "bytes of stack" in answer["found"]["spills"][0][0]
    assert "bytes of shared memory" in answer["found"]["large"][0][0]
    assert answer["found"]["scalar"][0] == ["no HGMMA"]
    assert answer["found"]["rounded"][0] == []
    assert answer["found"]["unrounded"][0] == ["FFMA"]
    names = answer["names"]
    for kernel in (
        "keep",
        "shrink bf16 r16",
        "dy_pass fp32 r32",
        "dx fp16 64x128 r32 drop",
        "dequantize fp16 double odd",
        "nf4 64x32 bf16",
        "adamw_kernel",
    ):
        assert all([kernel, capability] in names for capability in (80, 90, 100))


def test_a_name_that_no_kernel_has_is_an_error() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "minigpt_kernels.compile_check", "nosuch"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "'nosuch' is part of no kernel's name; there are" in done.stderr
    assert "compiled" not in done.stdout
