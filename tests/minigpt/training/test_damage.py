"""The files of a run, damaged at random: it resumes to the same bits, or is refused in one line."""

import json
import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minigpt.commands.cli import main
from minigpt.training.train import Row
from tests.minigpt.training.test_resume import base, files, options, result

__all__ = ["base"]
KINDS = ("run.json", "metrics.jsonl", "snapshots/step-000004", "snapshots/step-000005")


@contextmanager
def stop_at_step_5(*settings: object) -> Iterator[Callable[[Row], None]]:
    """In the progress bar's place."""

    def observe(row: Row) -> None:
        if row["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    yield observe


@pytest.fixture(scope="module")
def stopped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run stopped after step 5 of 6, with a row more than its snapshot; it undisturbed."""
    folder = tmp_path_factory.mktemp("damage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.commands.finetune.progress_bar", stop_at_step_5)
        assert main(options(base, folder / "stopped", "lora", 6, 2)) == 130
    shutil.copytree(folder / "stopped", folder / "whole")
    assert main(["finetune", "--resume", "--out", str(folder / "whole")]) == 0
    with (folder / "stopped" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "loss": 1.0, "lr": 0.1, "gradient_norm": 1.0}\n{"step": 7, "lo')
    return folder / "stopped", folder / "whole"


def damaged(data: bytes, draw: random.Random) -> bytes:
    """A bit flipped, a part cut off, bytes in the place of others, or another digit."""
    changed = bytearray(data)
    place = draw.randrange(len(data))
    match draw.choice(("bit", "bit", "digit", "cut", "bytes", "line")):
        case "bit":
            changed[place] ^= 1 << draw.randrange(8)
        case "digit":
            digits = [i for i, byte in enumerate(data[:100_000]) if chr(byte) in "0123456789"]
            place = draw.choice(digits)
            changed[place] = ord(draw.choice("0123456789".replace(chr(data[place]), "")))
        case "cut":
            del changed[place:]
        case "bytes":
            changed[place : place + 8] = draw.randbytes(draw.randrange(9))
        case "line":
            lines = data.splitlines(keepends=True)
            del lines[draw.randrange(len(lines))]
            changed = bytearray(b"".join(lines))
    return bytes(changed)


def trace(out: Path) -> list[dict[str, Any]]:
    """The rows of metrics, with the seconds of those before the snapshots."""
    metrics = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    for row in metrics[4:]:
        del row["seconds"]
    return metrics


def outcome(
    seed: int, stopped: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """The damaged kind of file; `same`, `refused`, or what is wrong."""
    source, want = stopped
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    shutil.copytree(source, out)
    (file,) = out.glob(f"{kind}*")
    file.write_bytes(damaged(file.read_bytes(), draw))
    capsys.readouterr()
    before = files(out)
    try:
        main(["finetune", "--resume", "--out", str(out)])
    except SystemExit as end:
        said = capsys.readouterr().err
        if end.code != 2 or said.count("minigpt: error:") != 1 or str(out) not in said:
            return kind, f"status {end.code}: {said}"
        if kind in ("run.json", "metrics.jsonl") and files(out) != before:
            return kind, "refused, but changed something"
        return kind, "refused"
    except BaseException as error:
        return kind, f"{type(error).__name__}: {error}"
    equal = result(out) == result(want) and trace(out) == trace(want)
    shutil.rmtree(out)
    return kind, "same" if equal else "another result"


def check(
    seeds: range, stopped: tuple[Path, Path], folder: Path, capsys: pytest.CaptureFixture[str]
) -> Counter[tuple[str, str]]:
    """How often each kind of file ended in what; fails where that is neither of the two."""
    outcomes = {seed: outcome(seed, stopped, folder / str(seed), capsys) for seed in seeds}
    faults = {seed: o for seed, o in outcomes.items() if o[1] not in ("same", "refused")}
    assert not faults
    return Counter(outcomes.values())


def test_a_damaged_run_resumes_to_the_same_bits_or_is_refused(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = check(range(24), stopped, tmp_path, capsys)
    assert counts["run.json", "refused"]
    assert counts["metrics.jsonl", "refused"]
    assert counts["snapshots/step-000004", "same"] == counts["snapshots/step-000005", "same"] == 6


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_many_damaged_runs(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = check(range(100, 500), stopped, tmp_path, capsys)
    with capsys.disabled():
        for (kind, end), count in sorted(counts.items()):
            print(f"{kind:26}{end:10}{count:6}")


def test_a_damaged_snapshot_is_named_and_the_one_before_it_goes_on(
    stopped: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    file = out / "snapshots" / "step-000005.safetensors"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1  # of a tensor
    file.write_bytes(content)
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert f"{file} is damaged: its SHA-256 is another" in caplog.text
    assert result(out) == result(stopped[1])


def test_metrics_that_are_not_the_snapshot_s_are_refused(
    stopped: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped[0], out)
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 3, "loss": ', '"step": 3, "loss": 1'))
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--resume", "--out", str(out)])
    assert f"{metrics} is damaged or was edited: up to step 5" in capsys.readouterr().err
