"""Which route a LoRA product takes: what was measured on the GPU at hand, else torch.

    torch    every product by torch (cuBLAS on a GPU)
    triton   the large products by torch, those of width R by Triton
    fused    x W^T + b + s (x A^T) B^T, and dx, each in one launch of Triton; above rank 32, where
             a program would need too many registers, it is the route `triton`

measured.csv, which benchmarks/routes.py writes, has a row for each measured case.  A row holds
for its GPU, dtype, K, N, R and dropout exactly, and for M rounded up to a power of two.  A case
without a row takes torch.
"""

import csv
import os
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

ROUTES = ("torch", "triton", "fused")
BACKENDS = ("auto", *ROUTES)
INSTALLED = find_spec("triton") is not None  # asked once: a compiled graph cannot ask
DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the kernels


class Case(NamedTuple):
    """Device capability, dtype, and sizes of a product; M is a power of two."""

    capability: tuple[int, int]
    dtype: str
    M: int
    K: int
    N: int
    R: int
    dropout: bool


def read(path: Path) -> dict[Case, str]:
    """Case -> route, of a table on disk; comment lines name the machine.

    Raises:
        ValueError: a route is unknown.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    table = {}
    for row in rows:
        if row["route"] not in ROUTES:
            raise ValueError(f"{path}: route is {row['route']!r}, must be in {', '.join(ROUTES)}")
        major, minor = map(int, row["capability"].split("."))
        M, K, N, R = (int(row[size]) for size in "MKNR")
        dropout = row["dropout"] == "True"
        table[Case((major, minor), row["dtype"], bucket(M), K, N, R, dropout)] = row["route"]
    return table


def bucket(M: int) -> int:
    """M rounded up to a power of two."""
    power = 1
    while power < M:
        power *= 2
    return power


TABLE = read(Path(__file__).with_name("measured.csv"))


def resolve(backend: str, tensor: Tensor) -> str:
    """Either "triton" or "torch", for updates and products with 4 bits: "auto" is Triton on a GPU.

    Raises:
        ValueError: "triton" was asked for where it cannot run, with the reason.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend is {backend!r}, must be one of auto, torch, triton")
    if backend == "auto":
        return "triton" if tensor.device.type == "cuda" and INSTALLED else "torch"
    if backend == "triton":
        check_triton(backend, tensor)
    return backend


def check_triton(backend: str, tensor: Tensor) -> None:
    """Triton can run for this tensor.

    Raises:
        ValueError: it cannot, with the reason.
    """
    if not INSTALLED:
        raise ValueError(
            f"backend={backend!r} cannot run here: not installed: triton; run: pip install triton"
        )
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend={backend!r} cannot run here: the tensor is on {tensor.device} "
            "(with TRITON_INTERPRET=1 the kernels are interpreted there, slowly)"
        )


def choose(backend: str, x: Tensor, lora_b: Tensor, dropout: bool) -> str:
    """The route for rows x (M, K) and B (N, R).

    Raises:
        ValueError: the backend is unknown, or cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, must be one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if not TABLE or x.device.type != "cuda" or x.dtype not in DTYPES or not INSTALLED:
            return "torch"
        capability = torch.cuda.get_device_capability(x.device)
        dtype, (M, K), (N, R) = str(x.dtype).removeprefix("torch."), x.shape, lora_b.shape
        return TABLE.get(Case(capability, dtype, bucket(M), K, N, R, dropout), "torch")
    if backend != "torch":
        check_triton(backend, x)
        if x.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"backend={backend!r} takes {known}, the input is {x.dtype}")
    return backend


def refuse_in_capture(device: torch.device) -> None:
    """For what every replay of a CUDA graph would do again.

    Raises:
        ValueError: a CUDA graph is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "settings or state are new in this capture of a CUDA graph: "
            "make a step, or call write_settings(), before it"
        )
