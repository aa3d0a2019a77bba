"""All benchmarks, one after the other, then their tables."""

import argparse
import signal
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS
from benchmarks.tables import ROOT

BENCHMARKS = (
    "training_step", "memory", "methods", "generation", "startup", "clipped_update", "lora_linear",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV files go")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--rounds", type=int, help="measurements of each side, alternating")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    given = parser.parse_args()
    # an exit takes the running benchmark along, a signal alone would not
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    failed = []
    for name in BENCHMARKS:
        options = ["--out", given.out, "--threads", given.threads]
        if given.rounds is not None and name != "memory":
            options += ["--rounds", given.rounds]
        if not _run(name, *options):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; no tables drawn")
    if not _run("tables", "--out", given.out, "--root", given.root):
        sys.exit("failed: tables")


def _run(name: str, *options: object) -> bool:
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, options)]
    return subprocess.run(command).returncode == 0


if __name__ == "__main__":
    main()
