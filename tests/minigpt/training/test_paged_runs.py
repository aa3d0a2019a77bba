"""Runs with paged optimizer state: the bits, files and messages of other runs."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minigpt import TrainConfig, train
from minigpt.commands.cli import main
from minigpt.settings import runs
from minigpt.training import snapshot
from minigpt.training.parallel import Alone
from minigpt.training.train import Interrupted
from minigpt_kernels import ClippedAdamW
from minigpt_kernels.paged import DeviceMemory
from tests import tiny
from tests.minigpt.training.test_damage import stop_at_step_5
from tests.minigpt.training.test_resume import (
    assert_same_run,
    base,
    files,
    kill_when,
    lines,
    options,
    stop_at,
)
from tests.processes import Command

__all__ = ["base"]
MOMENTS = ("exp_avg", "exp_avg_sq")
CONFIG = TrainConfig(steps=6, lr=1e-2, max_norm=0.5, snapshot_every=2)


def test_a_run_goes_on_paged_and_unpaged(tmp_path: Path) -> None:
    straight, other = tiny.gpt_neo(), tiny.gpt_neo()
    want = train(straight, tiny.full_loss, tiny.batch, CONFIG)
    for stop, paged in ((2, False), (4, True), (5, False), (0, True)):
        model = tiny.gpt_neo()
        config = replace(CONFIG, paged=paged)
        settings = (model, tiny.full_loss, tiny.batch, config, tmp_path, (), stop != 2)
        if stop:
            with pytest.raises(Interrupted):
                train(*settings, stop_at(stop))
        else:
            rows, other = train(*settings), model
    assert [row["gradient_norm"] for row in rows] == [row["gradient_norm"] for row in want]
    assert min(row["gradient_norm"] for row in want) > 0.5
    pairs = zip(other.parameters(), straight.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_snapshot_is_restored_to_where_the_state_lives(tmp_path: Path) -> None:
    class Kept(DeviceMemory):
        def zeros(self, p: torch.Tensor) -> torch.Tensor:
            places.append(super().zeros(p))
            return places[-1]

    places: list[torch.Tensor] = []
    model = tiny.gpt_neo()
    alone = Alone(model)
    parameters = alone.parameters
    optimizer = ClippedAdamW(parameters.values())
    tiny.full_loss(model, tiny.batch(0)).backward()
    optimizer.step()
    run = {"frozen": "", "settings": {}}
    snapshot.save(tmp_path, 1, alone, optimizer, run)
    paged = ClippedAdamW(parameters.values(), memory=Kept())
    snapshot.restore(tmp_path, alone, paged, run)
    moments = [paged.state[p][name] for p in parameters.values() for name in MOMENTS]
    assert [id(m) for m in moments] == [id(place) for place in places]
    want = [optimizer.state[p][name] for p in parameters.values() for name in MOMENTS]
    assert all(map(torch.equal, moments, want))


def test_a_cpu_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="on a CPU the state is a file in the run's folder"):
        train(tiny.gpt_neo(), tiny.full_loss, tiny.batch, replace(CONFIG, paged=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_command_writes_what_it_writes_unpaged(method: str, base: Path, tmp_path: Path) -> None:
    paged, plain = tmp_path / "paged", tmp_path / "plain"
    assert main([*options(base, paged, method, 3, 2), "--paged"]) == 0
    assert main(options(base, plain, method, 3, 2)) == 0
    assert_same_run(paged, plain, 3)
    assert [runs.read(out)["settings"]["paged"] for out in (paged, plain)] == [True, False]
    summaries = [json.loads((out / "summary.json").read_text()) for out in (paged, plain)]
    assert summaries[0].keys() == summaries[1].keys()


def test_a_stopped_command_goes_on_paged(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.finetune.progress_bar", stop_at_step_5)
        assert main(options(base, out, "lora", 7, 2)) == 130
    assert main(["finetune", "--resume", "--paged", "--out", str(out)]) == 0
    assert main(options(base, plain, "lora", 7, 2)) == 0
    assert_same_run(out, plain, 7)


def test_a_killed_command_leaves_no_state_and_resumes(base: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "out", tmp_path / "plain"
    command = [*options(base, out, "full", 100, 10), "--paged"]
    kill_when(lambda: lines(out) >= 3, command, tmp_path, 0.0)
    names = {re.sub(r"\d+", "N", name) for name in files(out)}
    kept = {"run.json", "run.lock", "metrics.jsonl", "snapshots/step-N.safetensors"}
    assert names <= {*kept, "snapshots/step-N.safetensors.partial"}
    with Command(["finetune", "--resume", "--out", str(out)], tmp_path) as resumed:
        assert resumed.end()[0] == 0
    assert main(options(base, plain, "full", 100, 10)) == 0
    assert_same_run(out, plain, 100)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_no_room_is_told_in_one_line_before_the_first_step(base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = options(base, out, "full", 4, 2)
    with Command([*command, "--paged"], tmp_path, file_bytes=20 * 1024) as run:
        status, _, said = run.end()
    assert status == 2
    (error,) = (line for line in said.splitlines() if line.startswith("minigpt: error"))
    assert re.search(r"no room for [\d,]+ bytes of optimizer state in .*out: File too large", error)
    assert files(out).keys() == {"run.json"}
    assert main([*command, "--resume", "--paged"]) == 0
