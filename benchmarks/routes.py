"""The table of routes, kernels/measured.csv, from what was measured on a GPU.

For each shape the quickest of our routes, by the medians of forward and backward as eager
training launches them (forward alone for a decoding step).  A shape is left out until every
route is measured there.

    python -m benchmarks.routes
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, quartiles, read
from benchmarks.lora_linear import BOTH, FEW, FORWARD, LAUNCHED
from benchmarks.paper import OURS_FUSED, OURS_TORCH, OURS_TRITON
from minigpt_kernels import backend
from minigpt_kernels.backend import Case

TABLE = Path(backend.__file__).with_name("measured.csv")
ROUTES = {OURS_TORCH: "torch", OURS_TRITON: "triton", OURS_FUSED: "fused"}


def routes(rows: Sequence[Mapping[str, str]]) -> dict[Case, str]:
    """Case -> route, for each shape that has all routes."""
    seconds: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        phase = FORWARD if int(row["M"]) <= FEW else BOTH
        if (row["timing"], row["phase"]) == (LAUNCHED, phase) and row["side"] in ROUTES:
            key = tuple(row[n] for n in ("capability", "dtype", "M", "K", "N", "R", "dropout"))
            sides = seconds.setdefault(key, {})
            sides.setdefault(row["side"], []).append(float(row["seconds"]))
    fastest = {}
    for (capability, dtype, *sizes, dropout), sides in seconds.items():
        if len(sides) == len(ROUTES):
            best = min(sides, key=lambda side: quartiles(sides[side])[1])
            major, minor = map(int, capability.split("."))
            M, K, N, R = map(int, sizes)
            case = Case((major, minor), dtype, M, K, N, R, float(dropout) > 0)
            fastest[case] = ROUTES[best]
    return fastest


def write(path: Path, facts: Mapping[str, str], table: Mapping[Case, str]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Case._fields, "route"])
        for case, route in table.items():
            writer.writerow([".".join(map(str, case.capability)), *case[1:], route])
    partial.replace(path)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV files are")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to write")
    given = parser.parse_args()
    facts, rows = read(given.out / "lora_linear_gpu.csv")
    write(given.table, facts, routes(rows))


if __name__ == "__main__":
    main()
