"""The output of a study: `results.json`, `figures/*.png` and `report.html`, one page with the
answer, then verdicts, figures, tables and the setting.
"""

import base64
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import minigpt
from minigpt.studies.claims import SEEDS, Finding
from minigpt.studies.words import weights
from peft_lite import storage

Name = TypeVar("Name")
TEMPLATE = Path(__file__).parent / "report.html.j2"


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def table(
    title: str,
    head: str,
    names: Iterable[Name],
    columns: Mapping[str, Callable[[Name], str]],
    note: str = "",
) -> Table:
    """A table with a row for each name.

    Args:
        head: what the names are.
        columns: title of a column -> its cell in the row of a name.
    """
    rows = [[str(name), *(cell(name) for cell in columns.values())] for name in names]
    return Table(title, [head, *columns], rows, note)


@dataclass(frozen=True)
class Figure:
    """A picture, `file` in OUT/figures, and its caption."""

    file: str
    caption: str


@dataclass(frozen=True)
class Report:
    """The text of a report.

    Attributes:
        answer: three sentences.
        numbers: further figures for `results.json`.
    """

    title: str
    answer: Sequence[str]
    tables: Sequence[Table]
    findings: Sequence[Finding]
    numbers: Mapping[str, Any] = field(default_factory=dict)


def write(
    out: Path,
    study: str,
    settings: Any,
    report: Report,
    figures: Sequence[Figure],
    parts: Mapping[str, Mapping[str, Any]],
) -> None:
    """Writes `results.json` and `report.html`, each whole or not at all."""
    from jinja2 import Environment, StrictUndefined

    content = results(study, settings, report, parts)
    storage.write_json(out / "results.json", content)
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    setting = {**content["settings"], **content["machine"]}
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=content["title"],
        report=report,
        figures=figures,
        findings=content["findings"],
        seeds=SEEDS,
        pictures={
            figure.file: base64.b64encode((out / "figures" / figure.file).read_bytes()).decode()
            for figure in figures
        },
        setting={key: value for key, value in setting.items() if value is not None},
    )
    storage.write_text(out / "report.html", page)


def results(
    study: str, settings: Any, report: Report, parts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of `results.json`."""
    label = weights(parts)
    return {
        "study": study,
        "title": f"{report.title} ({label})" if label else report.title,
        "answer": list(report.answer),
        "settings": asdict(settings),
        "machine": machine(),
        "findings": [finding.row() for finding in report.findings],
        "tables": [asdict(table) for table in report.tables],
        "numbers": dict(report.numbers),
        "parts": dict(parts),
    }


def machine() -> dict[str, str]:
    """Processor and versions, which times and memory depend on besides the settings."""
    facts = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"minigpt {minigpt.__version__}",
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
