"""The published experiments, one readable file each, and their claims put to the test.

    minigpt study NAME --out DIR

A study is a module that reads from top to bottom:

    Settings                      its settings
    PUBLISHED, SOURCES            those of the write-up, and its model and texts, to be given
    parts(settings)               what is run, each part in a process of its own
    measure(settings, results)    the measured quantities behind the claims
    report(measured)              the answer, tables and verdicts
    draw(measured, figures)       the figures
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from minigpt.checkpoints.source import find
from minigpt.data import labelled
from minigpt.data.conversations import rows_file
from minigpt.data.tales import text_file
from minigpt.settings import runs
from minigpt.settings.checks import check_installed
from minigpt.settings.manifest import model_files
from minigpt.studies import report as reports
from minigpt.studies.figures import Figures
from minigpt.studies.lab import Lab, Part, Result
from minigpt.studies.words import enough, weights

STUDIES: Mapping[str, str] = {
    "targeted-freezing": "000: train query, key, value of the upper blocks, or all but them",
    "partial-freezing": "001: attention and embeddings frozen; cost, forgetting, popular tokens",
    "clipping-and-schedule": "002: an encoder with freezing, clipping and a schedule",
    "peft-methods": "003: what each method costs and what it gives, on an encoder",
    "lora-rank": "004: quality of a decoder against the rank of LoRA and the size of the text",
    "qlora": "004: LoRA on weights of 4 bits: what they cost and save, a decoder and an encoder",
    "three-ways": "004: self-supervised, supervised, by reinforcement; judged by ROUGE",
    "rl-by-enumeration": "004: objectives of reinforcement where every completion can be counted",
}


class Study(Protocol):
    """What the module of a study holds."""

    TITLE: str
    PUBLISHED: Mapping[str, Any]
    SOURCES: Mapping[str, str]
    Settings: type

    def parts(self, settings: Any) -> Sequence[Part]: ...

    def measure(self, settings: Any, results: Mapping[str, Result]) -> Any: ...

    def report(self, measured: Any) -> reports.Report: ...

    def draw(self, measured: Any, figures: Figures) -> None: ...


def study(name: str) -> Study:
    """The module of a study."""
    module: Any = import_module(f"minigpt.studies.{name.replace('-', '_')}")
    return module


def published(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, and the write-up's settings for the rest.

    Raises:
        ValueError: a model or text is not given; what the write-up used is not fetched unasked.
    """
    module = study(name)
    if lacking := [source for source in module.SOURCES if source not in given]:
        flags = " ".join(f"--{source}" for source in lacking)
        used = ", ".join(module.SOURCES[source] for source in lacking)
        raise ValueError(f"--published needs {flags} too; the write-up has {used}")
    return {**module.PUBLISHED, **given}


def command(name: str) -> tuple[type, Callable[[Any, Path, bool], dict[str, object]]]:
    """The settings of a study, and what runs it."""
    return study(name).Settings, partial(_run, name)


def _run(name: str, settings: Any, out: Path, resume: bool) -> dict[str, object]:
    """Runs a study, or what is left of it.  Returns its summary."""
    check_installed("matplotlib", "jinja2", "scipy")
    module = study(name)
    todo = module.parts(settings)
    runs.claim(out, f"study {name}", settings, _inputs(settings))
    results = Lab(out).run(todo)
    measured = module.measure(settings, results)
    report = module.report(measured)
    figures = Figures(out / "figures", weights(results))
    module.draw(measured, figures)
    reports.write(out, name, settings, report, figures.drawn, results)
    seeds = enough(settings.seeds, "seed")
    summary: dict[str, object] = {"study": name, "parts": len(todo), "seeds": seeds}
    summary |= {f"claim {finding.claim}": finding.verdict for finding in report.findings}
    runs.complete(out, summary)
    return summary


def _inputs(settings: Any) -> dict[str, list[Path]]:
    """The files that a study reads: of its model, its texts and its labelled texts."""
    given = vars(settings)
    source = given.get("model")
    inputs = model_files(find(source)) if source else {}
    for model in ("encoder", "memory_model"):
        if source := given.get(model):
            files = model_files(find(source)).items()
            inputs |= {f"{name} of {model}": paths for name, paths in files}
    for name in ("text", "text2", "pretraining_text"):
        if source := given.get(name):
            inputs[name] = [text_file(source)]
    if source := given.get("chat"):
        inputs["rows"] = [rows_file(source)]
    if data := given.get("data"):
        folder = labelled.BUNDLED if data == "bundled" else Path(data)
        inputs["data"] = sorted([*folder.glob("train.*"), *folder.glob("test.*")])
    return inputs
