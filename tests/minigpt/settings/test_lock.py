"""A run folder has one owner: races of two processes, dead owners, nothing left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from minigpt.settings import lock
from minigpt.settings.lock import LOCK, owned

RACES = 50


def work(out: Path) -> str:
    """A run in small: looks, writes in pieces, finishes."""
    try:
        with owned(out):
            if (out / "result").exists():
                return "holds a run"
            for piece in range(20):
                with (out / "rows").open("a") as file:
                    file.write(f"{os.getpid()} {piece}\n")
                time.sleep(0.0002)
            (out / "result").write_text(str(os.getpid()))
            return "ran"
    except ValueError as error:
        return str(error)


def race(folder: Path, start: Barrier, answers: Any) -> None:
    for number in range(RACES):
        start.wait(60)
        answers.put((number, os.getpid(), work(folder / "runs" / str(number))))


def test_of_two_processes_one_owns_the_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=race, args=(tmp_path, start, answers)) for _ in range(2)]
    for process in both:
        process.start()
    got = [answers.get(timeout=120) for _ in range(2 * RACES)]
    for process in both:
        process.join()
    refused = 0
    for number in range(RACES):
        out = tmp_path / "runs" / str(number)
        said = {pid: text for n, pid, text in got if n == number}
        (owner,) = (pid for pid, text in said.items() if text == "ran")
        (other,) = (text for text in said.values() if text != "ran")
        assert other in ("holds a run", f"{out} is in use by another process")
        refused += other != "holds a run"
        assert (out / "rows").read_text() == "".join(f"{owner} {i}\n" for i in range(20))
        assert sorted(path.name for path in out.iterdir()) == ["result", "rows"]
    assert refused > RACES / 2  # else they did not meet


def test_who_comes_second_changes_nothing(tmp_path: Path) -> None:
    with owned(tmp_path / "run"):
        before = [*tmp_path.rglob("*")]
        for wait in (0, 0.2):
            with (
                pytest.raises(ValueError, match="in use by another process"),
                owned(tmp_path / "run", wait),
            ):
                pass
        assert [*tmp_path.rglob("*")] == before
    with owned(tmp_path / "run"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_is_gone_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = lock._lock, []

    def late(descriptor: int) -> None:
        if not calls:
            (tmp_path / LOCK).unlink()  # the owner before ends in this moment
        calls.append(descriptor)
        plain(descriptor)

    monkeypatch.setattr(lock, "_lock", late)
    with owned(tmp_path, wait=5):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(ValueError, match="in use"), owned(tmp_path):
            pass


def test_a_dead_owner_leaves_the_folder_free(tmp_path: Path) -> None:
    code = """
        import sys, time
        from pathlib import Path
        from minigpt.settings.lock import owned
        with owned(Path(sys.argv[1])):
            print("mine", flush=True)
            time.sleep(60)
    """
    command = [sys.executable, "-c", "if 1:" + code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with pytest.raises(ValueError, match="in use"), owned(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        assert (tmp_path / LOCK).exists()
        with owned(tmp_path):
            pass
    assert not (tmp_path / LOCK).exists()


def test_made_folders_go_again_unless_they_hold_something(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(KeyError), owned(tmp_path / "there" / "a" / "b"):
        raise KeyError
    assert [*tmp_path.rglob("*")] == [tmp_path / "there"]
    with owned(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("")
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="cannot write to"), owned(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()
