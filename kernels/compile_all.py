"""Compiles every kernel that can be chosen for three GPUs, without one, and looks at the result.

    python -m minigpt_kernels.compile_all [part of a kernel's name]

One line a kernel: registers, bytes of stack (what was spilled), shared memory, and the tensor-core
and copy instructions in the machine code.  Exit status 1 when a stack is above 16 bytes, shared
memory does not fit, or a 16-bit product of 64 rows or more has no warpgroup instruction (HGMMA) on
sm_90.  Sizes and strides are taken as multiples of 16, as a model's are; "odd" ones are not.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import decode_kernels, lora_kernels, tiles, update_triton
from .lora_tma_kernel import expand_tma_kernel
from .tiles import Tile

# bytes of shared memory a block can have; what the list of sm_80 serves has less than sm_80 itself
SHARED = {80: 101_376, 90: 232_448, 100: 232_448}
STACK = 16
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Job:
    """One kernel with its types, constants and launch options.

    Attributes:
        unit: strides of 1, which Triton compiles in.
        odd: sizes and strides need be multiples of nothing.
    """

    name: str
    kernel: Any
    capability: int
    pointers: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    unit: tuple[str, ...] = ()
    odd: bool = False
    needs_hgmma: bool = False


@dataclass(frozen=True)
class Result:
    """What the compiler made of it."""

    registers: int
    stack: int
    shared: int
    instructions: str

    def faults(self, job: Job) -> list[str]:
        found = []
        if self.stack > STACK:
            found.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED[job.capability]:
            found.append(f"{self.shared} bytes of shared memory")
        if job.needs_hgmma and job.capability == 90 and "HGMMA" not in self.instructions:
            found.append("no HGMMA")
        return found


def jobs(capability: int) -> Iterator[Job]:
    """Every kernel in every configuration that can be chosen."""
    job = partial(Job, capability=capability)
    drawn = {"seed_ptr": "*i64", "bits_ptr": "*u8"}
    yield job("keep", lora_kernels.keep_kernel, pointers=drawn, constants={"BLOCK": tiles.KEEP},
              options={"num_warps": 4})  # fmt: skip
    for dtype in DTYPES:
        yield from _skinny(job, dtype)
        yield from _expand(job, dtype, capability)
        yield from _decode(job, dtype)
    if capability in tiles.EXPAND_TMA:
        yield from _expand_tma(job, capability)
    pointers = dict.fromkeys(("table", "chunks"), "*i64") | {"settings": "*fp64"}
    pointers |= dict.fromkeys(("parts", "norm_out"), "*fp32")
    for name in ("squares_kernel", "adamw_kernel", "sgd_kernel"):
        kernel = getattr(update_triton, name)
        constants = {
            p.name: getattr(update_triton, p.name, True) for p in kernel.params if p.is_constexpr
        }
        options = {"num_warps": update_triton.WARPS}
        yield job(name, kernel, pointers=pointers, constants=constants, options=options)


def _skinny(job: Any, dtype: str) -> Iterator[Job]:
    size = DTYPES[dtype]
    for BR, drop in product(tiles.RANKS[size], (False, True)):
        label = f"{dtype} r{BR}{' drop' if drop else ''}"
        tile = tiles.SHRINK[size]
        shrink = partial(job, kernel=lora_kernels.shrink_kernel,
                         pointers=_pointers(dtype, "x_ptr", "a_ptr", "s_ptr"),
                         constants=_sizes(tile, "BM", "BK") | {"DROP": drop, "BR": BR},
                         options=_launch(tile))  # fmt: skip
        yield shrink(f"shrink {label}", unit=("x_k", "a_k"))
        yield shrink(f"shrink {label} odd", unit=("x_k", "a_k"), odd=True)
        if not drop:
            yield shrink(f"shrink {label} by B^T", unit=("x_k", "a_r"))
        tile = tiles.OUTER[size]
        yield job(f"outer {label}", lora_kernels.outer_kernel,
                  pointers=_pointers(dtype, "x_ptr", "s_ptr") | {"part_ptr": "*fp32"},
                  constants=_sizes(tile, "BM", "BK") | {"DROP": drop, "BR": BR},
                  options=_launch(tile), unit=("x_k",))  # fmt: skip


def _expand(job: Any, dtype: str, capability: int) -> Iterator[Job]:
    names = ("x_ptr", "w_ptr", "bias_ptr", "s_ptr", "b_ptr", "y_ptr")
    size = DTYPES[dtype]
    for tile in [*tiles.EXPAND[capability][size], tiles.ODD[size]]:
        odd = tile is tiles.ODD[size]
        expand = partial(job, kernel=lora_kernels.expand_kernel, pointers=_pointers(dtype, *names),
                         options=_launch(tile), needs_hgmma=_needs_hgmma(dtype, tile))  # fmt: skip
        for what, flags, unit in _products():
            label = f"{what} {dtype} {tile.BM}x{tile.BN}{' odd' if odd else ''}"
            yield expand(label, constants={**_sizes(tile), **flags}, unit=unit, odd=odd)


def _expand_tma(job: Any, capability: int) -> Iterator[Job]:
    for dtype in ("bf16", "fp16"):
        for what, flags, unit in _products():
            for tile in tiles.EXPAND_TMA[capability][flags["DROP"]]:
                BM, BN, BK = tile[:3]
                transposed = "w_n" in unit
                across = [BK, BN] if transposed else [BN, BK]
                shapes = {"x_desc": [BM, BK], "w_desc": across, "y_desc": [BM, BN]}
                described = {name: f"tensordesc<{dtype}{box}>" for name, box in shapes.items()}
                yield job(f"{what} {dtype} {BM}x{BN} TMA", expand_tma_kernel,
                          pointers=_pointers(dtype, "bias_ptr", "s_ptr", "b_ptr") | described,
                          constants={**_sizes(tile), **flags, "TRANSPOSED": transposed},
                          options=_launch(tile), unit=unit,
                          needs_hgmma=_needs_hgmma(dtype, tile))  # fmt: skip


def _products() -> Iterator[tuple[str, dict[str, bool], tuple[str, ...]]]:
    """The products `expand` is used for: name, flags and strides of 1."""
    flags = {"BIAS": False, "DROP": False, "ADD": False}
    yield "y", {**flags, "BIAS": True}, ("x_k", "w_k", "b_r")
    yield "dx", flags, ("x_k", "w_n", "b_n")
    yield "dx drop", {**flags, "DROP": True}, ("x_k", "w_n", "b_n")
    yield "dx add", {**flags, "ADD": True}, ("x_k", "w_n", "b_n")


def _decode(job: Any, dtype: str) -> Iterator[Job]:
    tile = tiles.DECODE
    yield job(f"decode {dtype}", decode_kernels.decode_kernel,
              pointers=_pointers(dtype, "x_ptr", "w_ptr", "a_ptr") | {"part_ptr": "*fp32"},
              constants=_sizes(tile, "BM", "BN", "BK"), options=_launch(tile),
              unit=("x_k", "w_k", "a_k"))  # fmt: skip
    tile = tiles.DECODE_SUM
    yield job(f"decode_sum {dtype}", decode_kernels.decode_sum_kernel,
              pointers=_pointers(dtype, "bias_ptr", "b_ptr", "y_ptr") | {"part_ptr": "*fp32"},
              constants=_sizes(tile, "BM", "BN") | {"BIAS": True, "BR": tiles.RANK},
              options=_launch(tile), unit=("b_r",))  # fmt: skip


def compile_one(job: Job) -> Result:
    """Compiles a kernel to machine code and reads what the disassembler says of it."""
    names = [p.name for p in job.kernel.params]
    constants = {**job.constants, **{n: 1 for n in job.unit if n in names}}
    signature = {
        name: "constexpr" if name in constants else job.pointers.get(name, _scalar(name))
        for name in names
    }
    sizes = {"M", "n", "chunks", "pieces"}  # these are what they are
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and not job.odd and name not in sizes)
    }
    source = ASTSource(job.kernel, signature, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", job.capability, 32), options=job.options)
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        code = _run("nvdisasm", "-c", cubin)
    found = sorted(set(re.findall(r"\b(U?HGMMA|HMMA|UTC.?MMA|FFMA|LDGSTS|UTMALDG)\b", code)))
    return Result(
        int(_first(r"REG:(\d+)", usage)),
        int(_first(r"STACK:(\d+)", usage)),
        compiled.metadata.shared,
        " ".join(found),
    )


def every_job() -> list[Job]:
    return [job for capability in SHARED for job in jobs(capability)]


def _compile_number(i: int) -> Result:
    return compile_one(every_job()[i])  # a kernel does not pass between processes


def _pointers(dtype: str, *names: str) -> dict[str, str]:
    return {**dict.fromkeys(names, f"*{dtype}"), "bits_ptr": "*u8"}


def _sizes(tile: Tile, *names: str) -> dict[str, int]:
    """The tile's sizes, by name; those of `expand` unless some are named."""
    if not names:
        return {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "BR": tiles.RANK, "GROUP": 8}
    return {name: getattr(tile, name) for name in names}


def _launch(tile: Tile) -> dict[str, int]:
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _needs_hgmma(dtype: str, tile: Tile) -> bool:
    return DTYPES[dtype] == 2 and tile.BM >= 64


def _scalar(name: str) -> str:
    """The type of an argument that is no pointer: sizes and strides, or numbers."""
    if name == "threshold":
        return "i64"
    return "fp32" if name == "c" else "i32"


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
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    every = every_job()
    chosen = [i for i, job in enumerate(every) if part in job.name]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, result in zip(chosen, pool.map(_compile_number, chosen), strict=True):
            job = every[i]
            faults = result.faults(job)
            status |= bool(faults)
            print(
                f"{job.name:28} sm_{job.capability:<3} {result.registers:>9} {result.stack:>6} "
                f"{result.shared:>8}  {result.instructions}{'  FAULT: ' if faults else ''}"
                f"{', '.join(faults)}",
                flush=True,
            )
    print(f"{len(chosen)} compiled" + (", with faults" if status else ", no fault"))
    return status


if __name__ == "__main__":
    sys.exit(main())
