"""Seconds from a shell to the first logits: fresh processes, ours against transformers.

A process imports the library, loads a GPT-Neo-125M (`model.safetensors`, fp32) and runs 16 tokens
through it.  What `import torch` alone takes is measured too, as `torch`: it belongs to both sides.
The three kinds take turns after one warm-up each, so the files are in the page cache for all.

    python -m benchmarks.startup                  -> results/startup.csv
    columns: side, round, seconds
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import OURS, THEIRS, checkpoint, options, write

TORCH = "torch"
FORWARD = "ids = torch.arange(16)[None]\nwith torch.inference_mode(): model(ids)\n"
PROGRAMS = {
    TORCH: "import torch\n",
    OURS: f"import sys, torch, minigpt\nmodel = minigpt.load(sys.argv[1])\n{FORWARD}",
    THEIRS: "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
    f"model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n{FORWARD}",
}


def measure(program: str, directory: Path, threads: int) -> float:
    """Seconds of wall time of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", program, str(directory)],
        env=environment,
        check=True,
        capture_output=True,
    )
    return time.perf_counter() - begin


def main() -> None:
    given = options(__doc__ or "", rounds=15).parse_args()
    with checkpoint(given.threads) as directory:
        for program in PROGRAMS.values():
            measure(program, directory, given.threads)
        rows = [
            {"side": side, "round": i + 1, "seconds": measure(program, directory, given.threads)}
            for i in range(given.rounds)
            for side, program in PROGRAMS.items()
        ]
    write(given.out / "startup.csv", given.threads, rows)


if __name__ == "__main__":
    main()
