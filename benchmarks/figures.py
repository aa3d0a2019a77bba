"""Which published figures are stale: a later commit has changed what they measure.

A result file names in its first lines the commit at which it was measured and the paths whose code
it measures.  A figure is stale when a later commit touched one of these paths; it is then taken
again by its benchmark.

    python -m benchmarks.figures        lists the result files and says which are stale
"""

import argparse
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNKNOWN = "unknown"
TRAINING = ("minigpt/models", "minigpt/objectives", "minigpt/training", "peft_lite", "kernels")
GENERATION = ("minigpt/generation.py", "minigpt/sampling.py")
# result file -> the paths whose code it measures
MEASURES: Mapping[str, tuple[str, ...]] = {
    "training_step.csv": TRAINING,
    "memory.csv": TRAINING,
    "methods_step.csv": TRAINING,
    "methods_memory.csv": TRAINING,
    "profile_step.csv": TRAINING,
    "training_step_gpu.csv": TRAINING,
    "generation.csv": ("minigpt/models", *GENERATION),
    "real_model.csv": (*TRAINING, "minigpt/checkpoints", *GENERATION),
    "alignment.csv": (*TRAINING, *GENERATION),
    "startup.csv": ("minigpt/__init__.py", "minigpt/models", "minigpt/checkpoints"),
    "lora_linear_cpu.csv": ("kernels",),
    "lora_linear_gpu.csv": ("kernels",),
    "lora_linear_errors.csv": ("kernels",),
    "clipped_update_cpu.csv": ("kernels",),
    "clipped_update_gpu.csv": ("kernels",),
    "nf4.csv": ("kernels",),
    "qlora.csv": (*TRAINING, "minigpt/checkpoints"),
    "qlora_resumed.csv": (*TRAINING, "minigpt/checkpoints"),
    "qlora_four_layers.csv": (*TRAINING, "minigpt/checkpoints"),
    "parallel.csv": TRAINING,
    "parallel_alone.csv": TRAINING,
    "plan.csv": (*TRAINING, "minigpt/checkpoints", "minigpt/plan"),
    "probe.csv": (),  # of the machine, not of this project's code
}


def origin(file: str) -> dict[str, str]:
    """The facts that a result file records about the code: its commit, and the paths it measures.

    Raises:
        ValueError: `MEASURES` does not know the file.
    """
    if file not in MEASURES:
        raise ValueError(f"{file} is not in benchmarks.figures.MEASURES: name what it measures")
    paths = MEASURES[file]
    commit = git("rev-parse", "--short=10", "HEAD") or UNKNOWN
    if commit != UNKNOWN and paths and git("status", "--porcelain", "--", *paths):
        commit += " and uncommitted changes"
    return {"commit": commit, "measures": " ".join(paths)}


def later_commits(facts: Mapping[str, str], until: str = "HEAD") -> int | None:
    """How many commits after the measured one, up to `until`, touched what was measured; None where
    the commit is not known here.
    """
    commit, paths = facts.get("commit", UNKNOWN), facts.get("measures", "").split()
    if not paths:
        return 0 if "measures" in facts else None
    count = git("rev-list", "--count", f"{commit.split()[0]}..{until}", "--", *paths)
    return int(count) if count else None


def provenance(facts: Mapping[str, str]) -> str:
    """One sentence: the commit of a result file, and how many later commits changed what it
    measures, counted at the commit at which the sentence is written.
    """
    if "commit" not in facts:
        return "Its commit was not recorded."
    count, here = later_commits(facts), git("rev-parse", "--short=10", "HEAD")
    if count is None:
        return f"Measured at commit {facts['commit']}."
    plural = "commit has" if count == 1 else "commits have"
    later = f"{count} later {plural} changed what it measures (counted at {here})"
    return f"Measured at commit {facts['commit']}; {later}."


def measured_on(facts: Mapping[str, str]) -> str:
    """Where and at which commit a result file was measured."""
    machine = [f"{n} {v}" for n, v in facts.items() if n not in ("commit", "measures")]
    return f"{provenance(facts)} Machine: {', '.join(machine)}."


def git(*arguments: str) -> str:
    """What git prints; nothing where it fails or is not installed."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def main() -> None:
    from benchmarks.common import RESULTS, read

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV files are")
    for path in sorted(parser.parse_args().out.glob("*.csv")):
        facts, _ = read(path)
        count = later_commits(facts)
        state = "unknown" if count is None else "current" if count == 0 else "stale"
        commits = "" if not count else f", {count} later commits"
        print(f"{state:8} {path.name:28} {facts.get('commit', UNKNOWN)}{commits}")


if __name__ == "__main__":
    main()
