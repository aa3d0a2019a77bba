"""Trackers: what TensorBoard and Weights & Biases read is metrics.jsonl, after a stop, too; a
tracker that fails stops no run.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from minigpt.commands.cli import main
from minigpt.training.trackers.registry import TRACKERS
from tests.minigpt.commands.test_cli import refuse
from tests.minigpt.training.test_damage import stop_at_step_5
from tests.minigpt.training.test_resume import base, files, options, result

__all__ = ["base"]

Curves = dict[str, list[tuple[int, float]]]  # of each number: step and value


def run(base: Path, out: Path, *more: str) -> list[str]:
    return [*options(base, out, "lora", 6, 2), "--evaluate-every", "2", *more]


def curves(out: Path) -> Curves:
    """Those of metrics.jsonl."""
    found: Curves = defaultdict(list)
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name in row.keys() - {"step"}:
            found[name].append((row["step"], row[name]))
    assert {len(points) for points in found.values()} == {6, 3}
    return found


def stop(base: Path, out: Path, *more: str) -> None:
    """Stops after step 5, with a row that the snapshot does not know of, as a kill would leave."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minigpt.commands.finetune.progress_bar", stop_at_step_5)
        assert main(run(base, out, *more)) == 130
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 6, "loss": 99.0, "lr": 0.1, "gradient_norm": 1.0, "seconds": 1}\n')


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a tracker."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert main(run(base, out)) == 0
    return out


# --- TensorBoard --------------------------------------------------------------------------------


def tensorboard(out: Path) -> Curves:
    """What TensorBoard's own reader finds."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = (out / "tracking" / "tensorboard").iterdir()
    events = reader.EventAccumulator(str(file))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def in_float32(curves: Curves) -> Curves:
    narrow = struct.Struct("f")
    return {
        name: [(step, narrow.unpack(narrow.pack(value))[0]) for step, value in points]
        for name, points in curves.items()
    }


def test_tensorboard_reads_the_metrics(base: Path, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    assert main(run(base, out, "--track", "tensorboard")) == 0
    assert tensorboard(out) == in_float32(curves(out))
    assert result(out) == result(plain)
    assert {*files(out)} - {*files(plain)} == {
        f"tracking/tensorboard/{path.name}" for path in (out / "tracking" / "tensorboard").iterdir()
    }


def test_after_a_stop_the_whole_run_is_replayed(base: Path, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    stop(base, out, "--track", "tensorboard")
    assert [step for step, _ in tensorboard(out)["loss"]] == [1, 2, 3, 4, 5]
    assert main(["finetune", "--resume", "--out", str(out)]) == 0
    assert tensorboard(out) == in_float32(curves(out))
    assert result(out) == result(plain)


def test_a_run_may_go_on_with_another_tracker(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    stop(base, out)
    assert not (out / "tracking").exists()
    assert main(["finetune", "--resume", "--out", str(out), "--track", "tensorboard"]) == 0
    assert tensorboard(out) == in_float32(curves(out))


def test_a_complete_run_is_replayed(base: Path, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    shutil.copytree(plain, out)
    before = files(out)
    assert main(["finetune", "--resume", "--out", str(out), "--track", "tensorboard"]) == 0
    assert tensorboard(out) == in_float32(curves(out))
    shutil.rmtree(out / "tracking")
    assert files(out) == before


def test_tracking_is_no_part_of_the_result(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "out"
    assert main(run(base, out, "--track", "tensorboard")) == 0
    assert not any(
        "tracking" in name for name in json.loads((out / "summary.json").read_text())["files"]
    )
    shutil.rmtree(out / "tracking")
    assert main(["verify", str(out)]) == 0


# --- any tracker --------------------------------------------------------------------------------


class Memory:
    """A tracker that remembers, and fails where it is told to."""

    logs: list["Memory"] = []  # noqa: RUF012
    failing: tuple[str, ...] = ()

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.rows: list[Mapping[str, float]] = []
        self.settings, self.closed = settings, 0
        self.logs.append(self)
        self._fail("start")

    def log(self, row: Mapping[str, float]) -> None:
        self._fail(f"step {row['step']}")
        self.rows.append(row)

    def close(self) -> None:
        self.closed += 1
        self._fail("close")

    def _fail(self, moment: str) -> None:
        if moment in self.failing:
            raise RuntimeError(f"no server\n at {moment}\x1b[31m")


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    """In the place of both trackers, whether they are installed or not."""
    monkeypatch.setattr("minigpt.settings.training.check_installed", lambda *names: None)
    for name in TRACKERS:
        monkeypatch.setitem(TRACKERS, name, Memory)
    monkeypatch.setattr(Memory, "logs", [])
    return Memory


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_several_trackers_get_each_row_once(
    memory: type[Memory], base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(run(base, out, "--track", "tensorboard", "wandb", "wandb", "--seed", "5")) == 0
    assert len(memory.logs) == 2
    for log in memory.logs:
        assert log.rows == metrics(out)
        assert log.settings["seed"] == 5
        assert log.closed == 1


def test_the_other_training_commands_have_trackers(
    memory: type[Memory], base: Path, tmp_path: Path
) -> None:
    short = ["--steps", "3", "--batch-size", "2", "--sequence-length", "16", "--track", "wandb"]
    text, sizes = str(base / "text.txt"), ["--hidden-size", "16", "--num-heads", "2"]
    pretrain = ["pretrain", "--text", text, "--vocab-size", "270", *sizes, *short]
    classify = ["classify", "train", "--model", "bundled-bert", "--data", "bundled-reviews", *short]
    align = ["align", "--objective", "dpo", "--model", "bundled", "--data", "bundled-carroll"]
    align += [*short[:4], "--heldout", "0.02", "--evaluate-every", "0", *short[6:]]
    for arguments in (pretrain, classify, align):
        out = tmp_path / arguments[0]
        assert main([*arguments, "--out", str(out)]) == 0
        assert len(metrics(out)) == 3
        assert memory.logs[-1].rows == metrics(out)
        assert memory.logs[-1].closed == 1
    assert len(memory.logs) == 3


@pytest.mark.parametrize("moments", [("start",), ("step 1",), ("step 3", "close"), ("close",)])
def test_a_tracker_that_fails_stops_no_run(
    moments: tuple[str, ...],
    memory: type[Memory],
    base: Path,
    plain: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    moment = moments[0]
    monkeypatch.setattr(memory, "failing", moments)
    out = tmp_path / "out"
    capsys.readouterr()
    assert main(run(base, out, "--track", "wandb")) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "wandb" in line]
    assert said == [f"minigpt: wandb is off, the run goes on: no server\\n at {moment}\\u001b[31m"]
    assert len(memory.logs) == 1
    assert result(out) == result(plain)
    assert (out / "summary.json").exists()
    expected = {"start": 0, "step 1": 0, "step 3": 2, "close": 6}[moment]
    assert memory.logs[0].rows == metrics(out)[:expected]
    assert memory.logs[0].closed == (moment != "start")


def test_a_stop_closes_the_trackers(memory: type[Memory], base: Path, tmp_path: Path) -> None:
    stop(base, tmp_path / "out", "--track", "wandb")
    (log,) = memory.logs
    assert (len(log.rows), log.closed) == (5, 1)


def test_what_fails_before_the_first_step_starts_no_tracker(
    memory: type[Memory], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    stop(base, out, "--track", "wandb")
    file = out / "metrics.jsonl"
    file.write_text(file.read_text().replace('"step": 3, "loss": ', '"step": 3, "loss": 1'))
    memory.logs.clear()
    refuse(["finetune", "--resume", "--out", str(out)], "is damaged or was edited", capsys, out)
    assert memory.logs == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("wanda", "invalid choice: 'wanda'"),
        ("wandb", "not installed: wandb; run: pip install wandb"),
    ],
)
def test_a_tracker_that_is_not_there_is_named_at_once(
    name: str,
    reason: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("minigpt.settings.checks.find_spec", lambda name: None)
    refuse(run(base, tmp_path / "out", "--track", name), reason, capsys)
    assert not (tmp_path / "out").exists()


# --- Weights & Biases ---------------------------------------------------------------------------

BLOCK = 32768


def records(file: Path) -> Iterator[bytes]:
    """The records of a LevelDB log, which a .wandb file is after its seven bytes of a header.
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    data, at, parts = file.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def wandb_run(out: Path) -> tuple[str, dict[str, Any], Curves]:
    """The id, the config and the curves of the only offline run."""
    from wandb.proto import wandb_internal_pb2

    (folder,) = (p for p in (out / "tracking" / "wandb").glob("*run-*") if not p.is_symlink())
    (file,) = folder.glob("*.wandb")
    config: dict[str, Any] = {}
    found: Curves = defaultdict(list)
    for data in records(file):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        config |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
        values = {
            (item.key or item.nested_key[0]): json.loads(item.value_json)
            for item in record.history.item
        }
        for name, value in values.items():
            if not name.startswith("_"):
                found[name].append((record.history.step.num or values["_step"], value))
    return file.stem.removeprefix("run-"), config, found


