"""`minigpt finetune --parallel` in processes that are started as torchrun starts them: its files,
what it says, and runs of which a process is killed.
"""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minigpt.commands import finetune
from minigpt.commands.cli import main
from tests import tiny
from tests.processes import Torchrun, torchrun

ROOT = Path(__file__).parents[3]
STEPS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("base"))


def options(base: Path, out: Path, how: str, *more: str, steps: int = STEPS) -> list[str]:
    return [
        *("finetune", "--model", str(base), "--text", str(base / "text.txt"), "--out", str(out)),
        *("--steps", str(steps), "--snapshot-every", "2", "--evaluate-every", "3"),
        *("--batch-size", "2", "--sequence-length", "16", "--accumulate", "3", "--lr", "1e-3"),
        *("--parallel", how, *more),
    ]


def rows(out: Path) -> list[dict[str, float]]:
    lines = (out / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{n: v for n, v in row.items() if n != "seconds"} for row in found]


def assert_same_result(out: Path, want: Path, steps: int = STEPS) -> None:
    """The same rows, each once, the same tensors to rounding, and the same files."""
    assert [row["step"] for row in rows(out)] == [*range(1, steps + 1)]
    for row, other in zip(rows(out), rows(want), strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    names = {str(f.relative_to(want)) for f in want.rglob("*") if f.is_file()}
    assert {str(f.relative_to(out)) for f in out.rglob("*") if f.is_file()} == names
    for name in (n for n in names if n.endswith(".safetensors")):
        ours, theirs = load_file(out / name), load_file(want / name)
        assert ours.keys() == theirs.keys()
        for key, t in theirs.items():
            assert ours[key].dtype == t.dtype
            assert (ours[key] - t).abs().max() <= 2e-3 * t.abs().max(), key
    assert main(["verify", str(out)]) == 0


@pytest.mark.parametrize(
    ("how", "method"),
    [
        *(("ddp", method) for method in ("lora", "nf4")),
        *(("fsdp", method) for method in ("lora", "full", "nf4", "bias", "freeze")),
    ],
)
def test_processes_leave_the_files_of_one(
    how: str, method: str, base: Path, tmp_path: Path
) -> None:
    size = 2
    more = {
        "lora": ("--lora-dropout", "0.1"),
        "full": ("--method", "full"),
        "nf4": ("--quantize", "nf4", "--target", "all-linear"),
        "bias": ("--method", "bias"),
        "freeze": ("--method", "freeze"),
    }[method]
    assert main(options(base, tmp_path / "one", "none", *more)) == 0
    with Torchrun(size, options(base, tmp_path / "all", how, *more), tmp_path) as run:
        statuses, said = run.end()
    assert statuses == [0] * size, said
    assert_same_result(tmp_path / "all", tmp_path / "one")
    assert said.count("step 1/6") == 1
    printed = [(tmp_path / str(rank) / "stdout").read_text() for rank in range(size)]
    assert "heldout_loss_after" in printed[0]
    assert not any(printed[1:])
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary["processes"] == size
    record = json.loads((tmp_path / "all" / "run.json").read_text())
    assert record["environments"][0]["processes"] == f"{size} by {how}"


def test_more_processes_than_one_need_a_way(base: Path, tmp_path: Path) -> None:
    with Torchrun(2, options(base, tmp_path / "out", "none"), tmp_path) as run:
        statuses, said = run.end()
    assert statuses == [2, 2]
    assert said.splitlines() == [
        "minigpt: error: --parallel is none, must be ddp or fsdp: torchrun has started 2 processes"
    ]
    assert not (tmp_path / "out").exists()


def test_a_way_needs_torchrun(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(options(base, tmp_path / "out", "ddp"))
    assert "torchrun --nproc-per-node N -m minigpt" in capsys.readouterr().err


def test_a_mistake_is_told_once(base: Path, tmp_path: Path) -> None:
    with Torchrun(2, options(base, tmp_path / "out", "ddp", "--rank", "0"), tmp_path) as run:
        statuses, said = run.end()
    assert statuses == [2, 2]
    assert len(said.splitlines()) == 1
    assert "rank r is 0" in said


def test_signals_stop_all_after_the_same_step(base: Path, tmp_path: Path) -> None:
    """SIGTERM comes to one process alone."""
    arguments = options(base, tmp_path / "out", "fsdp", steps=3000)
    with Torchrun(2, arguments, tmp_path) as run:
        wait_for(lambda: count(tmp_path / "out") >= 3)
        os.kill(run.commands[1].process.pid or 0, signal.SIGTERM)
        statuses, said = run.end()
    assert statuses == [130, 130]
    done = count(tmp_path / "out")
    assert said.count(f"interrupted after step {done} of 3000; continue with") == 1
    newest = sorted((tmp_path / "out" / "snapshots").iterdir())[-1]
    assert newest.name == f"step-{done:06d}"


def count(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def kill_and_resume(
    base: Path, folder: Path, draw: random.Random, steps: int, ways: list[tuple[str, int]]
) -> list[float]:
    """Runs of each way in turn, of which a process is killed at some moment, all but the last;
    the seconds until the others had ended.
    """
    out, taken = folder / "out", []
    for i, (how, size) in enumerate(ways):
        more = ["--resume", "--accept", "processes"] if i else []
        arguments = options(base, out, how, *more, steps=steps)
        printed = folder / f"printed {i}"
        if size == 1:
            printed.mkdir(parents=True)
            assert main(arguments) == 0
            continue
        with Torchrun(size, arguments, printed) as run:
            if i + 1 < len(ways):
                begin, victim = count(out), draw.randrange(size)
                goal = begin + draw.randrange(1, steps // len(ways))
                wait_for(lambda: count(out) >= goal or run.commands[0].status is not None)  # noqa: B023
                run.commands[victim].kill()
                pid, moment = run.commands[victim].process.pid, time.monotonic()
                statuses, said = run.end(30)
                taken.append(time.monotonic() - moment)
                assert statuses == [-9 if w == victim else 2 for w in range(size)], said
                (line,) = [x for x in said.splitlines() if x.startswith("minigpt: error")]
                assert f"process {victim} of {size} (pid {pid} on " in line, said
            else:
                statuses, said = run.end()
                assert statuses == [0] * size, said
    return taken


@pytest.fixture(scope="module")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert main(options(base, out, "none", steps=60)) == 0
    return out


@pytest.mark.parametrize(
    "ways",
    [
        [("fsdp", 4), ("fsdp", 2), ("none", 1)],
        [("ddp", 2), ("fsdp", 3)],
    ],
    ids=str,
)
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    ways: list[tuple[str, int]], base: Path, undisturbed: Path, tmp_path: Path
) -> None:
    taken = kill_and_resume(base, tmp_path, random.Random(1), 60, ways)
    assert max(taken) < 10
    assert_same_result(tmp_path / "out", undisturbed, 60)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_forty_kills(base: Path, undisturbed: Path, tmp_path: Path) -> None:
    draw = random.Random(2)
    taken: list[float] = []
    while len(taken) < 40:
        ways: list[Any] = [(draw.choice(["ddp", "fsdp"]), draw.choice([2, 3])) for _ in range(4)]
        ways.append(draw.choice([("none", 1), ("ddp", 2), ("fsdp", 2)]))
        folder = tmp_path / str(len(taken))
        taken += kill_and_resume(base, folder, draw, 60, ways)
        assert_same_result(folder / "out", undisturbed, 60)
    assert max(taken) < 20


def test_torchrun_itself(base: Path, tmp_path: Path) -> None:
    command = ["-m", "minigpt", *options(base, tmp_path / "out", "fsdp", steps=2)]
    done = torchrun(["--nproc-per-node", "2", *command], tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "out")) == 2
    assert done.stdout.count("heldout_loss_after") == 1
    assert done.stderr.count("step 1/2") == 1


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_one_process_loads_the_model_where_it_trains(
    how: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parameters are no slices, so that nothing would bring them to a GPU later."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(finetune.Finetune, "find_device", lambda self: torch.device("meta"))
    places = []

    def load(*arguments: object, device: object, **settings: object) -> None:
        places.append(device)
        raise ValueError("far enough")

    monkeypatch.setattr(finetune, "load", load)
    with pytest.raises(SystemExit, match="2"):
        main(options(base, tmp_path / "out", how))
    assert places == [torch.device("meta")]


def test_a_compiled_run_is_of_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["finetune", "--model", "bundled", "--text", "bundled-poe", "--compile"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--parallel", "ddp", "--out", str(tmp_path / "out")])
    assert "--compile and --parallel ddp do not go together" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
