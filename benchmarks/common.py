"""What the benchmarks share: options, the machine, a checkpoint, fresh processes, CSV files.

A result file is a CSV table below comment lines that name the machine and the commit:

    # cpu: ...
    # torch: ...
    # commit: ...
    method,side,round,seconds,loss

`pandas.read_csv(path, comment="#")` reads it, and so does `read` here.
"""

import argparse
import csv
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar

from benchmarks.figures import origin

OURS, THEIRS = "minigpt", "transformers"
SIDES = (OURS, THEIRS)
COMPILED = f"{THEIRS}, compiled"  # the other side under torch.compile
RESULTS = Path(__file__).parent / "results"

P = ParamSpec("P")
R = TypeVar("R")
Rows = Iterable[Mapping[str, object]]


def options(description: str, rounds: int | None = None) -> argparse.ArgumentParser:
    """The options of every benchmark; `rounds` is the default number of them, None: it has none."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV file goes")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    if rounds is not None:
        help = f"measurements of each side, alternating (default: {rounds})"
        parser.add_argument("--rounds", type=int, default=rounds, help=help)
    return parser


def fresh(threads: int, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """`function(*args)` in a new Python process with so many threads, which ends when this one
    does, however that ends.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        with ProcessPoolExecutor(1, get_context("spawn"), _end_with_parent) as pool:
            return pool.submit(function, *args, **kwargs).result()
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _end_with_parent() -> None:
    def wait() -> None:
        parent = parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def checkpoint(threads: int) -> Iterator[Path]:
    """A directory with a GPT-Neo-125M of random fp32 weights, written by transformers."""
    with TemporaryDirectory() as directory:
        fresh(threads, _write_checkpoint, Path(directory))
        yield Path(directory)


def _write_checkpoint(directory: Path) -> None:
    import torch
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(0)
    config = GPTNeoConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
    )
    GPTNeoForCausalLM(config).save_pretrained(directory)


def machine(threads: int) -> dict[str, str]:
    """What the figures depend on."""
    cpu = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    facts = {
        "cpu": cpu[1] if cpu else platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "threads": str(threads),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in ("torch", "transformers", "peft", "triton"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "none"
    facts |= _gpu()
    facts["date"] = datetime.now(UTC).date().isoformat()
    return facts


def _gpu() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    return {"gpu": torch.cuda.get_device_name(), "driver": driver}


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def write_each(path: Path, threads: int, measures: Mapping[str, Callable[[], Rows]]) -> None:
    """Writes a result file after each measure.  One that fails is told of, the others go on, and
    the program ends with exit status 1.
    """
    rows: list[Mapping[str, object]] = []
    failed = []
    for name, measure in measures.items():
        try:
            rows += measure()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        else:
            write(path, threads, rows)
    if failed:
        sys.exit(f"{path.name} lacks {', '.join(failed)}: failed")


def write(path: Path, threads: int, rows: Rows) -> None:
    """Writes a result file, whole or not at all, and says so."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        facts = {**machine(threads), **origin(path.name)}
        file.writelines(f"# {name}: {value}\n" for name, value in facts.items())
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
    print(path)


def read(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The machine and the rows of a result file."""
    lines = path.read_text().splitlines()
    comments = [line.removeprefix("# ") for line in lines if line.startswith("#")]
    facts = dict(comment.split(": ", 1) for comment in comments)
    return facts, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, median, third
