"""Tables and a plot of the result files: docs/benchmarks.md, docs/benchmarks.png and README.md.

A ratio is ours / theirs: below 1, this project needs less.  Of times it is the ratio of the
medians; beside it stand the quartiles of the single rounds' ratios, whose two sides ran one right
after the other.

    python -m benchmarks.tables
"""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import clipped_update, lora_tables, nf4, parallel_tables, qlora_tables
from benchmarks.alignment import TRL
from benchmarks.common import OURS, RESULTS, SIDES, THEIRS, quartiles, read
from benchmarks.figures import measured_on, provenance
from benchmarks.methods import FULL, PEFT
from benchmarks.startup import TORCH
from benchmarks.training_step import COMPILED_OURS, PRODUCTS

Task = tuple[str, ...]  # what a line of a table measures
Seconds = Mapping[str, list[float]]  # by side

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"

COSTS = """\
Ours, and its ratio to HF PEFT's and to our full fine-tuning: median step, peak memory, bytes that
autograd keeps between forward and backward, size of the saved file."""
TITLES = {
    "full": "full fine-tuning",
    "frozen": "attention, embeddings frozen",
    "lora": "LoRA on query, value",
    "lora-all": "LoRA on all linears",
}
METHOD_TITLES = {
    "lora": "LoRA, query, value, r 8",
    "lora-all": "LoRA, all linears, r 8",
    "dora": "DoRA, query, value, r 8",
    "ia3": "IA3, key, value, mlp.down",
    "prefix": "prefix of 20",
    "prompt": "prompt of 20",
    "bias": "biases",
    "bottleneck": "Pfeiffer adapter, width 48",
}


@dataclass(frozen=True)
class Line:
    """One comparison: a name, both sides' values in `unit`, and the ratio ours / theirs."""

    name: str
    ours: float
    theirs: float
    unit: str
    ratios: Sequence[float] = ()  # of the single rounds

    @property
    def ratio(self) -> float:
        return self.ours / self.theirs

    def cells(self) -> list[str]:
        values = [f"{value:.3g} {self.unit}" for value in (self.ours, self.theirs)]
        first, _, third = quartiles(self.ratios) if self.ratios else (0.0, 0.0, 0.0)
        spread = f"{first:.2f} to {third:.2f}" if self.ratios else ""
        return [self.name, *values, f"{self.ratio:.2f}", spread]


def timed(name: str, rows: Iterable[Mapping[str, str]], minus: str | None = None) -> Line:
    """Medians of `seconds` of ours and of the quickest form of the other side, eager or compiled,
    less what side `minus` took in the same round.
    """
    rounds: dict[str, dict[str, float]] = {}
    for row in rows:
        rounds.setdefault(row["round"], {})[row["side"]] = float(row["seconds"])
    seconds = {
        side: [r[side] - (r[minus] if minus else 0) for r in rounds.values()]
        for side in next(iter(rounds.values()))
        if side == OURS or side.startswith(THEIRS)
    }
    ours = seconds.pop(OURS)
    theirs = min(seconds.values(), key=lambda values: quartiles(values)[1])
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Line(name, quartiles(ours)[1], quartiles(theirs)[1], "s", ratios)


def training_step(rows: Sequence[Mapping[str, str]]) -> list[Line]:
    return [
        timed(TITLES[m], [r for r in rows if r["method"] == m]) for m in _values(rows, "method")
    ]


def memory(rows: Sequence[Mapping[str, str]], above_imports: bool = False) -> list[Line]:
    """The peaks, whole or less what the process held before it built the model."""
    peak = {
        (r["method"], r["side"]): int(r["peak_bytes"])
        - (int(r["before_model_bytes"]) if above_imports else 0)
        for r in rows
    }
    methods = _values(rows, "method")
    return [Line(TITLES[m], peak[m, OURS] / 1e9, peak[m, THEIRS] / 1e9, "GB") for m in methods]


def generation(rows: Sequence[Mapping[str, str]]) -> list[Line]:
    titles = {"1": "one prompt", "4": "four prompts, padded", "8": "eight prompts"}
    return [timed(titles[b], [r for r in rows if r["batch"] == b]) for b in _values(rows, "batch")]


