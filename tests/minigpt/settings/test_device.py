"""`--device`: what this machine has, or an error of one line."""

from pathlib import Path

import pytest
import torch

from minigpt.commands.cli import main
from minigpt.settings.device import DeviceOption

MODEL = ["--model", "bundled"]
COMMANDS = {
    "finetune": [*MODEL, "--text", "bundled-poe", "--out", "run"],
    "pretrain": ["--text", "bundled-poe", "--out", "run"],
    "generate": [*MODEL, "--prompt", "Once"],
}


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was done to the GPUs of a machine that has two."""
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: done.append("init"))
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    return done


@pytest.mark.parametrize(
    ("name", "device", "done"),
    [
        ("auto", "cuda", ["init", "cuda"]),
        ("cuda", "cuda", ["init", "cuda"]),
        ("cuda:1", "cuda:1", ["init", "cuda:1"]),
        ("cpu", "cpu", []),
    ],
)
def test_with_gpus(name: str, device: str, done: list[object], gpus: list[object]) -> None:
    assert DeviceOption(device=name).find_device() == torch.device(device)
    assert gpus == done


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_without_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert DeviceOption(device=name).find_device() == torch.device("cpu")


def test_a_gpu_that_is_not_there(gpus: list[object]) -> None:
    with pytest.raises(
        ValueError, match=r"'cuda:2', must be auto or .* cpu, cuda, cuda:0, cuda:1$"
    ):
        DeviceOption(device="cuda:2").find_device()
    assert gpus == []


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "gpu", "meta", ""])
def test_a_command_refuses_it_in_one_line(
    command: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stop:
        main([command, *COMMANDS[command], "--device", name])
    assert stop.value.code == 2
    line = f"--device is {name!r}, must be auto or what this machine has: cpu\n"
    assert capsys.readouterr().err == f"minigpt: error: {line}"
    assert not list(tmp_path.iterdir())
