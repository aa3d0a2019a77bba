"""A study and its parts as processes: killed, stopped by signals, damaged, resumed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minigpt.settings import sealed
from minigpt.studies.lab import Lab, Part
from tests.minigpt.studies.test_studies import own_process, wrong

ROOT = Path(__file__).parents[3]
STEPS = 60


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    module = [sys.executable, "-m", "tests.minigpt.studies.tiny_study", "study", "tiny"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tools" / "path")])
    return subprocess.Popen(
        [*module, "--out", str(out), "--steps", str(STEPS), *more],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )


def rows(out: Path, part: str) -> list[dict[str, Any]]:
    metrics = out / "runs" / part / "metrics.jsonl"
    return [json.loads(row) for row in metrics.read_text().splitlines()]


def until(ready: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 100
    while not ready() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def lines(out: Path, part: str) -> int:
    metrics = out / "runs" / part / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with start(out) as study:
        _, errors = study.communicate(timeout=200)
    assert study.returncode == 0, errors
    return out


def assert_same(out: Path, want: Path) -> None:
    for part in "ab":
        assert [row["step"] for row in rows(out, part)] == [*range(1, STEPS + 1)]
        results = [sealed.read(f / "runs" / part / "result.json") for f in (out, want)]
        assert results[0] == results[1]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for the process in /proc")
def test_a_part_ends_with_its_study_and_the_next_study_goes_on(tmp_path: Path) -> None:
    long = ["--steps", "100000"]
    with start(tmp_path, *long) as study:
        until(lambda: lines(tmp_path, "a") >= 30, study)
        study.kill()
        child, end = int((tmp_path / "runs" / "a" / "pid").read_text()), time.monotonic() + 5
        while alive(child) and time.monotonic() < end:
            time.sleep(0.01)
        assert not alive(child)
    before = lines(tmp_path, "a")
    with start(tmp_path, *long, "--resume") as study:
        until(lambda: lines(tmp_path, "a") >= before + 30, study)
        study.terminate()
        _, errors = study.communicate(timeout=100)
    assert study.returncode == 130, errors
    assert [row["step"] for row in rows(tmp_path, "a")] == [*range(1, lines(tmp_path, "a") + 1)]


def signalled(out: Path, draw: random.Random) -> str:
    """Starts a study, signals it at a random moment; what is wrong with its end."""
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    send = draw.choice([os.kill, os.killpg])  # to it alone; to all, as Ctrl-C does
    with start(out, "--resume") as study:
        if draw.random() < 0.6:
            part, count = draw.choice("ab"), draw.randint(0, STEPS)
            until(lambda: lines(out, part) >= count, study)
        else:
            until(lambda: (out / "run.json").exists(), study)
        time.sleep(draw.uniform(0, 0.3))
        if study.poll() is not None:
            return "ended before"
        send(study.pid, number)
        _, errors = study.communicate(timeout=100)
    last = [line for line in errors.splitlines() if re.match(r"minigpt: .*interrupted", line)]
    said = [line for line in errors.splitlines() if not re.match(r"[ab]: step|minigpt: ", line)]
    if study.returncode == 130 and len(last) == 1 and not said:
        return ""
    if (out / "report.html").exists():  # the signal came after the last thing to do
        return "ended before"
    return f"{number.name} by {send.__name__}: {study.returncode}\n{errors}"


def signals(folder: Path, count: int, first: int = 0) -> tuple[list[str], list[Path]]:
    """The faults of many signalled studies, and the folders of `count` that were interrupted."""
    faults, stopped = [], []
    for seed in range(first, first + 4 * count):
        if len(stopped) == count:
            break
        out = folder / str(seed)
        fault = signalled(out, random.Random(seed))
        if not fault:
            stopped.append(out)
        elif fault != "ended before":
            faults.append(f"{seed} {fault}")
    return faults, stopped


def test_no_signal_is_lost(tmp_path: Path, undisturbed: Path) -> None:
    faults, stopped = signals(tmp_path, 2)
    assert not faults, "\n".join(faults)
    with start(stopped[-1], "--resume") as study:
        _, errors = study.communicate(timeout=200)
    assert study.returncode == 0, errors
    assert_same(stopped[-1], undisturbed)


@pytest.mark.slow
def test_no_signal_is_lost_of_many(tmp_path: Path) -> None:
    faults, stopped = signals(tmp_path, 30, first=100)
    assert not faults, "\n".join(faults)
    assert len(stopped) == 30


def test_a_damaged_result_is_computed_again(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = [Part("a", own_process, (1,)), Part("b", own_process, (2,))]
    results = Lab(tmp_path).run(parts)
    path = tmp_path / "runs" / "a" / "result.json"
    path.write_text(path.read_text().replace('"value": 1', '"value": 3'))
    (tmp_path / "runs" / "a" / "one").rmdir()
    assert Lab(tmp_path).run([parts[0], Part("b", wrong)]) == results
    assert f"{path} is damaged" in capfd.readouterr().err
