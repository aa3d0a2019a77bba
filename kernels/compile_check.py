"""Compiles the kernels for three GPUs, without one, and looks at the result.

    python -m minigpt_kernels.compile_check [--every] [part of a kernel's name]

Of the configurations of a kernel and a tile the heaviest are compiled: the largest rank, with
dropout, the most rows, double quantization, in bf16 and fp32.  With `--every` all that can be
chosen are, which takes some minutes.

One line a kernel: registers, bytes of stack (what was spilled), shared memory, and the tensor-core
and copy instructions in the machine code.  Exit status 1 when a stack is above 16 bytes, shared
memory does not fit, a 16-bit product of 64 rows or more has no warpgroup instruction (HGMMA) on
sm_90, or what has to be rounded is added unrounded (FFMA).  Sizes and strides are taken as
multiples of 16, as a model's are; "odd" ones are not.
"""

import argparse
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

try:
    import triton
except ModuleNotFoundError:
    sys.exit("not installed: triton; run: pip install triton")
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import lora_triton, nf4_triton, update_triton

# bytes of shared memory a block can have
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
STACK = 16
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Job:
    """One kernel with its types, constants and launch options.

    Attributes:
        unit: strides of 1, which Triton compiles in.
        odd: sizes and strides need be multiples of nothing.
        rounded: a product is rounded before it is added to.
        light: another job is the same kernel with more ranks, with dropout, with more rows, with
            double quantization, or in bf16 for fp16.
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
    rounded: bool = False
    light: bool = False


@dataclass(frozen=True)
class Result:
    """What the compiler made of it."""

    registers: int
    stack: int
    shared: int
    instructions: str

    def faults(self, job: Job) -> list[str]:
        reasons = []
        if self.stack > STACK:
            reasons.append(f"{self.stack} bytes of stack")
        if self.shared > SHARED[job.capability]:
            reasons.append(f"{self.shared} bytes of shared memory")
        if job.needs_hgmma and job.capability == 90 and "HGMMA" not in self.instructions:
            reasons.append("no HGMMA")
        if job.rounded and "FFMA" in self.instructions:
            reasons.append("FFMA")
        return reasons


def jobs(capability: int) -> Iterator[Job]:
    """Every kernel in every configuration that can be chosen."""
    job = partial(Job, capability=capability)
    yield job(
        "keep",
        lora_triton.keep_kernel,
        pointers={"seed_ptr": "*i64", "bits_ptr": "*u8"},
        constants={"BLOCK": lora_triton.KEEP},
        options={"num_warps": 4},
    )
    for dtype in DTYPES:
        yield job(
            f"sum {dtype}",
            lora_triton.sum_kernel,
            pointers=_pointers("fp32", "p_ptr", "q_ptr")
            | _pointers(dtype, "p_out_ptr", "q_out_ptr"),
            constants={"BLOCK": lora_triton.SUM},
            options={"num_warps": 4},
            light=dtype == "fp16",
        )
        yield from _skinny(job, dtype)
        yield from _fused(job, dtype, capability)
        yield from _nf4(job, dtype)
    yield from _update(job)


def _skinny(job: Any, dtype: str) -> Iterator[Job]:
    size = DTYPES[dtype]
    for BR, drop in product(lora_triton.RANKS[size], (False, True)):
        label = f"{dtype} r{BR}{' drop' if drop else ''}"
        tile = lora_triton.SHRINK[size]
        shrink = partial(
            job,
            kernel=lora_triton.shrink_kernel,
            pointers=_pointers(dtype, "x_ptr", "a_ptr", "s_ptr"),
            constants={"BM": tile.BM, "BK": tile.BK, "DROP": drop, "BR": BR},
            options=lora_triton.launch(tile),
            unit=("x_k", "a_k"),
            light=dtype == "fp16" or lora_triton.RANKS[size][-1] > BR or not drop,
        )
        yield shrink(f"shrink {label}")
        yield shrink(f"shrink {label} odd", odd=True)
        tile = lora_triton.OUTER[size]
        yield job(
            f"outer {label}",
            lora_triton.outer_kernel,
            pointers=_pointers(dtype, "x_ptr", "s_ptr") | {"part_ptr": "*fp32"},
            constants={"BM": tile.BM, "BK": tile.BK, "DROP": drop, "BR": BR},
            options=lora_triton.launch(tile),
            unit=("x_k", "p_k"),
            light=dtype == "fp16" or lora_triton.RANKS[size][-1] > BR or not drop,
        )
    ranks = [BR for BR in lora_triton.RANKS[size] if BR <= lora_triton.MOST]
    for BR, odd in product(ranks, (False, True)):
        tile = lora_triton.DY_PASS[size]
        yield job(
            f"dy_pass {dtype} r{BR}{' odd' if odd else ''}",
            lora_triton.dy_pass_kernel,
            pointers=_pointers(dtype, "dy_ptr", "b_ptr", "xa_ptr")
            | _pointers("fp32", "ds_ptr", "db_ptr"),
            constants={"BM": tile.BM, "BN": tile.BN, "BR": BR},
            options=lora_triton.launch(tile),
            unit=("dy_n", "b_r"),
            odd=odd,
            light=dtype == "fp16" or ranks[-1] > BR,
        )


def _fused(job: Any, dtype: str, capability: int) -> Iterator[Job]:
    size = DTYPES[dtype]
    pointers = _pointers(dtype, "x_ptr", "w_ptr", "bias_ptr", "a_ptr", "b_ptr", "y_ptr", "s_ptr")
    forward, gradient = ("x_k", "w_k", "a_k", "b_r"), ("x_k", "w_n", "a_r", "b_n")
    tiles = lora_triton.FUSED[size] if capability >= 90 else lora_triton.FUSED[size][1:]
    ranks = [BR for BR in lora_triton.RANKS[size] if BR <= lora_triton.MOST]
    for tile, BR, drop in product((*tiles, lora_triton.ODD[size]), ranks, (False, True)):
        odd = tile is lora_triton.ODD[size]
        for name, unit in (("y", forward), ("dx", gradient)):
            shape = f"{tile.BM}x{tile.BN}{' odd' if odd else ''}"
            yield job(
                f"{name} {dtype} {shape} r{BR}{' drop' if drop else ''}",
                lora_triton.fused_kernel,
                pointers=pointers | {"bits_ptr": "*u8"},
                constants={
                    **{"BM": tile.BM, "BN": tile.BN, "BK": tile.BK, "BR": BR, "GROUP": 8},
                    **{"BIAS": name == "y", "DROP_IN": drop and name == "y"},
                    "DROP_OUT": drop and name == "dx",
                },
                options=lora_triton.launch(tile),
                unit=unit,
                odd=odd,
                needs_hgmma=size == 2 and tile.BM >= 64,
                light=dtype == "fp16" or ranks[-1] > BR or not drop,
            )


def _nf4(job: Any, dtype: str) -> Iterator[Job]:
    pointers = dict.fromkeys(("packed_ptr", "scales_ptr"), "*u8")
    pointers |= _pointers("fp32", "a2_ptr", "offset_ptr", "codes_ptr", "d_ptr")
    pointers |= _pointers(dtype, "x_ptr", "bias_ptr", "w_ptr", "y_ptr")
    for double, odd in product((False, True), (False, True)):
        label = f"{dtype}{' double' if double else ''}{' odd' if odd else ''}"
        nf4 = partial(
            job,
            pointers=pointers if double else {**pointers, "scales_ptr": "*fp32"},
            odd=odd,
        )
        yield nf4(
            f"dequantize {label}",
            nf4_triton.dequantize_kernel,
            constants={"DOUBLE": double, "GROUPS": nf4_triton.DEQUANTIZE},
            options={"num_warps": nf4_triton.WARPS} | nf4_triton.ROUNDED,
            rounded=True,
            light=dtype == "fp16" or not double,
        )
        tile, size = nf4_triton.PRODUCT[DTYPES[dtype]], DTYPES[dtype]
        for BM in nf4_triton.ROWS:
            yield nf4(
                f"nf4 {BM}x{tile.BN} {label}",
                nf4_triton.product_kernel,
                constants={
                    **{"DOUBLE": double, "BIAS": True},
                    **{"BM": BM, "BN": tile.BN, "BK": tile.BK},
                },
                options=lora_triton.launch(tile) | nf4_triton.ROUNDED,
                unit=("x_k",),
                needs_hgmma=size == 2 and BM >= 64,
                rounded=size == 2,  # the products of float32 are FFMA
                light=dtype == "fp16" or not double or nf4_triton.ROWS[-1] > BM,
            )


def _update(job: Any) -> Iterator[Job]:
    pointers = dict.fromkeys(("table", "chunks"), "*i64") | {"settings": "*fp64"}
    pointers |= dict.fromkeys(("parts", "norm_out"), "*fp32")
    for name in ("squares_kernel", "adamw_kernel", "sgd_kernel"):
        kernel = getattr(update_triton, name)
        constants = {
            p.name: getattr(update_triton, p.name, True) for p in kernel.params if p.is_constexpr
        }
        options = {"num_warps": update_triton.WARPS}
        yield job(name, kernel, pointers=pointers, constants=constants, options=options)


def compile_one(job: Job) -> Result:
    """Compiles a kernel to machine code and reads what the disassembler says of it."""
    names = [p.name for p in job.kernel.params]
    constants = {**job.constants, **{n: 1 for n in job.unit if n in names}}
    signature = {
        name: "constexpr" if name in constants else job.pointers.get(name, _scalar(name))
        for name in names
    }
    sizes = {
        "M",
        "n",
        "least",
        "p_n",
        "q_n",
        "p_pieces",
        "q_pieces",
        "chunks",
        "shift",
    }  # these are what they are
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
    instructions = sorted(set(re.findall(r"\b(U?HGMMA|HMMA|UTC.?MMA|FFMA|LDGSTS|UTMALDG)\b", code)))
    return Result(
        int(_first(r"REG:(\d+)", usage)),
        int(_first(r"STACK:(\d+)", usage)),
        compiled.metadata.shared,
        " ".join(instructions),
    )


def every_job() -> list[Job]:
    return [job for capability in SHARED for job in jobs(capability)]


def _compile_number(i: int) -> Result:
    return compile_one(every_job()[i])  # a kernel does not pass between processes


def _pointers(dtype: str, *names: str) -> dict[str, str]:
    return {**dict.fromkeys(names, f"*{dtype}"), "bits_ptr": "*u8"}


def _scalar(name: str) -> str:
    """The type of an argument that is no pointer: sizes and strides, or numbers."""
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
    parser = argparse.ArgumentParser(prog="python -m minigpt_kernels.compile_check")
    parser.add_argument("part", nargs="?", default="", help="part of a kernel's name")
    parser.add_argument("--every", action="store_true", help="all configurations")
    given = parser.parse_args()
    status = 0
    print(f"{'kernel':32} {'GPU':6} {'registers':>9} {'stack':>6} {'shared':>8}  instructions")
    every = every_job()
    chosen = [
        i
        for i, job in enumerate(every)
        if given.part in job.name and (given.every or not job.light)
    ]
    if not chosen:
        kernels = ", ".join(sorted({job.name.split()[0] for job in every}))
        parser.error(f"{given.part!r} is part of no kernel's name; there are {kernels}")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for i, result in zip(chosen, pool.map(_compile_number, chosen), strict=True):
            job = every[i]
            faults = result.faults(job)
            status |= bool(faults)
            print(
                f"{job.name:32} sm_{job.capability:<3} {result.registers:>9} {result.stack:>6} "
                f"{result.shared:>8}  {result.instructions}{'  FAULT: ' if faults else ''}"
                f"{', '.join(faults)}",
                flush=True,
            )
    print(f"{len(chosen)} compiled" + (", with faults" if status else ", no fault"))
    return status


if __name__ == "__main__":
    sys.exit(main())
