"""The tables of docs/plan.md: what `minigpt plan` computes for three sizes, and, where it has been
measured, a plan beside a run.

    python -m tools.plans            rewrites the tables
    python -m tools.plans --check    says whether they are as the code computes them
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.common import RESULTS, read
from benchmarks.figures import measured_on
from benchmarks.plan import worst
from minigpt.models.architecture import Model
from minigpt.models.architectures import ARCHITECTURES
from minigpt.plan import speed
from minigpt.plan.plan import Step, prepared
from minigpt.settings.methods import MethodOptions

PAGE = Path(__file__).parents[1] / "docs" / "plan.md"
BEGIN, END = "<!-- {}:begin -->", "<!-- {}:end -->"
CARD = "h100"
COLUMNS = (
    *("model", "method", "GPUs", "weights", "gradients", "state", "activations", "more"),
    *("in all", "fits", "FLOPs", "step", "tokens/s"),
)


@dataclass(frozen=True)
class Size:
    """A model of the table: its architecture, its shapes, a micro-batch."""

    kind: str
    batch: int
    length: int
    shapes: dict[str, object]

    def outline(self) -> Model:
        """The model without values."""
        architecture = ARCHITECTURES[self.kind]
        return architecture.outline(architecture.config(**self.shapes), "causal-lm")


SIZES = {
    "125M": Size("gpt_neo", 8, 1024, {}),
    "7B": Size("llama", 1, 2048, {"max_position_embeddings": 4096}),
    "70B": Size(
        "llama",
        1,
        2048,
        {
            "max_position_embeddings": 4096,
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
}
METHODS = {
    "full": (MethodOptions(method="full"), "float32", None),
    "LoRA, r 16": (MethodOptions(method="lora", target=["all-linear"], rank=16), "bfloat16", None),
    "QLoRA, r 16": (
        MethodOptions(method="lora", target=["all-linear"], rank=16),
        "bfloat16",
        "nf4",
    ),
}
SHARED = (("none", 1), ("ddp", 8), ("fsdp", 8))


def rows(name: str, method: str) -> list[list[str]]:
    """The lines of a size and a method, alone and on eight GPUs."""
    size = SIZES[name]
    options, dtype, quantize = METHODS[method]
    plan = prepared(size.outline(), options, dtype, quantize, checkpointed=True)
    alone = Step(
        batch_size=size.batch,
        sequence_length=size.length,
        bf16=dtype == "float32",
    )
    traced = plan.trace(alone)
    lines = []
    for parallel, W in SHARED:
        step = replace(alone, parallel=parallel, processes=W)
        parts = plan.memory(step, traced, None)
        work = plan.work(step, traced)
        gpu = speed.GPUS[CARD]
        seconds = sum(speed.published(work, gpu).values())
        flops = sum(n * speed.flops(op) for op, n in traced.operations.items())
        total = sum(parts.values())
        named = [
            parts["weights"] + parts["adapters"],
            parts["gradients"],
            parts["optimizer state"],
            parts["activations"],
        ]
        cells = [gigabytes(value) for value in (*named, total - sum(named), total)]
        tokens = W * step.tokens / seconds
        lines.append(
            [
                *(name, method, "1" if W == 1 else f"{W}, {parallel}"),
                *cells,
                "yes" if total <= gpu.memory else "no",
                *(f"{flops:.3g}", f"{seconds:.3g} s", f"{tokens:,.0f}"),
            ]
        )
    return lines


def gigabytes(size: int) -> str:
    """To three digits, and a thousandth at most."""
    return f"{size / 1e9:.3g}" if size >= 1e6 else "0.001" if size >= 5e5 else "0"


def computed(names: tuple[str, ...] = tuple(SIZES)) -> str:
    """The table of sizes, as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "| --- | --- |" + " ---: |" * (len(COLUMNS) - 2)]
    for name in names:
        for method in METHODS:
            lines += ["| " + " | ".join(cells) + " |" for cells in rows(name, method)]
    return "\n".join(lines)


def measured() -> str:
    """A plan beside a run, case by case, as Markdown."""
    path = RESULTS / "plan.csv"
    if not path.exists():
        return "Not measured yet: `python -m benchmarks.plan` does."
    facts, cases = read(path)
    return f"{measured_on(facts)}\n\n{comparison(cases)}"


def comparison(cases: list[dict[str, str]]) -> str:
    """The lines of a result file, and the worst of them."""
    lines = [
        "| case | memory planned | measured | error | step planned | measured | error |",
        "| --- |" + " ---: |" * 6,
    ]
    for row in cases:
        said, was = (int(float(row[c])) / 1e9 for c in ("predicted_bytes", "peak_bytes"))
        cells = [row["case"], f"{said:.3g} GB", f"{was:.3g} GB"]
        cells.append(f"{float(row['memory_error']):+.1%}")
        cells += [f"{float(row[c]):.3g} s" for c in ("predicted_seconds", "seconds")]
        lines.append("| " + " | ".join([*cells, f"{float(row['time_error']):+.1%}"]) + " |")
    return "\n".join([*lines, "", worst(cases).replace("\n", "\n\n")])


TABLES: dict[str, Callable[[], str]] = {"computed": computed, "measured": measured}


def drawn(page: str, tables: dict[str, Callable[[], str]] = TABLES) -> str:
    """The page with these tables anew."""
    for name, table in tables.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        page = f"{before}{begin}\n{table()}\n{end}{after}"
    return page


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    given = parser.parse_args(arguments)
    page = PAGE.read_text(encoding="utf-8")
    new = drawn(page)
    if given.check:
        print("as computed" if new == page else "not as computed: run python -m tools.plans")
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
