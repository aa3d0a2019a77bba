"""What keeps the benchmarks' results and processes together; no time is measured here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.common import fresh, read, write, write_each
from benchmarks.tables import clip_and_update, every_step, training_step

ROOT = Path(__file__).parents[2]


def rows(method: str) -> list[dict[str, object]]:
    return [{"method": method, "seconds": 1.5}]


def broken() -> list[dict[str, object]]:
    raise ValueError("no memory left")


def test_one_failure_loses_nothing_of_the_others(tmp_path: Path, capfd) -> None:
    path = tmp_path / "memory.csv"
    measures = {"a": lambda: rows("a"), "b": broken, "c": lambda: rows("c")}
    with pytest.raises(SystemExit, match="b") as end:
        write_each(path, 2, measures)
    assert end.value.code not in (None, 0)
    assert [row["method"] for row in read(path)[1]] == ["a", "c"]
    assert "no memory left" in capfd.readouterr().err


def test_rows_are_on_disk_as_soon_as_they_are_measured(tmp_path: Path) -> None:
    path, seen = tmp_path / "memory.csv", []

    def second() -> list[dict[str, object]]:
        seen.extend(read(path)[1])
        return rows("b")

    write_each(path, 2, {"a": lambda: rows("a"), "b": second})
    assert seen == [{"method": "a", "seconds": "1.5"}]
    assert len(read(path)[1]) == 2


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    write(path, 2, rows("a"))
    before = path.read_text()
    with pytest.raises(ValueError, match="fieldnames"):
        write(path, 2, [*rows("b"), {"another": 1}])
    assert path.read_text() == before


def updates(path: Path, kinds: tuple[str, ...]) -> None:
    """A result file of two rounds: ours takes 2 and 3, fused 4 and 4, foreach 8 and 8 ms."""
    milliseconds = {"clip + foreach": (8, 8), "clip + fused": (4, 4), "ours": (2, 3)}
    measured = [
        {"set": "48 x 8K", "side": side, "time": kind, "round": i, "seconds": ms[i] / 1e3}
        for kind in kinds
        for i in (0, 1)
        for side, ms in milliseconds.items()
    ]
    write(path, 2, measured)


def test_a_table_of_the_update_compares_with_the_quickest_side(tmp_path: Path) -> None:
    updates(tmp_path / "clipped_update_cpu.csv", ("wall",))
    text = clip_and_update(tmp_path)
    assert "| 48 x 8K | 8 ms | 4 ms | 2.5 ms | 0.62 | 0.56 to 0.69 |" in text
    assert "Not measured on a GPU yet" in text
    assert "| 48 x 64K | 23.4 us | 29.3 us | 67.3 us |" in text  # 64 K x 48 x 32 bytes / 4.3 TB/s
    updates(tmp_path / "clipped_update_gpu.csv", ("wall", "device"))
    text = clip_and_update(tmp_path)
    assert text.count("| 48 x 8K | 8 ms |") == 3
    assert "Not measured" not in text


def test_a_fresh_process_has_its_result_its_error_and_its_threads() -> None:
    assert fresh(3, os.getenv, "OMP_NUM_THREADS") == "3"
    assert fresh(1, os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        fresh(1, int, "x")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_benchmark(tmp_path: Path, number: int) -> None:
    noted = tmp_path / "pid"
    child = f"import os, time\nopen({str(noted)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)"
    program = f"from benchmarks.common import fresh\nfresh(1, exec, {child!r})"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as parent:
        until(lambda: noted.exists() and noted.read_text() != "")
        pid = int(noted.read_text())
        assert alive(pid)
        parent.send_signal(number)
    until(lambda: not alive(pid))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.05)


def test_ours_is_compared_with_the_quickest_form_of_the_peer(tmp_path: Path) -> None:
    seconds = {
        "minigpt": 2.0,
        "minigpt, compiled": 1.0,
        "transformers": 5.0,
        "transformers, compiled": 4.0,
        "products": 0.5,
    }
    path = tmp_path / "training_step.csv"
    whole = [
        {"method": "lora", "side": side, "round": i, "seconds": time}
        for i in (1, 2)
        for side, time in seconds.items()
    ]
    write(path, 2, [row for row in whole if "compiled" not in str(row["side"])])
    assert every_step(tmp_path).startswith("Not measured yet")
    write(path, 2, whole)
    line = every_step(tmp_path).splitlines()[-1]
    ratios = ["0.50", "0.50 to 0.50", "0.25", "0.25 to 0.25", "4.00"]
    assert line.split(" | ")[-5:] == [*ratios[:-1], "4.00 |"]
    (short,) = training_step(read(path)[1])
    assert (short.ours, short.theirs) == (2.0, 4.0)
