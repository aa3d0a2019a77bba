"""Which route a LoRA product takes: a table of what was measured.

Routes: "torch" is the autograd Function over torch's products (cuBLAS on a GPU), "triton" the one
over the kernels here.  A row holds for shapes of about its size on its GPU; a shape without a row
takes "torch".  The rows are those of kernels/measured.csv, which benchmarks/routes.py writes; no
row is there before it was measured.
"""

import csv
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .backend import resolve


class Measured(NamedTuple):
    """One measured shape: device capability, dtype, sizes, and the quicker route."""

    capability: tuple[int, int]
    dtype: str
    M: int
    K: int
    N: int
    R: int
    dropout: bool
    route: str


DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # of the kernels
NEAR = 2.0  # a row holds for sizes up to this factor away


def read(path: Path) -> list[Measured]:
    """The rows of a table on disk; comment lines name the machine."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    found = []
    for row in rows:
        major, minor = map(int, row["capability"].split("."))
        M, K, N, R = (int(row[size]) for size in "MKNR")
        dropout = row["dropout"] == "True"
        found.append(Measured((major, minor), row["dtype"], M, K, N, R, dropout, row["route"]))
    return found


TABLE = read(Path(__file__).with_name("measured.csv"))


def route(backend: str, x: Tensor, weight: Tensor, R: int, dropout_p: float) -> str:
    """Either "torch" or "triton" for rows x (M, K) and a weight (N, K).

    Raises:
        ValueError: "triton" was asked for where it cannot run.
    """
    chosen = resolve(backend, x)
    if chosen == "triton" and x.dtype not in DTYPES:
        if backend == "triton":
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"backend='triton' takes {known}, the input is {x.dtype}")
        return "torch"
    if backend != "auto" or chosen == "torch":
        return chosen
    capability = torch.cuda.get_device_capability(x.device)
    dtype = str(x.dtype).removeprefix("torch.")
    return look_up(TABLE, capability, dtype, (*x.shape, len(weight), R), dropout_p > 0)


def look_up(
    table: list[Measured],
    capability: tuple[int, int],
    dtype: str,
    sizes: tuple[int, ...],
    dropout: bool,
) -> str:
    """The route of the nearest row for sizes (M, K, N, R); "torch" where none is near."""

    def away(row: Measured) -> float:
        pairs = zip(sizes, (row.M, row.K, row.N, row.R), strict=True)
        return max(max(a, 1) / b if a > b else b / max(a, 1) for a, b in pairs)

    same = [r for r in table if (r.capability, r.dtype, r.dropout) == (capability, dtype, dropout)]
    nearest = min(same, key=away, default=None)
    return "torch" if nearest is None or away(nearest) > NEAR else nearest.route
