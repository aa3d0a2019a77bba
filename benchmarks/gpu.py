"""All that a GPU has to measure, in parts, each with a time of its own.

    tests              240 s   the tests marked gpu -> tests.txt
    probe              420 s   what the GPU does at most, and the candidates beside it
    clipped_update     180 s   norm, clip and update
    lora_linear        480 s   one LoRA layer; then the table of routes -> measured.csv
    training_step_gpu  300 s   a training step

It needs torch, triton, numpy, transformers and pytest; nothing is installed, and everything is
written to one folder.  The parts run in this order, those named by `--part` alone.  A benchmark
writes its rows as they come, so that one which is stopped leaves what it has measured.  Tables and
plots are drawn afterwards, anywhere: copy the CSV files to benchmarks/results, measured.csv to
kernels/, and run `python -m benchmarks.tables`.

Without a GPU the program ends with exit status 2; with `--cpu`, to try it, the parts run on the CPU
as far as they can.

    python -m benchmarks.gpu --out results_of_today --part tests clipped_update
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.common import RESULTS

ROOT = Path(__file__).parents[1]
LIMITS = {
    "tests": 240,
    "probe": 420,
    "clipped_update": 180,
    "lora_linear": 480,
    "training_step_gpu": 300,
}  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="the folder of all results (default: the tables')")
    parser.add_argument("--threads", type=int, default=8, help="threads of torch (default: 8)")
    parser.add_argument("--part", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--cpu", action="store_true", help="try the parts without a GPU")
    given = parser.parse_args()
    if not given.cpu and not torch.cuda.is_available():
        print("no GPU here: torch.cuda.is_available() is False", file=sys.stderr)
        sys.exit(2)
    out = (given.out or RESULTS).resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = [part for part in LIMITS if part in given.part and not run(part, out, given.threads)]
    if failed:
        sys.exit(f"failed or stopped: {', '.join(failed)}")


def run(part: str, out: Path, threads: int) -> bool:
    """Whether a part ended well, and in its time."""
    print(f"--- {part}", flush=True)
    if part == "tests":
        files = [str(file) for file in sorted((ROOT / "tests" / "kernels").glob("test_gpu_*.py"))]
        options = ["-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={out / 'tests.xml'}"]
        return _ends("pytest", [*files, *options], LIMITS[part], out, out / "tests.txt")
    benchmark = ["--out", str(out), "--threads", str(threads)]
    ended = _ends(f"benchmarks.{part}", benchmark, LIMITS[part], out)
    if part == "lora_linear" and (out / "lora_linear_gpu.csv").exists():
        table = ["--out", str(out), "--table", str(out / "measured.csv")]
        ended &= _ends("benchmarks.routes", table, 60, out)
    return ended


def _ends(
    module: str, arguments: list[str], limit: float, out: Path, log: Path | None = None
) -> bool:
    """Runs a module from the repository's root; what it prints goes to `log`, too."""
    command = [sys.executable, "-m", module, *arguments]
    begin = time.monotonic()
    try:
        if log is None:
            done = subprocess.run(command, cwd=ROOT, env=_environment(out), timeout=limit)
        else:
            with log.open("w") as file:
                done = subprocess.run(
                    command, cwd=ROOT, env=_environment(out), timeout=limit, stdout=file
                )
    except subprocess.TimeoutExpired:
        print(f"{module} was stopped after {limit:.0f} seconds", file=sys.stderr)
        return False
    finally:
        if log is not None:
            print("\n".join(log.read_text().splitlines()[-10:]))
    print(f"{module}: {time.monotonic() - begin:.0f} s, exit status {done.returncode}", flush=True)
    return done.returncode == 0


def _environment(out: Path) -> dict[str, str]:
    """With the folder kernels/ as the module minigpt_kernels, which no installation provides."""
    link = out / ".path" / "minigpt_kernels"
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(ROOT / "kernels")
    paths = [str(ROOT), str(link.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    main()
