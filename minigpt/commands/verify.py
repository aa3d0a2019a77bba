"""`minigpt verify OUT`: whether every file of a run, complete or not, is as it was written."""

import json
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt.settings import manifest, runs, sealed
from minigpt.settings.lock import LOCK, owned
from minigpt.training import snapshot
from minigpt.training.record import check_rows

Check = tuple[str, str]  # what is looked at, and what is wrong with it


def checks(out: Path) -> Iterator[Check]:
    """Each file of a run with its fault, "" for none."""
    yield from _record(out)
    for metrics in sorted(out.rglob("metrics.jsonl")):
        yield str(metrics), _rows(metrics)
    for folder in sorted(out.rglob("snapshots")):
        for file in snapshot.files(folder):
            yield str(file), _snapshot(file)
    for path in sorted(out.glob("runs/**/result.json")):
        yield str(path), _fault(sealed.read, path)
    if (out / "summary.json").exists():
        yield from _summary(out)


def _record(out: Path) -> Iterator[Check]:
    """run.json, and the files that the run reads, where they still are."""
    fault = _fault(runs.read, out)
    yield str(out / "run.json"), fault
    if not fault:
        for name, files in runs.read(out)["inputs"].items():
            for file, sha256 in files.items():
                if Path(file).exists():
                    yield f"{file}, the {name}", _changed(Path(file), sha256)


def _summary(out: Path) -> Iterator[Check]:
    """summary.json, and the files of the result."""
    path = out / "summary.json"
    fault = _fault(sealed.read, path)
    yield str(path), fault
    if not fault:
        for name, sha256 in sealed.read(path)["files"].items():
            yield str(out / name), _changed(out / name, sha256)


def _changed(path: Path, sha256: str) -> str:
    if not path.exists():
        return "it is missing"
    return "" if manifest.sha256(path) == sha256 else "its SHA-256 is another"


def _rows(metrics: Path) -> str:
    """Whether the rows count the steps; the last may have been torn by a kill."""
    for i, line in enumerate(metrics.read_bytes().splitlines(keepends=True), 1):
        try:
            step = json.loads(line)["step"]
        except (ValueError, TypeError, KeyError):
            step = None
        if step != i and line.endswith(b"\n"):
            return f"row {i} is not that of step {i}"
    return ""


def _snapshot(file: Path) -> str:
    """Whether a snapshot is whole, and the rows of metrics are those it knows of."""
    try:
        state, _ = snapshot.read(file)
        check_rows(file.parents[1] / "metrics.jsonl", state)
    except ValueError as error:
        return str(error)
    return ""


def _fault(read: Any, path: Path) -> str:
    try:
        read(path)
    except ValueError as error:
        return str(error)
    return ""


class Verify:
    """The command: one line for each file; the exit status is 1 where one is damaged."""

    def add_to(self, parser: ArgumentParser) -> None:
        parser.add_argument("out", type=Path, metavar="OUT", help="folder of a run")

    def execute(self, name: str, given: dict[str, Any]) -> int:
        out: Path = given["out"]
        if not (out / "run.json").exists():
            raise ValueError(f"{out} holds no run: there is no {out / 'run.json'}")
        if (out / LOCK).exists():  # the process that left it may be dead
            with owned(out):
                pass
        faults: dict[str, str] = {}
        for file, fault in checks(out):
            faults[file] = faults.get(file) or fault
        for file, fault in faults.items():
            print(f"{'FAULT' if fault else 'ok':6}{file}{f': {fault}' if fault else ''}")
        complete = "complete" if (out / "summary.json").exists() else "not complete"
        sound = not any(faults.values())
        print(f"the run in {out} is {complete}, and {'sound' if sound else 'damaged'}")
        return 0 if sound else 1


COMMAND = Verify()
