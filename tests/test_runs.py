"""The runs that docs/ quotes: what the pages say follows from the summaries in docs/runs."""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from minigpt.metrics.intervals import mean

DOCS = Path(__file__).parents[1] / "docs"
SEEDS = range(5)


def summary(run: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((DOCS / "runs" / run / "summary.json").read_text())
    return read


def rows(page: str) -> dict[str, list[str]]:
    """Of all tables of a page: first cell -> the others."""
    lines = [line for line in (DOCS / page).read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("path", sorted((DOCS / "runs").rglob("*.*")), ids=lambda p: p.parent.name)
def test_a_run_names_no_place_of_the_machine_that_made_it(path: Path) -> None:
    text = path.read_text()
    for place in ("/home", "/root", "/tmp", "/Users", str(Path.cwd().parent)):
        assert f'"{place}' not in text


def test_answers_to_instructions() -> None:
    shown, run = rows("smollm2.md"), summary("smollm2-instructions")
    losses = [f"{run[f'heldout_loss_{moment}']:.3f}" for moment in ("before", "after")]
    assert shown["loss, nats a token"] == losses
    scored = [summary(f"smollm2-instructions-{moment}") for moment in ("before", "after")]
    for kind in ("1", "2", "L"):
        f = [s["rouge"][f"rouge{kind}"]["f"] for s in scored]
        words = [f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]" for e in f]
        assert shown[f"ROUGE-{kind}, F"] == words
    assert shown["answers cut at 48 tokens"] == [str(s["predictions_cut"]) for s in scored]


def test_polite_answers() -> None:
    shown, run = rows("smollm2.md"), summary("smollm2-polite")
    moments = ("before", "after")
    assert shown["loss of DPO, beta 0.1"] == [f"{run[f'heldout_loss_{m}']:.3f}" for m in moments]
    shares = [f"{100 * run[f'preference_accuracy_{m}']:.1f} %" for m in moments]
    assert shown["polite answers with the higher score"] == shares


def test_five_runs_of_grpo() -> None:
    shown = rows("align.md")
    runs = [summary(f"bundled-brief-{seed}") for seed in SEEDS]
    assert {run["config"]["seed"] for run in runs} == {*SEEDS}
    before, after = ([run[f"reward_{m}"] for run in runs] for m in ("before", "after"))
    gain = mean([b - a for a, b in zip(before, after, strict=True)])
    assert gain.low > 0
    for name, values in (("reward before", before), ("reward after", after)):
        assert shown[name] == [
            f"{mean(values).value:.3f} [{mean(values).low:.3f}, {mean(values).high:.3f}]"
        ]
    assert shown["gain"] == [f"{gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}]"]
    assert shown["divergence, nats"] == [f"{fmean(run['kl'] for run in runs):.1f}"]
    for name, key in (
        ("length before, tokens", "length_before"),
        ("length after, tokens", "length"),
    ):
        assert shown[name] == [f"{fmean(run[key] for run in runs):.1f}"]