def command(arguments: list[str], folder: Path, **environment: str) -> str:
    """Runs in a process of its own; returns what it says."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-m", "minigpt", *arguments],
        env={**kept, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def needs_wandb() -> None:
    done = subprocess.run([sys.executable, "-c", "import wandb"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"wandb is not installed: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.usefixtures("needs_wandb")
def test_weights_and_biases_has_the_metrics_offline(
    base: Path, plain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    said = command(run(base, out, "--track", "wandb"), tmp_path)
    assert "wandb" not in said
    identity, config, found = wandb_run(out)
    assert found == curves(out)
    assert config["seed"] == 0
    assert config["method"] == "lora"
    assert result(out) == result(plain)
    assert {path.name for path in tmp_path.iterdir()} >= {"out"}
    # replayed, it takes its own place
    command(["finetune", "--resume", "--out", str(out), "--track", "wandb"], tmp_path)
    assert wandb_run(out) == (identity, config, found)


@pytest.mark.usefixtures("needs_wandb")
def test_weights_and_biases_has_the_whole_run_after_a_stop(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(base, out)
    command(["finetune", "--resume", "--out", str(out), "--track", "wandb"], tmp_path)
    assert wandb_run(out)[2] == curves(out)


@pytest.mark.usefixtures("needs_wandb")
def test_the_environment_decides_whether_weights_and_biases_runs(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command(run(base, out, "--track", "wandb"), tmp_path, WANDB_MODE="disabled")
    assert not list(out.rglob("*.wandb"))
