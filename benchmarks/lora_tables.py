"""Tables and a plot of the LoRA layer and of a training step on a GPU, for `benchmarks.tables`.

Where a GPU has measured nothing yet the tables stand there all the same, "not measured" in their
cells beside the times on paper.  A ratio is the quickest of our routes / the row's side, of the
medians; in brackets stand the quartiles of the single rounds' ratios.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks import paper
from benchmarks import training_step_gpu as step
from benchmarks.common import OURS, quartiles, read
from benchmarks.lora_linear import (
    BOTH,
    DROPOUTS,
    FEW,
    FORWARD,
    GPU_SHAPES,
    GRAPH,
    LAUNCHED,
    dropouts,
    phases,
    timings,
)
from benchmarks.methods import PEFT
from benchmarks.paper import Shape
from benchmarks.routes import ROUTES

Rows = Sequence[Mapping[str, str]]
Times = dict[tuple[str, str], list[float]]  # (side, phase) -> seconds of the rounds

NOT = "not measured"
NOT_YET = "Not measured on a GPU yet: there, `make bench-gpu` measures and fills the tables in."
PLOT = "lora_gpu.png"
CPU = """\
Rows x inputs x outputs; ours, and its ratio to HF PEFT's: medians of the rounds, quartiles of their
ratios, bytes that autograd keeps from forward to backward (x is among them; parameters are not)."""
GPU = """\
Rows x inputs x outputs, bf16, microseconds forward + backward (dx, dA and dB); a decoding step is
forward alone. All sides take turns in one process on the same inputs, of which several sets, larger
than the cache together, are used one after the other; CUDA events stand around many calls.
unsloth's and LoRAFusion's rows are their formulas as the sequence of torch calls they come to.
"paper" is arithmetic and no measurement: of each kernel the longest of 2 us, FLOPs / 790 TFLOP/s
and bytes / 4.3 TB/s. The floor is one pass over every operand; measured, at the throughput and the
bandwidth found in the same round."""
STEP = """\
GPT-Neo-125M's size, batch 8 x 512, bf16; full fine-tuning under autocast. Peak memory is the
allocator's."""
STEPS = {"lora": "LoRA on query, value", "lora-all": "LoRA on all linears", "full": "full"}


def section(folder: Path) -> str:
    """All tables as Markdown, for a folder of result files."""
    facts, rows = _read(folder / "lora_linear_cpu.csv")
    text = ["### One LoRA layer on a CPU", CPU, _machine(facts), cpu(rows)]
    text += ["### One LoRA layer on a GPU", GPU]
    facts, rows = _read(folder / "lora_linear_gpu.csv")
    text += [_machine(facts), f"![]({PLOT})"] if rows else [NOT_YET]
    for title, shapes, timing in _groups():
        if rows or timing in (GRAPH, timings(shapes[0])[-1]):
            text += [f"#### {title}", gpu(rows, shapes, timing)]
    _, wrong = _read(folder / "lora_linear_errors.csv")
    if wrong:
        text += ["#### Largest error, as a share of the largest value, against float64"]
        text += [errors(wrong)]
    text += ["### A training step on a GPU", STEP]
    facts, rows = _read(folder / "training_step_gpu.csv")
    text += [_machine(facts) if rows else NOT_YET, training_step(rows)]
    return "\n\n".join(text)


def short(folder: Path) -> str:
    """The measured lines for the README: one layer on a CPU and on a GPU, without dropout."""
    lines = []
    for case, measured in cpu_cases(_read(folder / "lora_linear_cpu.csv")[1]).items():
        if float(measured[0]["dropout"]) == 0 and measured[0]["siblings"] == "1":
            sides = [_seconds(measured, side, BOTH) for side in (OURS, PEFT)]
            medians = [f"{1e3 * quartiles(seconds)[1]:.3g} ms" for seconds in sides]
            lines.append([f"A LoRA layer, {case}: {BOTH}", *medians, *_ratio(*sides)])
    rows = _read(folder / "lora_linear_gpu.csv")[1]
    for shape in GPU_SHAPES:
        times = _times(rows, shape, 0.0, timings(shape)[-1])
        best, phase = _ours(times), phases(shape)[-1]
        if not best or not times.get((paper.PEFT, phase)):
            continue
        sides = [times[side, phase] for side in (best, paper.PEFT)]
        cells = [*(f"{_us(quartiles(seconds)[1])} us" for seconds in sides), *_ratio(*sides)]
        how = "bf16, in a CUDA graph" if GRAPH in timings(shape) else "bf16"
        lines.append([f"A LoRA layer on a GPU, {how}, {name(shape)}: {phase}", *cells])
    return grid(["", OURS, "HF PEFT", "ratio", "quartiles"], lines)


