"""Tables of QLoRA at the shape of seven billion parameters, for `benchmarks.tables`.

Times are medians of the measured steps.  A process's peak only grows: a line has the last one.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.common import OURS, THEIRS, quartiles, read
from benchmarks.figures import measured_on

Rows = Sequence[Mapping[str, str]]

ABOUT = """\
A Mistral of Vistral-7B's shape (7,293,906,944 parameters) with random bfloat16 weights: time and
memory, not quality. LoRA of rank 64 on every linear layer but the head, in float32, with activation
checkpointing. Peak is the most main memory that the process held until then, mapped files included;
anonymous, what of it no file backs."""
WHOLE = """\
All 32 layers, one row of 256 tokens a step, the optimizer's state paged. After the last step the
run is cut off; later a new process resumes it for one step more."""
FOUR = """\
The first four layers, one row of 512 tokens a step, beside transformers, bitsandbytes and peft:
each load and its steps in a new process, in turn."""
RESUMED = "qlora_resumed.csv"
TITLES = {
    "load": "load into 4 bits",
    "step": "a step",
    "resumed step": "the resumed step",
    "adapter": "save the adapter",
}


def section(folder: Path) -> str:
    """Both tables as Markdown, for a folder of result files."""
    text = [ABOUT]
    for file, about, table in (
        ("qlora.csv", WHOLE, whole),
        ("qlora_four_layers.csv", FOUR, four_layers),
    ):
        if (folder / file).exists():
            facts, rows = read(folder / file)
            text += [about, measured_on(facts)]
            if table is whole and (folder / RESUMED).exists():
                facts, resumed = read(folder / RESUMED)
                rows = [*rows, *(row for row in resumed if row["what"] == "resumed step")]
                text.append(f"The resumed step is a measurement of its own. {measured_on(facts)}")
            text.append(table(rows))
        else:
            part = "whole" if table is whole else "four-layers"
            text += [about, f"Not measured yet: `python -m benchmarks.qlora --part {part}` does."]
    return "\n\n".join(text)


def whole(rows: Rows) -> str:
    """A line for each part of the run."""
    lines = ["| | seconds | tokens/s | peak | anonymous |", "| --- | ---: | ---: | ---: | ---: |"]
    for what, title in TITLES.items():
        taken = [row for row in rows if row["what"] == what]
        if not taken:
            lines.append(f"| {title} | not measured | | | |")
            continue
        seconds, tokens = median(taken, "seconds"), int(taken[0]["tokens"])
        speed = f"{tokens / seconds:.3g}" if tokens else ""
        peak, anonymous = (
            f"{max(int(row[column]) for row in taken) / 1e9:.2f} GB"
            for column in ("peak_bytes", "anonymous_bytes")
        )
        lines.append(f"| {title} | {seconds:.3g} | {speed} | {peak} | {anonymous} |")
    return "\n".join(lines)


def four_layers(rows: Rows) -> str:
    """Load and step, time and memory of both sides; of each process its median step and its peak
    at the end, of several processes the median and the quartiles of their ratios.
    """
    lines = [f"| | {OURS} | {THEIRS} | ratio | quartiles |", "| --- | ---: | ---: | ---: | ---: |"]
    for what in ("load", "step"):
        for column, unit, scale in (
            ("seconds", "s", 1.0),
            ("peak_bytes", "GB peak", 1e9),
            ("anonymous_bytes", "GB anonymous", 1e9),
        ):
            sides = [
                [
                    median([r for r in taken if r["round"] == number], column) / scale
                    for number in dict.fromkeys(r["round"] for r in taken)
                ]
                for side in (OURS, THEIRS)
                for taken in [[r for r in rows if (r["what"], r["side"]) == (what, side)]]
            ]
            middle = [f"{quartiles(values)[1]:.3g} {unit}" for values in sides]
            first, ratio, third = quartiles([a / b for a, b in zip(*sides, strict=True)])
            spread = f"{first:.2f} to {third:.2f}"
            lines.append(f"| {TITLES[what]} | {' | '.join(middle)} | {ratio:.2f} | {spread} |")
    return "\n".join(lines)


def median(rows: Rows, column: str) -> float:
    return quartiles([float(row[column]) for row in rows])[1]
