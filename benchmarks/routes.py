"""The table of kernels/dispatch.py out of what was measured on a GPU: kernels/measured.csv.

For each shape the quicker of our two routes, by the medians of forward and backward as eager
training launches them (forward alone for a decoding step).  Where Triton loses the row says so.

    python -m benchmarks.routes
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import RESULTS, quartiles, read
from benchmarks.lora_linear import BOTH, FEW, FORWARD, LAUNCHED
from benchmarks.paper import OURS_TORCH, OURS_TRITON
from minigpt_kernels import dispatch
from minigpt_kernels.dispatch import Measured

TABLE = Path(dispatch.__file__).with_name("measured.csv")
ROUTES = {OURS_TORCH: "torch", OURS_TRITON: "triton"}


def routes(rows: Sequence[Mapping[str, str]]) -> list[Measured]:
    """One for each shape that has both routes."""
    seconds: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        phase = FORWARD if int(row["M"]) <= FEW else BOTH
        if (row["timing"], row["phase"]) == (LAUNCHED, phase) and row["side"] in ROUTES:
            case = tuple(row[n] for n in ("capability", "dtype", "M", "K", "N", "R", "dropout"))
            sides = seconds.setdefault(case, {})
            sides.setdefault(row["side"], []).append(float(row["seconds"]))
    found = []
    for (capability, dtype, *sizes, dropout), sides in seconds.items():
        if len(sides) == len(ROUTES):
            best = min(sides, key=lambda side: quartiles(sides[side])[1])
            major, minor = map(int, capability.split("."))
            M, K, N, R = map(int, sizes)
            where = (major, minor)
            found.append(Measured(where, dtype, M, K, N, R, float(dropout) > 0, route=ROUTES[best]))
    return found


def write(path: Path, facts: Mapping[str, str], rows: Sequence[Measured]) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Measured._fields)
        writer.writerows([".".join(map(str, row.capability)), *row[1:]] for row in rows)
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