def name(shape: Shape) -> str:
    return f"{shape.M} x {shape.K} x {shape.N}, r {shape.R}"


def cpu(rows: Rows) -> str:
    """A line for each case."""
    columns = ["layer", "forward", "/ peft", "quartiles", "forward + backward", "/ peft"]
    columns += ["quartiles", "kept for backward", "/ peft"]
    lines = []
    for case, case_rows in cpu_cases(rows).items():
        cells = [case]
        for phase in (FORWARD, BOTH):
            ours, theirs = (_seconds(case_rows, side, phase) for side in (OURS, PEFT))
            cells += [f"{1e3 * quartiles(ours)[1]:.3g} ms", *_ratio(ours, theirs)]
        kept = {row["side"]: int(row["kept_bytes"]) for row in case_rows}
        cells += [f"{kept[OURS] / 1e6:.3g} MB", f"{kept[OURS] / kept[PEFT]:.2f}"]
        lines.append(cells)
    return grid(columns, lines)


def cpu_cases(rows: Rows) -> dict[str, Rows]:
    """The rows of each case, by its name."""
    cases: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        shape = Shape(*(int(row[size]) for size in Shape._fields))
        several = "" if row["siblings"] == "1" else f", {row['siblings']} of one x"
        dropped = "" if float(row["dropout"]) == 0 else f", dropout {row['dropout']}"
        cases.setdefault(f"{name(shape)}{several}{dropped}", []).append(row)
    return dict(cases)


def gpu(rows: Rows, shapes: Sequence[Shape], timing: str) -> str:
    """A line for each side, a time and a ratio for each shape with and without dropout."""
    cases = [(shape, p) for p in DROPOUTS for shape in shapes if p in dropouts(shape)]
    measured = {case: _times(rows, *case, timing) for case in cases}
    width = 2 if any(measured.values()) else 1  # no ratios where nothing is measured
    columns = ["us"]
    for shape, p in cases:
        columns += [name(shape) + (f", dropout {p}" if p else ""), "ours / it"][:width]
    lines = []
    for side in (*paper.SIDES, paper.FLOOR):
        cells = [side]
        for (shape, p), times in measured.items():
            cells += _cells(side, shape, p, times, timing == timings(shape)[-1])[:width]
        lines.append(cells)
    return grid(columns, lines)


def _cells(side: str, shape: Shape, p: float, times: Times, on_paper: bool) -> list[str]:
    """Time and ratio."""
    expected = _paper(side, shape, p)
    if expected is None:
        return ["", ""]
    note = f" ({' + '.join(map(_us, expected))} paper)" if on_paper else ""
    both = [times.get((side, phase), []) for phase in phases(shape)]
    best = _ours(times)
    if not best or not all(both):
        return [f"{NOT}{note}", NOT]
    medians = [quartiles(seconds)[1] for seconds in both]
    parts = [medians[0], *(m - medians[0] for m in medians[1:])]
    ratio, spread = _ratio(times[best, phases(shape)[-1]], both[-1])
    return [f"{' + '.join(map(_us, parts))}{note}", f"{ratio} ({spread})"]


def _paper(side: str, shape: Shape, p: float) -> list[float] | None:
    """Seconds on paper, forward and, where it is measured, backward."""
    if side == paper.FLOOR:
        both = [paper.seconds([kernel], launch=0) for kernel in paper.floor(shape)]
    else:
        kernels = paper.side_kernels(side, shape, p > 0)
        if kernels is None:
            return None
        both = [paper.seconds(side_kernels) for side_kernels in kernels]
    return both[: len(phases(shape))]


def _ours(times: Times) -> str | None:
    """The quickest of our routes; None: not measured."""
    sides = {side for side, _ in times if side in ROUTES}
    phase = BOTH if any(phase == BOTH for _, phase in times) else FORWARD
    medians = {side: quartiles(times[side, phase])[1] for side in sides if (side, phase) in times}
    return min(medians, key=lambda side: medians[side]) if medians else None


def _times(rows: Rows, shape: Shape, p: float, timing: str) -> Times:
    times: Times = {}
    sizes = tuple(map(str, shape))
    for row in rows:
        where = tuple(row[size] for size in Shape._fields)
        if where == sizes and float(row["dropout"]) == p and row["timing"] == timing:
            times.setdefault((row["side"], row["phase"]), []).append(float(row["seconds"]))
    return times


