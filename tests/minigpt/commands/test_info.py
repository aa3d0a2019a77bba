"""`minigpt info` on a model of the hub downloads its description alone."""

from pathlib import Path
from shutil import copy

import huggingface_hub
import pytest

from minigpt.checkpoints.source import BUNDLED
from minigpt.commands.cli import main


def test_info_asks_the_hub_for_the_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(BUNDLED["bundled"] / "config.json", tmp_path)
    asked: list[list[str]] = []

    def download(repository: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["info", "--model", "someone/model"]) == 0
    assert "3,392,704" in capsys.readouterr().out
    assert asked == [["config.json"]]
