"""Kernels compile for GPUs that are not here, and what is wrong with one is seen."""

import json
import os
import re
import subprocess
import sys
from typing import Any

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
listed = [[j.name, j.capability, j.light, j.needs_hgmma, j.constants] for j in every_job()]
print(json.dumps({"jobs": listed, "found": found}))
"""


def parts(name: str) -> tuple[set[str], str, int, bool]:
    """What a job's name says: kernel and tile, dtype, rank (of `nf4` rows), dropout or doubled."""
    words = {*name.split()}
    dtype = next(iter(words & {"bf16", "fp16", "fp32"}), "")
    rank = next((word for word in words if re.fullmatch(r"r\d+", word)), "r0")
    if "nf4" in words:
        rank = next(word for word in words if re.fullmatch(r"\d+x\d+", word))
    most = int(rank.removeprefix("r").partition("x")[0])
    return words - {dtype, rank, "drop", "double"}, dtype, most, bool(words & {"drop", "double"})


def heavier(name: str, other: str) -> bool:
    """Whether the other is the same kernel with more ranks or rows, with dropout or double
    quantization, or in bf16 for fp16.
    """
    (kind, dtype, rank, drop), (kind2, dtype2, rank2, drop2) = parts(name), parts(other)
    alike = kind2 == kind and (dtype2 == dtype or (dtype, dtype2) == ("fp16", "bf16"))
    return name != other and alike and rank2 >= rank and drop2 >= drop


@pytest.fixture(scope="module")
def answer() -> dict[str, Any]:
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
    return json.loads(done.stdout.splitlines()[-1])


def test_the_heaviest_of_each_kernel_are_compiled_with_what_their_names_say(
    answer: dict[str, Any],
) -> None:
    names = {name for name, *_ in answer["jobs"]}
    assert len(answer["jobs"]) > 3 * 60
    for name, _, light, needs_hgmma, constants in answer["jobs"]:
        assert light == any(heavier(name, other) for other in names), name
        (kind, dtype, rank, drop), fused = parts(name), name.split()[0] in ("y", "dx")
        assert constants.get("BM" if "nf4" in kind else "BR", 0) == rank
        assert constants.get("DROP", constants.get("DOUBLE", drop)) == drop
        if fused:
            (shape,) = (word for word in kind if "x" in word and word != "dx")
            assert shape == f"{constants['BM']}x{constants['BN']}"
            assert constants["BIAS"] == ("y" in kind)
            assert constants["DROP_IN"] == (drop and "y" in kind)
            assert constants["DROP_OUT"] == (drop and "dx" in kind)
        many = fused or ("nf4" in kind and rank >= 64)  # rows: of `y` and `dx`, 64 or more
        assert needs_hgmma == (many and dtype != "fp32")


def test_faults_of_a_compiled_kernel_are_named(answer: dict[str, Any]) -> None:
    faults, registers, instructions = answer["found"]["good"]
    assert faults == []
    assert 64 < registers < 256
    assert "HGMMA" in instructions.split()
    assert "bytes of stack" in answer["found"]["spills"][0][0]
    assert "bytes of shared memory" in answer["found"]["large"][0][0]
    assert answer["found"]["scalar"][0] == ["no HGMMA"]
    assert answer["found"]["rounded"][0] == []
    assert answer["found"]["unrounded"][0] == ["FFMA"]
    names = [job[:2] for job in answer["jobs"]]
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
