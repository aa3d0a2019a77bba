"""`minigpt verify`: sound runs are sound; every damage is named, and the status says so."""

import random
import shutil
from pathlib import Path

import pytest

from minigpt.commands.cli import main
from tests.minigpt.training.test_damage import base, files, stopped

__all__ = ["base", "stopped"]


def verify(out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """The status, and the lines of the faults; nothing is changed."""
    before = files(out)
    capsys.readouterr()
    status = main(["verify", str(out)])
    assert files(out) == before
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("damaged" if status else "sound")
    return status, [line for line in lines if line.startswith("FAULT")]


def test_runs_that_are_sound(
    stopped: tuple[Path, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in stopped:
        assert verify(out, capsys) == (0, [])
    main(["verify", str(stopped[1])])
    lines = capsys.readouterr().out.splitlines()
    named = {line.split()[1].rstrip(",") for line in lines[:-1]}
    inputs = ("text.txt", "config.json", "tokenizer.json", "model.safetensors")
    assert named == {*(str(stopped[1] / n) for n in files(stopped[1]))} | {
        str(base / name) for name in inputs
    }


def test_any_flipped_bit_of_a_complete_run_is_a_fault(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = random.Random(0)
    for name in files(stopped[1]):
        out = tmp_path / "run"
        shutil.copytree(stopped[1], out)
        data = bytearray((out / name).read_bytes())
        data[draw.randrange(len(data) // 2, len(data) - 4)] ^= 1
        (out / name).write_bytes(data)
        status, faults = verify(out, capsys)
        assert status == 1
        assert all(str(out / name) in fault for fault in faults), name
        assert len(faults) == 1, name
        shutil.rmtree(out)


def test_what_a_run_that_is_not_complete_may_lack(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    newest = out / "snapshots" / "step-000005.safetensors"
    data = bytearray(newest.read_bytes())
    data[-9] ^= 8
    newest.write_bytes(data)
    status, (fault,) = verify(out, capsys)
    assert status == 1
    assert f"{newest} is damaged: its SHA-256 is another" in fault
    metrics = out / "metrics.jsonl"
    rows = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join([*rows[:2], *rows[3:]]))
    status, faults = verify(out, capsys)
    assert status == 1
    assert f"{metrics}: row 3 is not that of step 3" in faults[0]
    (out / "run.json").write_text("{")
    assert f"FAULT {out / 'run.json'}: cannot read" in verify(out, capsys)[1][0]


def test_missing_files_and_changed_inputs_are_faults(
    stopped: tuple[Path, Path], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped[1], out)
    (out / "sample.txt").unlink()
    assert verify(out, capsys) == (1, [f"FAULT {out / 'sample.txt'}: it is missing"])
    text = base / "text.txt"
    whole = text.read_text()
    text.write_text(whole + "more")
    try:
        _, faults = verify(out, capsys)
    finally:
        text.write_text(whole)
    assert f"FAULT {text}, the text: its SHA-256 is another" in faults


def test_a_folder_without_a_run_is_a_mistake(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["verify"], ["verify", str(tmp_path)], ["verify", str(tmp_path / "no")]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().err.count("\n") == 1