def startup(rows: Sequence[Mapping[str, str]]) -> list[Line]:
    return [timed("beyond `import torch`", rows, minus=TORCH), timed("in all", rows)]


def costs(steps: Sequence[Mapping[str, str]], bytes_: Sequence[Mapping[str, str]]) -> str:
    """What each method costs, as Markdown: ours, and in brackets ours / HF PEFT's, ours / full."""
    seconds = {
        (m, side): [float(r["seconds"]) for r in steps if (r["method"], r["side"]) == (m, side)]
        for m in _values(steps, "method")
        for side in (OURS, PEFT, FULL)
    }
    rows = {(r["method"], r["side"]): r for r in bytes_}
    columns = ["method", "trains", "step", "/ peft", "/ full", "peak", "/ peft", "/ full"]
    columns += ["kept for backward", "/ peft", "file"]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    full = rows[FULL, FULL]
    for m in _values(steps, "method"):
        ours, theirs = rows[m, OURS], rows.get((m, PEFT))
        step = seconds[m, OURS]
        cells = [METHOD_TITLES[m], f"{int(ours['trainable']):,}", f"{quartiles(step)[1]:.3g} s"]
        cells += [_ratio(step, seconds[m, PEFT]), _ratio(step, seconds[m, FULL])]
        cells.append(f"{int(ours['peak_bytes']) / 1e9:.3g} GB")
        cells += [_of(ours, theirs, "peak_bytes"), _of(ours, full, "peak_bytes")]
        cells += [f"{int(ours['saved_bytes']) / 1e6:.0f} MB", _of(ours, theirs, "saved_bytes")]
        lines.append(_row([*cells, f"{int(ours['file_bytes']) / 1e6:.2f} MB"]))
    return "\n".join(lines)


UPDATE = """\
Medians, and ours over the quickest other side, round by round (its quartiles): below 1, ours is
quicker.  On a GPU, `floor` is 32 bytes a parameter at the bandwidth of a large copy.  On paper is
what the bytes alone would take on one H200 at the 4.3 TB/s that a copy reaches there: 32 for each
parameter by ours, 40 by clip + fused, 92 by clip + foreach.  It is arithmetic, not measured."""
PAPER = {clipped_update.OURS: 32, clipped_update.FUSED: 40, clipped_update.FOREACH: 92}
PAPER_BANDWIDTH = 4.3e12  # bytes a second
NOT_MEASURED = """\
Not measured on a GPU yet; there, `python -m benchmarks.clipped_update` measures, and
`python -m benchmarks.tables` draws it here."""


def clip_and_update(folder: Path) -> str:
    """The tables of what was measured on a CPU and on a GPU, and of what paper says."""
    text = [UPDATE]
    places = {"cpu": ("On the CPU",), "gpu": ("On the GPU, the clock", "On the GPU, the device")}
    for place, titles in places.items():
        path = folder / f"clipped_update_{place}.csv"
        if not path.exists():
            text += [NOT_MEASURED]
            continue
        facts, rows = read(path)
        text += [measured_on(facts)]
        for title, kind in zip(titles, (clipped_update.WALL, clipped_update.DEVICE), strict=False):
            text += [f"{title}:", updates([row for row in rows if row["time"] == kind])]
    text += ["On paper:", _paper()]
    return "\n\n".join(text)


def updates(rows: Sequence[Mapping[str, str]]) -> str:
    """A line for each set of tensors, a column for each side."""
    sides = [s for s in _values(rows, "side") if s != clipped_update.OURS]
    others = [s for s in sides if s != clipped_update.FLOOR]
    columns = ["", *sides, clipped_update.OURS, "ours / best", "quartiles"]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for name in _values(rows, "set"):
        seconds = {
            side: [float(r["seconds"]) for r in rows if (r["set"], r["side"]) == (name, side)]
            for side in (*sides, clipped_update.OURS)
        }
        cells = [_time(quartiles(values)[1]) if values else "" for values in seconds.values()]
        rivals = [seconds[side] for side in others]
        lines.append(_row([name, *cells, *_against_best(seconds[clipped_update.OURS], rivals)]))
    return "\n".join(lines)