def errors(rows: Rows) -> str:
    """For each side the worst over the shapes."""
    tensors = list(dict.fromkeys(row["tensor"] for row in rows))
    lines = []
    for side in dict.fromkeys(row["side"] for row in rows):
        side_rows = [row for row in rows if row["side"] == side]
        worst = [max(float(r["error"]) for r in side_rows if r["tensor"] == t) for t in tensors]
        lines.append([side, *(f"{error:.2g}" for error in worst)])
    return grid(["", *tensors], lines)


def training_step(rows: Rows) -> str:
    """A line for each method and side."""
    lines = []
    for method, sides in step.SIDES.items():
        method_rows = [row for row in rows if row["method"] == method]
        times: Times = {(side, BOTH): _seconds(method_rows, side) for side in sides}
        peaks = {row["side"]: int(row["peak_bytes"]) for row in method_rows}
        best = _ours({key: seconds for key, seconds in times.items() if seconds})
        for side in sides:
            cells = [NOT] * 4
            if best and times[side, BOTH]:
                ratio, spread = _ratio(times[best, BOTH], times[side, BOTH])
                cells = [f"{1e3 * quartiles(times[side, BOTH])[1]:.3g} ms", f"{ratio} ({spread})"]
                cells += [f"{peaks[side] / 1e9:.3g} GB", f"{peaks[best] / peaks[side]:.2f}"]
            lines.append([f"{STEPS[method]}: {side}", *cells])
    return grid(["", "step", "ours / it", "peak memory", "ours / it"], lines)


def plot(folder: Path, path: Path) -> None:
    """Time against the floor, forward + backward (a decoding step forward alone), where measured:
    a point for each side and shape without dropout.
    """
    rows = _read(folder / "lora_linear_gpu.csv")[1]
    if not rows:
        return
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 6), layout="constrained")
    for side, marker in zip((*paper.SIDES, paper.FLOOR), ".ovs^Dx+*_1", strict=True):
        points = []
        for shape in GPU_SHAPES:
            times, phase = _times(rows, shape, 0.0, timings(shape)[-1]), phases(shape)[-1]
            if (side, phase) in times and (paper.FLOOR, phase) in times:
                least, median = (quartiles(times[s, phase])[1] for s in (paper.FLOOR, side))
                points.append((1e6 * least, median / least))
        if not points:
            continue
        line = "-" if side == paper.FLOOR else ""
        axis.plot(*zip(*sorted(points), strict=True), line, marker=marker, label=side, alpha=0.8)
    axis.set_xscale("log")
    axis.set_xlabel("floor, microseconds")
    axis.set_ylabel("time / floor")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(path)


def grid(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    head = [list(columns), ["---", *["---:"] * (len(columns) - 1)]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *lines))


def _groups() -> list[tuple[str, list[Shape], str]]:
    """Title, shapes, timing of each table."""
    few = [shape for shape in GPU_SHAPES if shape.M <= FEW]
    wide, narrow = (
        [s for s in GPU_SHAPES if s.M > FEW and (GRAPH in timings(s)) == graph]
        for graph in (False, True)
    )
    alone, captured = "one call after the other", "in a CUDA graph"
    return [
        (f"Wide layers, {alone}", wide, LAUNCHED),
        (f"Layers of GPT-Neo's width, {captured}", narrow, GRAPH),
        (f"Layers of GPT-Neo's width, {alone}", narrow, LAUNCHED),
        (f"A decoding step, {captured}", few, GRAPH),
        (f"A decoding step, {alone}", few, LAUNCHED),
    ]


def _read(path: Path) -> tuple[dict[str, str], Rows]:
    return read(path) if path.exists() else ({}, [])


def _machine(facts: Mapping[str, str]) -> str:
    return f"Measured on: {', '.join(f'{name} {value}' for name, value in facts.items())}."


def _seconds(rows: Rows, side: str, phase: str | None = None) -> list[float]:
    return [
        float(row["seconds"])
        for row in rows
        if row["side"] == side and (phase is None or row["phase"] == phase)
    ]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> list[str]:
    """Of the medians, and the quartiles of the rounds' ratios."""
    first, _, third = quartiles([a / b for a, b in zip(ours, theirs, strict=True)])
    return [f"{quartiles(ours)[1] / quartiles(theirs)[1]:.2f}", f"{first:.2f} to {third:.2f}"]


def _us(seconds: float) -> str:
    us = 1e6 * seconds
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"
