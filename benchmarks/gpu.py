"""All that a GPU has to measure, in one go: the result files, the table of routes
(kernels/measured.csv), and the tables and plots of the documentation.

Each benchmark writes its file as it goes, and none goes on after eight minutes; what was measured
by then is drawn, and a benchmark that was stopped can be run by itself.  Without a GPU it says so
and ends with exit status 2.

    python -m benchmarks.gpu
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import routes
from benchmarks.common import RESULTS
from benchmarks.tables import ROOT

BENCHMARKS = ("lora_linear", "training_step_gpu", "clipped_update")
LIMIT = 480.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV files go")
    parser.add_argument("--threads", type=int, default=8, help="threads of torch (default: 8)")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--table", type=Path, default=routes.TABLE, help="the table of routes")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False", file=sys.stderr)
        sys.exit(2)
    end = time.monotonic() + LIMIT
    failed = []
    for name in BENCHMARKS:
        seconds = end - time.monotonic()
        if not run(name, "--out", given.out, "--threads", given.threads, seconds=seconds):
            failed.append(name)
        if name == "lora_linear" and not run("routes", "--out", given.out, "--table", given.table):
            failed.append("routes")
    if not run("tables", "--out", given.out, "--root", given.root):
        failed.append("tables")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, *options: object, seconds: float | None = None) -> bool:
    """Whether a benchmark ended well, and within so many seconds."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, options)]
    try:
        return subprocess.run(command, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{LIMIT:.0f} seconds are over: python -m benchmarks.{name}", file=sys.stderr)
        return False


if __name__ == "__main__":
    main()
