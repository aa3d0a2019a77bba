"""The ledger of claims, docs/claims.md, out of the results of the studies in docs/studies.

    python -m tools.claims

Each `results.json` there is what `minigpt study` wrote, with the settings and the machine.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from minigpt.studies import words
from minigpt.studies.claims import CLAIMS, SEEDS

DOCS = Path(__file__).parents[1] / "docs"
HEAD = f"""# Claims of the write-ups, measured

The claims of five published experiments (000 targeted freezing, 001 partial fine-tuning, 002
clipping and schedule, 003 overview of methods, 004 survey), beside the figures measured here.
`python -m tools.claims` writes this page from the results in `docs/studies`, each the output of one
command.

Intervals are 95 % confidence intervals. A claim *holds* if the interval excludes the alternative
and contains the quoted figure, *holds in direction* if it excludes the alternative but does not
contain that figure, *fails* if the interval lies on the other side of the alternative, and is
*undecided* otherwise or on fewer than {SEEDS} seeds. A count holds if it equals the quoted one, and
fails if not.
"""
COLUMNS = ("claim", "quoted", "measured", "verdict", "on", "note")
REMARKS = """
- `targeted-freezing-125m` and `partial-freezing-125m` start from random weights, those of
  `minigpt.save(minigpt.GPTNeo(minigpt.GPTNeoConfig()), ...)` with GPT-Neo's tokenizer beside them.
  They measure counts, times and memory, with small batches, where weights and the optimizer's state
  outweigh activations. Ignore their figures on popular tokens and forgetting: the weights were
  random.
- `clipping-and-schedule-minilm` and `peft-methods-minilm` learn from 800 reviews, cut to 96 and 128
  tokens. The latter gives every method 50 steps, at rates that no search has chosen: it compares
  the methods after these few steps.
- In `peft-methods-bundled` five of the ten methods end within 5 points of chance (a search over
  three rates for each found none better): its results on variance and cost mainly show that these
  methods barely learned on so small an encoder.
- In `lora-rank-bundled` fine-tuning on 1/16 of the text gains next to nothing, at any rank.
- In `qlora-bundled` a step of 16 reviews took more memory on 4 bits, though its tensors are
  smaller: glibc's heap does not find all freed blocks of aligned tensors again (its bug 14581). The
  study gives such blocks pages of their own since, and is to be run again: in one run a step then
  took 350 MB on 4 bits and 360 MB in float32. Its encoder learns at a rate that no search has
  chosen.
- The runs whose name ends in `smollm2` start from SmolLM2-135M-Instruct's weights of 4 bits, which
  train as float32. Their steps are few and their windows short, for a step takes seconds on this
  machine. Rates: the best on the other tale, at one seed, of 1e-4 and 3e-4 for full tuning and of
  1e-3, 3e-3 and 1e-2 for LoRA; targeted and partial freezing take full tuning's."""
TITLES = {
    "000": "Targeted freezing",
    "001": "Partial fine-tuning",
    "002": "Clipping and schedule",
    "003": "Overview of methods",
    "004": "Survey",
}

PRETRAINED = """## What only a pretrained decoder can tell

Random weights write no frequent words and have nothing to forget, and the bundled model has read
three texts. The claims about what a model knows, and loses, are held against each of the decoders
here:
"""
ABOUT = {
    "popular tokens": ("freezing.popular", "partial.own-set"),
    "forgetting": ("partial.forgetting",),
    "fall of the loss": ("freezing.loss-falls", "freezing.loss", "freezing.inverse-loss"),
    "quality against the rank": ("rank.plateau",),
}
DECODERS = ("gpt-neo-125m-random", "bundled", "smollm2")


def ledger() -> str:
    """The page."""
    runs = sorted((path.parent.name, load(path)) for path in DOCS.glob("studies/*/results.json"))
    lines = [HEAD]
    for source, title in TITLES.items():
        lines += [f"## {source}: {title}", ""]
        lines += [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
        for key, claim in CLAIMS.items():
            if claim.source != source:
                continue
            rows = findings(runs, key)
            if not rows:
                verdict = "cannot be tested here" if claim.why else "undecided"
                rows = [["not measured", verdict, "", claim.why]]
            for i, cells in enumerate(rows):
                begin = [claim.text, claim.quoted] if i == 0 else ["", ""]
                lines.append("| " + " | ".join(cell(c) for c in [*begin, *cells]) + " |")
        lines.append("")
    lines += [PRETRAINED, *pretrained(runs), ""]
    lines += ["## The runs", "", "| run | command | machine |", "|---|---|---|"]
    for name, results in runs:
        report = f"[{name}](studies/{name}/report.html)"
        machine = "; ".join(results["machine"].values())
        lines.append(f"| {report} | `{command(results)}` | {cell(machine)} |")
    return "\n".join([*lines, REMARKS]) + "\n"


def findings(runs: list[tuple[str, Any]], key: str) -> list[list[str]]:
    """Measured, verdict, on, note: of every run that says something about the claim; what several
    say alike, such as a count, once.
    """
    reports: dict[tuple[str, str, str, str], list[str]] = {}
    for name, results in runs:
        for f in results["findings"]:
            if f["claim"] == key:
                cells = (f["measured"], f["verdict"], f["on"], f["note"])
                reports.setdefault(cells, []).append(f"[{name}](studies/{name}/report.html)")
    return [
        [measured, verdict, f"{on} ({', '.join(where)})", note]
        for (measured, verdict, on, note), where in reports.items()
    ]


def pretrained(runs: list[tuple[str, Any]]) -> list[str]:
    """The claims of ABOUT beside every decoder, then the answers of those from a .gguf file."""

    def name(results: Any) -> str:
        return words.name(results["settings"].get("model", ""))

    models = {m: [r for _, r in runs if name(r) == m] for m in DECODERS}
    models = {m: results for m, results in models.items() if results}
    heads = [
        words.model_name(m, words.weights(results[0]["parts"])) for m, results in models.items()
    ]
    lines = [f"| about | claim | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for about, keys in ABOUT.items():
        for key in keys:
            cells = [about, CLAIMS[key].text, *(said(results, key) for results in models.values())]
            lines.append("| " + " | ".join(map(cell, cells)) + " |")
    for run, results in runs:
        if words.weights(results["parts"]):
            answer = " ".join(results["answer"])
            lines += ["", f"[{results['title']}](studies/{run}/report.html): {answer}"]
    return lines


def said(studies: list[Any], key: str) -> str:
    """What studies of one model measured about a claim, with the verdict."""
    about = [f for results in studies for f in results["findings"] if f["claim"] == key]
    return "; ".join(f"{f['measured']}: *{f['verdict']}*" for f in about)


def command(results: Any) -> str:
    """The command that made the results: every setting that is not a default."""
    from minigpt.studies import study

    defaults = study(results["study"]).Settings()
    words = [f"minigpt study {results['study']}"]
    for name, value in results["settings"].items():
        if value != getattr(defaults, name, None):
            flag = f"--{name.replace('_', '-')}"
            values = value if isinstance(value, list) else [value]
            words += [flag] if value is True else [flag, *map(str, values)]
    return " ".join(words)


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    argparse.ArgumentParser(prog="python -m tools.claims").parse_args()
    page = DOCS / "claims.md"
    changed = not page.exists() or page.read_text() != ledger()
    page.write_text(ledger())
    print(f"claims.md: {'rewritten' if changed else 'as it was'}", file=sys.stderr)


if __name__ == "__main__":
    main()