REAL = """\
SmolLM2-135M-Instruct, a pretrained Llama whose weights had 4 bits (Q4_1), expanded to fp32 or bf16
for all sides; `train` is a LoRA step of 4 x 128 tokens, `generate` 64 tokens for so many prompts,
`load` a load and a first forward pass.  Medians, and ours over the quickest other side, round by
round; peak is the most memory that the process held while it loaded."""


def real_model(folder: Path) -> str:
    """A line for each task and dtype, a column for each side."""

    def line(task: Task, taken: Sequence[Mapping[str, str]], seconds: Seconds) -> list[str]:
        peaks = [
            quartiles([int(r["peak_bytes"]) for r in taken if r["side"] == side])[1]
            for side in (OURS, THEIRS)
            if all(r["peak_bytes"] for r in taken)
        ]
        memory = [f"{peaks[0] / 1e9:.3g} GB", f"{peaks[0] / peaks[1]:.2f}"] if peaks else ["", ""]
        cells = [f"{quartiles(s)[1]:.3g} s" if s else "" for s in seconds.values()]
        others = [s for side, s in seconds.items() if side != OURS]
        return [", ".join(task), *cells, *_against_best(seconds[OURS], others), *memory]

    more = [f"{OURS} / best", "quartiles", "peak", f"/ {THEIRS}"]
    return _by_side(folder, "real_model", REAL, ("what", "dtype"), more, line)


