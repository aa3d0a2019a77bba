"""Tables of several processes, for `benchmarks.tables`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import quartiles, read
from benchmarks.figures import measured_on

Rows = Sequence[Mapping[str, str]]

ABOUT = """\
Full fine-tuning of GPT-Neo-125M, a micro-batch of 1 x 128 tokens a process, on one machine by gloo.
Kept are weights, gradients, m and v of what a process has; the peak is what it took from the moment
that the model was spread. Sent is counted at the collectives, for rings, beside the theory of
[scale.md](scale.md); of several processes the line has the one with most."""
ALONE = """\
One process: the median step of `minigpt finetune` under torchrun over that without it, in turn."""


def section(folder: Path) -> str:
    """All tables as Markdown, for a folder of result files."""
    if not (folder / "parallel.csv").exists():
        return f"{ABOUT}\n\nNot measured yet: `python -m benchmarks.parallel` does."
    facts, rows = read(folder / "parallel.csv")
    text = [ABOUT, measured_on(facts), processes(rows)]
    if (folder / "parallel_alone.csv").exists():
        _, rows = read(folder / "parallel_alone.csv")
        text += [ALONE, alone(rows)]
    return "\n\n".join(text)


def processes(rows: Rows) -> str:
    """A line for each way and number of processes."""
    lines = ["| way | processes | kept | computed | peak | sent a step | by theory |"]
    lines.append("| --- |" + " ---: |" * 6)
    for way, size in dict.fromkeys((row["way"], row["processes"]) for row in rows):
        some = [row for row in rows if (row["way"], row["processes"]) == (way, size)]
        kept, computed, peak, sent, theory = (
            f"{max(int(row[column]) for row in some) / 1e6:,.0f} MB"
            for column in (
                *("kept_bytes", "computed_bytes", "peak_bytes"),
                *("moved_bytes", "theory_bytes"),
            )
        )
        lines.append(f"| {way} | {size} | {kept} | {computed} | {peak} | {sent} | {theory} |")
    return "\n".join(lines)


def alone(rows: Rows) -> str:
    """The ratio of each round, their median and quartiles."""
    sides = [
        [float(row["seconds"]) for row in rows if row["side"] == side]
        for side in ("torchrun", "python")
    ]
    first, ratio, third = quartiles([a / b for a, b in zip(*sides, strict=True)])
    under, without = (f"{1000 * quartiles(side)[1]:.3g} ms" for side in sides)
    return (
        "| torchrun | without | ratio | quartiles |\n| ---: | ---: | ---: | ---: |\n"
        f"| {under} | {without} | {ratio:.3f} | {first:.3f} to {third:.3f} |"
    )
