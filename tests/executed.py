"""Which tests execute which lines of the three packages, and how long each takes.

    python -m tests.executed                     all tests: about half an hour
    python -m tests.executed tests/peft_lite     those of a folder or file alone, again

They run under the library coverage, with a context for each test and for each fixture that several
tests share.  `tests.mutants --random` reads what is recorded, in `.mutants/executed`.
"""

import argparse
import ast
import hashlib
import json
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.random_mutants import FOLDERS, ROOT, Change, files, related

RECORDS = ROOT / ".mutants" / "executed"
ENOUGH = 240.0  # seconds of tests for one change
DEAR = 1.0  # seconds of a test that comes after the others


class Recorder:
    """A plugin of pytest: the contexts, and the seconds of each test."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.contexts = [""]
        self.seconds: dict[str, float] = {}
        self.fixtures: dict[str, list[str]] = {}

    @contextmanager
    def context(self, name: str) -> Iterator[None]:
        self.contexts.append(name)
        self.coverage.switch_context(name)
        try:
            yield
        finally:
            self.contexts.pop()
            self.coverage.switch_context(self.contexts[-1])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Function) -> Generator[None, object, object]:
        definitions = item._fixtureinfo.name2fixturedefs.values()
        self.fixtures[item.nodeid] = [shared(d) for ds in definitions for d in ds if shared(d)]
        with self.context(item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any]
    ) -> Generator[None, object, object]:
        with self.context(shared(fixturedef) or self.contexts[-1]):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration


def shared(fixture: pytest.FixtureDef[Any]) -> str:
    """The context of a fixture that several tests share; of one for each test "", the test's."""
    return "" if fixture.scope == "function" else f"{fixture.baseid} fixture {fixture.argname}"


def record(tests: str) -> int:
    """Runs the tests of a file or folder; pytest's exit status."""
    from coverage import Coverage

    RECORDS.mkdir(parents=True, exist_ok=True)
    path = RECORDS / tests.strip("/").replace("/", ".")
    sources = [str(ROOT / folder) for folder in FOLDERS]
    coverage = Coverage(path, config_file=False, source=sources, messages=False)
    coverage.erase()
    recorder = Recorder(coverage)
    coverage.start()
    status = pytest.main(["-q", "--durations=40", tests], plugins=[recorder])
    coverage.stop()
    coverage.save()
    tables = {"seconds": recorder.seconds, "fixtures": recorder.fixtures, "texts": texts()}
    path.with_name(path.name + ".json").write_text(json.dumps(tables))
    return int(status)


def texts() -> dict[str, str]:
    """A digest of every module, whose lines a record counts."""
    return {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest() for file in files()}


def executing(change: Change) -> list[str]:
    """The tests that execute a changed statement: first the files for its module, then those that
    take the least time, and dear tests last; as many as fit in ENOUGH seconds.
    """
    seconds: dict[str, float] = {}
    for path in sorted(RECORDS.glob("*.json")):
        tables = json.loads(path.read_text())
        names = contexts(path.with_suffix(""), change, tables["texts"])
        seconds |= {
            test: tables["seconds"][test]
            for test, fixtures in tables["fixtures"].items()
            if not names.isdisjoint([test, *fixtures])
        }
    of_file: dict[str, float] = {}
    for test, time in seconds.items():
        of_file[file_of(test)] = of_file.get(file_of(test), 0.0) + time
    likely = related(change.file)[:2]

    def rank(test: str) -> tuple[bool, bool, float]:
        file = file_of(test)
        return seconds[test] > DEAR, file not in likely, of_file[file]

    total, chosen = 0.0, []
    for test in sorted(seconds, key=rank):
        total += seconds[test]
        if total <= ENOUGH or not chosen:
            chosen.append(test)
    return chosen


def contexts(record: Path, change: Change, texts: dict[str, str]) -> set[str]:
    """The contexts of a record in which a changed statement runs; where it is outside functions, or
    the file was another, those in which any line of the file does.
    """
    from coverage import CoverageData

    data = CoverageData(str(record))
    data.read()
    source = (ROOT / change.file).read_bytes()
    lines = statement(source.decode(), change.line)
    if texts.get(change.file) != hashlib.sha256(source).hexdigest():
        lines = None
    names = data.contexts_by_lineno(str(ROOT / change.file))
    return {name for line, of in names.items() if not lines or line in lines for name in of} - {""}


def statement(source: str, line: int) -> range | None:
    """The lines whose execution shows that a line runs: those of its statement, but for statements
    inside it; of a function's head the whole function; None outside functions.
    """
    within: list[ast.stmt] = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]  # from the outermost to the innermost
    if not any(isinstance(node, ast.FunctionDef) for node in within):
        return None
    inner = within[-1]
    end = inner.end_lineno or inner.lineno
    if isinstance(inner, ast.FunctionDef):
        return range(inner.lineno, end + 1)
    parts = [node for node in ast.walk(inner) if isinstance(node, ast.stmt) and node is not inner]
    before = [node.end_lineno or 0 for node in parts if (node.end_lineno or 0) < line]
    after = [node.lineno for node in parts if node.lineno > line]
    return range(max([inner.lineno, *(e + 1 for e in before)]), min([end + 1, *after]))


def file_of(test: str) -> str:
    """The file of a test's id."""
    return test.partition("::")[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tests", nargs="?", default="tests", help="a file or folder of tests")
    return record(parser.parse_args().tests)


if __name__ == "__main__":
    sys.exit(main())
