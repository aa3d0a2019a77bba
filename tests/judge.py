"""The first test that fails with a change in the code.

The tests run in a copy of the code, in a process forked from this one, which has imported the
libraries: that takes longer than most tests.
"""

import importlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ("kernels", "minigpt", "peft_lite", "tests", "tools")
OURS = {"benchmarks", "minigpt", "minigpt_kernels", "peft_lite", "tests", "tools"}
LIBRARIES = ("torch", "transformers", "peft", "scipy.stats")
QUICK = "tests/minigpt/metrics/test_metrics.py"
LIMIT = 600.0  # seconds for the tests of one change
TIMEOUT = 60  # seconds for one test
MEMORY = 8 * 2**30  # bytes more than the libraries take


def prepare() -> None:
    """Imports the libraries, for kernels that are interpreted, and sees that tests run at all."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    for library in LIBRARIES:
        importlib.import_module(library)
    if failure := first_failure("pyproject.toml", (ROOT / "pyproject.toml").read_text(), [QUICK]):
        raise SystemExit(f"{failure} fails in the code as it is")


def first_failure(file: str, text: str, tests: Sequence[str], limit: float = LIMIT) -> str | None:
    """The first test that fails with another text in a file of a copy of the code.

    Args:
        tests: files, or ids of tests, in the order in which they run.

    Raises:
        TimeoutError: none has failed within `limit` seconds.
        RuntimeError: no test ran.
    """
    forked = get_context("fork")
    with TemporaryDirectory() as name:
        log = Path(name, "log")
        folder = copied(Path(name, "code"), file, text)
        Path(name, "shared").symlink_to(ROOT.parent / "shared")  # real data, if any
        receiver, sender = forked.Pipe(duplex=False)
        process = forked.Process(target=run, args=(folder, tests, log, sender))
        process.start()
        sender.close()
        try:
            return told(receiver, time.monotonic() + limit)
        except RuntimeError as error:
            raise RuntimeError(f"{file}: {error}\n{log.read_text()[-2000:]}") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # and what the tests have started
            process.join()


def copied(folder: Path, file: str, text: str) -> Path:
    """A copy of the code with another text in a file; what is only read are links."""
    folder.mkdir()
    for path in ROOT.glob("[!.]*"):
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name, symlinks=True)
        else:
            (folder / path.name).symlink_to(path)
    (folder / file).unlink()  # a link, or a copy
    (folder / file).write_text(text)
    return folder


def run(folder: Path, tests: Sequence[str], log: Path, sender: Connection) -> None:
    """Runs the tests in the copy and sends what happens."""
    import resource

    os.setsid()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
    printed = os.open(log, os.O_CREAT | os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(printed, descriptor)
    paths = [str(folder), str(folder / "tools" / "path")]
    ours = (ROOT, ROOT / "tools" / "path")
    sys.path[:] = [*paths, *(p for p in sys.path if Path(p).absolute() not in ours)]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        del sys.modules[name]
    files = dict.fromkeys(test.partition("::")[0] for test in tests)
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # before pytest could rewrite it
    options = ["-xq", "-p", "no:cacheprovider", f"--timeout={TIMEOUT}", "-W", imported]
    status = pytest.main([*options, *files], plugins=[Chosen(tests, sender)])
    sender.send(("ends", int(status)))


class Chosen:
    """A plugin of pytest: the chosen tests run in their order; the name of each is sent before it
    runs, and when it fails.
    """

    def __init__(self, tests: Sequence[str], sender: Connection) -> None:
        self.places = {test: i for i, test in enumerate(tests)}
        self.sender = sender

    def place(self, test: str) -> int:
        """Where it stands among the chosen, by itself or with its file; -1: it is not chosen."""
        return self.places.get(test, self.places.get(test.partition("::")[0], -1))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if self.place(item.nodeid) >= 0]
        items[:] = sorted(chosen, key=lambda item: self.place(item.nodeid))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.sender.send(("runs", nodeid))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.sender.send(("fails", report.nodeid))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.sender.send(("fails", report.nodeid))


def told(receiver: Connection, end: float) -> str | None:
    """The test that fails, or ends the process; None: all pass."""
    test = "tests/conftest.py"  # it imports the packages before any test
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            event, value = receiver.recv()
        except EOFError:
            return test
        if event == "fails":
            return str(value)
        if event == "runs":
            test = str(value)
        elif value == pytest.ExitCode.OK:
            return None
        elif value == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise RuntimeError("no test ran")
        else:
            return test
    raise TimeoutError


@cache
def fails_unchanged(test: str) -> bool:
    """Whether a test fails in the code as it is, so that it tells nothing about a change."""
    unchanged = "pyproject.toml"
    try:
        return first_failure(unchanged, (ROOT / unchanged).read_text(), [test]) is not None
    except TimeoutError:
        return True
