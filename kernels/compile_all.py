"""Compiles every kernel that can be chosen for three GPUs, without one, and looks at the result.

    python -m kernels.compile_all

One line a kernel: registers, bytes of stack (what was spilled), shared memory, and the tensor-core
instructions in the machine code.  Exit status 1 when a stack is above 16 bytes, shared memory does
not fit, or a 16-bit product of 64 rows or more has no warpgroup instruction (HGMMA) on sm_90.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import clipped_update, lora_kernels

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes a block can have
STACK = 16
DTYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
RANKS = (16, 64, 256)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Job:
    """One kernel with its types, constants and launch options."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    needs_hgmma: bool = False


@dataclass(frozen=True)
class Result:
    """What the compiler made of it."""

    registers: int
    stack: int
    shared: int
    instructions: str

    def faults(self, job: Job, capability: int) -> list[str]:
        found = []
        if self.stack > STACK:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED[capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if job.needs_hgmma and capability == 90 and "HGMMA" not in self.instructions:
            found.append("no HGMMA")
        return found


def jobs() -> Iterator[Job]:
    """Every kernel in every configuration that can be chosen."""
    for dtype, pointer in DTYPES.items():
        short = pointer[1:]
        for R in RANKS:
            BR = lora_kernels.rank_tile(R)
            for drop in (False, True):
                label = f"{short} r{R}{' drop' if drop else ''}"
                skinny = lora_kernels.skinny_tile(R)
                yield Job(
                    f"shrink {label}",
                    lora_kernels.shrink_kernel,
                    dict.fromkeys(("x_ptr", "a_ptr", "s_ptr"), pointer),
                    {"DROP": drop, "BR": BR, **_tiles(skinny)},
                    _launch(skinny),
                )
                yield Job(
                    f"outer {label}",
                    lora_kernels.outer_kernel,
                    {"x_ptr": pointer, "s_ptr": pointer, "part_ptr": "*fp32"},
                    {"DROP": drop, "BR": BR, **_tiles(skinny)},
                    _launch(skinny),
                )
                for M in (16, 4096):
                    tile = lora_kernels.tile_of(M, dtype)
                    yield Job(
                        f"expand M{tile['BM']} {label}",
                        lora_kernels.expand_kernel,
                        dict.fromkeys(
                            ("x_ptr", "w_ptr", "bias_ptr", "s_ptr", "b_ptr", "y_ptr"), pointer
                        ),
                        {"BIAS": True, "DROP": drop, "BR": BR, **_tiles(tile)},
                        _launch(tile),
                        needs_hgmma=dtype != torch.float32 and tile["BM"] >= 64,
                    )
    launch = {"num_warps": clipped_update.WARPS}
    pointers = dict.fromkeys(("table", "chunks"), "*i64") | {"settings": "*fp64"}
    pointers |= dict.fromkeys(("counts", "parts", "norm_out"), "*fp32")
    for name in ("squares_kernel", "adamw_kernel", "sgd_kernel"):
        kernel = getattr(clipped_update, name)
        for vector in (4, 1):
            constants = {
                p.name: getattr(clipped_update, p.name, vector)
                for p in kernel.params
                if p.is_constexpr
            }
            yield Job(f"{name} {vector}", kernel, pointers, constants, launch)


def compile_one(job: Job, capability: int) -> Result:
    names = [p.name for p in job.kernel.params]
    signature = {
        name: "constexpr" if name in job.constants else job.pointers.get(name, _scalar(name))
        for name in names
    }
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in job.pointers}
    source = ASTSource(job.kernel, signature, job.constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options=job.options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = _run("nvdisasm", "-c", cubin)
    found = sorted(set(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|IMMA|FFMA)\b", code)))
    return Result(
        int(_first(r"REG:(\d+)", usage)),
        int(_first(r"STACK:(\d+)", usage)),
        compiled.metadata.shared,
        " ".join(found),
    )


def _tiles(tile: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in tile.items() if not name.startswith("num_")}


def _launch(tile: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in tile.items() if name.startswith("num_")}


def _scalar(name: str) -> str:
    """The type of an argument that is no pointer: sizes and strides, or numbers."""
    numbers = {"c", "p"}
    return "fp32" if name in numbers else "i32"


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"no {pattern} in what the disassembler says")
    return match[1]


def _run(tool: str, *arguments: object) -> str:
    command = [str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    status = 0
    print(f"{'kernel':28} {'GPU':6} {'registers':>9} {'stack':>6} {'shared':>8}  instructions")
    for job in jobs():
        for capability in SHARED:
            result = compile_one(job, capability)
            faults = result.faults(job, capability)
            status |= bool(faults)
            print(
                f"{job.name:28} sm_{capability:<3} {result.registers:>9} {result.stack:>6} "
                f"{result.shared:>8}  {result.instructions}{'  FAULT: ' if faults else ''}"
                f"{', '.join(faults)}",
                flush=True,
            )
    return status


if __name__ == "__main__":
    sys.exit(main())