def _by_side(
    folder: Path,
    name: str,
    about: str,
    keys: Sequence[str],
    more: Sequence[str],
    line: Callable[[Task, Sequence[Mapping[str, str]], Seconds], list[str]],
) -> str:
    """A table of a benchmark with a line for each task, a column for each side, and `more` columns.

    Args:
        keys: columns of the file whose values make a task.
        line: task, its rows, and its seconds by side -> the cells.
    """
    path = folder / f"{name}.csv"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks.{name}` does."
    facts, rows = read(path)
    sides = _values(rows, "side")
    columns = ["", *sides, *more]
    lines = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    for task in dict.fromkeys(tuple(r[key] for key in keys) for r in rows):
        taken = [r for r in rows if tuple(r[key] for key in keys) == task]
        timed = [r for r in taken if r["seconds"]]
        seconds = {s: [float(r["seconds"]) for r in timed if r["side"] == s] for s in sides}
        lines.append(_row(line(task, taken, seconds)))
    return "\n\n".join([about, measured_on(facts), "\n".join(lines)])


STEPS = """\
The same step on every side: as it is, and under torch.compile; `products` are the matrix products
of our step alone.  Medians, and ours over the quickest form of transformers, round by round,
uncompiled and compiled, and uncompiled over the products."""


def every_step(folder: Path) -> str:
    """A line for each method, a column for each side."""
    if all(row["side"] != COMPILED_OURS for row in read(folder / "training_step.csv")[1]):
        return "Not measured yet: `python -m benchmarks.training_step` does."

    def line(task: Task, taken: Sequence[Mapping[str, str]], seconds: Seconds) -> list[str]:
        others = [s for side, s in seconds.items() if side.startswith(THEIRS)]
        return [
            TITLES[task[0]],
            *(f"{quartiles(s)[1]:.3g} s" for s in seconds.values()),
            *_against_best(seconds[OURS], others),
            *_against_best(seconds[COMPILED_OURS], others),
            _against_best(seconds[OURS], [seconds[PRODUCTS]])[0],
        ]

    more = [f"{OURS} / best", "quartiles", "compiled / best", "quartiles", "/ products"]
    return _by_side(folder, "training_step", STEPS, ("method",), more, line)


ALIGNMENT = """\
A step of supervised fine-tuning (4 x 128 tokens), of DPO (4 pairs of 96 tokens) and of GRPO (8
completions of 32 tokens after a prompt of 32, drawn in the step; `grpo-update` is the update alone,
on given ones) on SmolLM2-135M (Q4_1 weights, expanded to fp32) with LoRA, beside trl's trainers.
Medians, and ours over the quickest other side, round by round; peak is the most memory of a process
after three steps, and that of trl.  What has no line is not measured yet."""


def alignment(folder: Path) -> str:
    """A line for each objective, a column for each side."""

    def line(task: Task, taken: Sequence[Mapping[str, str]], seconds: Seconds) -> list[str]:
        cells = [f"{quartiles(s)[1]:.3g} s" if s else "" for s in seconds.values()]
        others = [s for side, s in seconds.items() if side != OURS]
        peaks = {r["side"]: int(r["peak_bytes"]) for r in taken if r["peak_bytes"]}
        memory = [""] * 3
        if peaks:
            ours, theirs = peaks[OURS], peaks[TRL]
            memory = [f"{ours / 1e9:.3g} GB", f"{theirs / 1e9:.3g} GB", f"{ours / theirs:.2f}"]
        return [*task, *cells, *_against_best(seconds[OURS], others), *memory]

    more = [f"{OURS} / best", "quartiles", "peak", f"peak of {TRL}", "ratio"]
    return _by_side(folder, "alignment", ALIGNMENT, ("what",), more, line)


NF4 = """\
A linear layer (out x in) whose weight has 4 bits, in float32; `forward` alone, and `both`, forward
and backward to the input.  Medians in milliseconds, and ours over bitsandbytes, round by round.
`dense` is the product with a dense weight alone, in float32 and, where the processor has
instructions for it, in bfloat16; `read` one pass over the packed bytes: what the machine can do.
Load is the time to quantise."""


def four_bits(folder: Path) -> str:
    """A line for each shape and number of rows, a column for each side."""

    def line(task: Task, taken: Sequence[Mapping[str, str]], seconds: Seconds) -> list[str]:
        shape, count, what = task
        name = f"{shape}, {what}" + (f", rows {count}" if what != "load" else "")
        cells = [f"{1e3 * quartiles(s)[1]:.3g}" if s else "" for s in seconds.values()]
        return [name, *cells, *_against_best(seconds[OURS], [seconds[nf4.BNB]])]

    more = [f"{OURS} / {nf4.BNB}", "quartiles"]
    return _by_side(folder, "nf4", NF4, ("shape", "rows", "what"), more, line)


def _paper() -> str:
    lines = [_row(["", *PAPER]), _row(["---", *["---:"] * len(PAPER)])]
    for name, shapes in clipped_update.SETS.items():
        count = sum(math.prod(shape) for shape in shapes)
        times = [_time(count * size / PAPER_BANDWIDTH) for size in PAPER.values()]
        lines.append(_row([name, *times]))
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.3g} us" if seconds < 1e-3 else f"{1e3 * seconds:.3g} ms"


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the rounds' ratios; nothing where there is no other side."""
    if not theirs:
        return ""
    return f"{quartiles([a / b for a, b in zip(ours, theirs, strict=True)])[1]:.2f}"


def _against_best(ours: Sequence[float], others: Iterable[Sequence[float]]) -> list[str]:
    """Ours over the quickest other side that was measured, round by round: median and quartiles."""
    best = min(
        (seconds for seconds in others if seconds), key=lambda seconds: quartiles(seconds)[1]
    )
    first, middle, third = quartiles([a / b for a, b in zip(ours, best, strict=True)])
    return [f"{middle:.2f}", f"{first:.2f} to {third:.2f}"]


def _of(ours: Mapping[str, str], theirs: Mapping[str, str] | None, column: str) -> str:
    return "" if theirs is None else f"{int(ours[column]) / int(theirs[column]):.2f}"


def table(lines: Iterable[Line], timed: bool = True) -> str:
    """Markdown.  `timed`: with a column for the quartiles of the ratios."""
    columns = ["", OURS, THEIRS, "ratio", "quartiles"][: 5 if timed else 4]
    head = [_row(columns), _row(["---", *["---:"] * (len(columns) - 1)])]
    return "\n".join([*head, *(_row(line.cells()[: len(columns)]) for line in lines)])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _values(rows: Iterable[Mapping[str, str]], column: str) -> list[str]:
    """The different values of a column, in the order of the file."""
    return list(dict.fromkeys(row[column] for row in rows))


def replace(path: Path, text: str) -> None:
    """Puts `text` between the markers of a file; a file without them stays as it is."""
    old = path.read_text() if path.exists() else ""
    if BEGIN not in old or END not in old:
        print(f"{path}: no markers {BEGIN} {END}")
        return
    before, rest = old.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
    print(path)


def plot(path: Path, panels: Mapping[str, Sequence[Line]]) -> None:
    """A group of bars for each line, ours dark and theirs hatched."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6), layout="constrained")
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=True):
        places = range(len(lines))
        below = [p + 0.2 for p in places]
        above = [p - 0.2 for p in places]
        ours = axis.barh(above, [x.ours for x in lines], 0.38, color="0.25", edgecolor="black")
        theirs = axis.barh(
            below, [x.theirs for x in lines], 0.38, color="white", edgecolor="black", hatch="///"
        )
        for bars in (ours, theirs):
            axis.bar_label(bars, fmt="{:.3g}", padding=3)
        axis.set_yticks(places, [x.name.replace("`", "") for x in lines])
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.set_title(title, loc="left")
        axis.set_xlabel("GB" if lines[0].unit == "GB" else "seconds")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend([ours, theirs], SIDES, loc="outside upper right", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(path)


def sections(folder: Path) -> list[tuple[str, dict[str, str], list[Line]]]:
    """Title, machine and lines of each comparison with transformers."""
    files = {
        "A training step": ("training_step.csv", training_step),
        "Peak memory of training": ("memory.csv", memory),
        "Greedy generation of 64 tokens": ("generation.csv", generation),
        "Import, load and first forward pass": ("startup.csv", startup),
    }
    parts = []
    for title, (file, lines) in files.items():
        facts, rows = read(folder / file)
        parts.append((title, facts, lines(rows)))
    return parts


def full(folder: Path) -> str:
    """All tables, for docs/benchmarks.md."""
    text = ["![](benchmarks.png)", ""]
    for title, facts, lines in sections(folder):
        text += [f"### {title}", "", measured_on(facts), ""]
        text += [table(lines, timed=lines[0].unit == "s"), ""]
    text += ["### A training step, every side", "", every_step(folder), ""]
    _, peaks = read(folder / "memory.csv")
    text += ["### Peak memory of training above the imports", ""]
    text += [table(memory(peaks, above_imports=True), timed=False), ""]
    text += [lora_tables.section(folder), ""]
    facts, method_steps = read(folder / "methods_step.csv")
    _, method_bytes = read(folder / "methods_memory.csv")
    text += ["### What each method costs", "", COSTS, "", measured_on(facts), ""]
    text += [costs(method_steps, method_bytes)]
    text += ["", "### A pretrained model", "", real_model(folder)]
    text += ["", "### Preferences and rewards", "", alignment(folder)]
    text += ["", "### A weight of 4 bits", "", four_bits(folder)]
    text += ["", "### QLoRA at seven billion parameters", "", qlora_tables.section(folder)]
    text += ["", "### Several processes", "", parallel_tables.section(folder)]
    text += ["", "### Clip and update", "", clip_and_update(folder)]
    return "\n".join(text)


def short(folder: Path) -> str:
    """The measured comparisons in one table, for the README."""
    parts = sections(folder)
    lines = [
        Line(f"{title}: {x.name}", x.ours, x.theirs, x.unit, x.ratios)
        for title, _, rows in parts
        for x in rows
    ]
    return f"{table(lines)}\n\n{lora_tables.short(folder)}\n\n{provenance(parts[0][1])}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSV files are")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    given = parser.parse_args()

    docs = given.root / "docs"
    docs.mkdir(exist_ok=True)
    page = docs / "benchmarks.md"
    if not page.exists():
        page.write_text(f"# Benchmarks\n\n{BEGIN}\n{END}\n")
    replace(page, full(given.out))
    replace(given.root / "README.md", short(given.out))
    lora_tables.plot(given.out, docs / lora_tables.PLOT)
    plot(docs / "benchmarks.png", {title: lines for title, _, lines in sections(given.out)})


if __name__ == "__main__":
    main()
