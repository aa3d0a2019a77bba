"""What a run is: its inputs, threads, versions and settings are those it began with, or named."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.commands.cli import main
from minigpt.commands.finetune import Finetune
from minigpt.settings import manifest, runs, sealed
from tests.minigpt.training.test_damage import base, files, options, stop_at_step_5

__all__ = ["base"]


@pytest.fixture
def run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A stopped run, and a copy of the model and text that it reads."""
    shutil.copytree(base, tmp_path / "base")
    with monkeypatch.context() as patch:
        patch.setattr("minigpt.commands.finetune.progress_bar", stop_at_step_5)
        assert main(options(tmp_path / "base", tmp_path / "run", "lora", 6, 2)) == 130
    return tmp_path / "run", tmp_path / "base"


def resumed(out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """What is said where the run is not resumed; nothing changes then."""
    before = files(out)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--resume", "--out", str(out), *more])
    assert files(out) == before
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def other_text(folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text(text.read_text().replace("whale", "shark", 1))


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "layer_norm_epsilon": 1e-4}))


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: tensors[name] * 1.001}, path, {"format": "pt"})


@pytest.mark.parametrize("other", [other_text, other_config, other_tokenizer, other_weights])
def test_another_input_is_refused_by_its_name(
    other: Callable[[Path], None], run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, folder = run
    other(folder)
    name = other.__name__.removeprefix("other_")
    assert f"the {name} is not that of the run in {out}: {folder}" in resumed(out, capsys)


def test_the_manifest_holds_the_sha256_of_what_is_read(run: tuple[Path, Path]) -> None:
    out, folder = run
    inputs = runs.read(out)["inputs"]
    want = {
        "text": "text.txt",
        "config": "config.json",
        "tokenizer": "tokenizer.json",
        "weights": "model.safetensors",
    }
    assert inputs == {
        name: {str(folder / file): hashlib.sha256((folder / file).read_bytes()).hexdigest()}
        for name, file in want.items()
    }


@pytest.mark.parametrize("name", runs.ENVIRONMENT)
def test_another_environment_is_refused_unless_it_is_accepted(
    name: str,
    run: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, _ = run
    now = manifest.environment()
    assert now == {
        "threads": torch.get_num_threads(),
        "versions": {**now["versions"], "torch": torch.__version__},
        "machine": now["machine"],
        "processes": "1",
    }
    other = {
        "threads": 64,
        "versions": {**now["versions"], "torch": "9.9"},
        "machine": "an abacus",
        "processes": "4 by ddp",
    }
    monkeypatch.setattr(manifest, "environment", lambda _: {**now, name: other[name]})
    said = resumed(out, capsys)
    assert f"the run in {out} had {name} " in said
    assert f"--accept {name}" in said
    others = [each for each in runs.ENVIRONMENT if each != name]
    assert f"--accept {name}" in resumed(out, capsys, "--accept", *others)
    assert main(["finetune", "--resume", "--out", str(out), "--accept", name]) == 0
    environments = runs.read(out)["environments"]
    assert [each[name] for each in environments] == [now[name], other[name]]
    assert main(["finetune", "--resume", "--out", str(out)]) == 0  # complete: nothing is computed


def test_an_edited_setting_is_refused(
    run: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run
    path = out / "run.json"
    whole = path.read_text()
    path.write_text(whole.replace('"steps": 6', '"steps": 7'))
    assert f"{path} is damaged or was edited" in resumed(out, capsys)
    record = json.loads(whole)
    del record["sha256"]
    record["settings"]["lr"] = 0.5
    sealed.write(path, record)  # even so: the snapshot knows
    with pytest.raises(SystemExit, match="2"):
        main(["finetune", "--resume", "--out", str(out)])
    assert "was made with lr 0.001, this run has 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": "six"}, 'steps is "six", must be a whole number'),
        ({"betas": [0.9]}, "betas is"),
        ({"colour": 3}, "finetune has no setting 'colour'"),
        ({"steps": -1}, "steps is -1"),
    ],
)
def test_settings_of_a_wrong_type_are_refused(
    changes: dict[str, Any],
    reason: str,
    run: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, _ = run
    record = sealed.read(out / "run.json")
    record["settings"] |= changes
    sealed.write(out / "run.json", record)
    assert reason in resumed(out, capsys)


def test_a_record_that_lacks_a_field_is_refused(run: tuple[Path, Path]) -> None:
    path = run[0] / "run.json"
    record = sealed.read(path)
    for name in record:
        sealed.write(path, {key: value for key, value in record.items() if key != name})
        with pytest.raises(ValueError, match=f"run.json: {name} is null"):
            runs.read(run[0])
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"run\.json: it holds a list"):
        runs.read(run[0])


def test_a_planted_link_is_not_followed(tmp_path: Path, base: Path) -> None:
    out, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("mine")
    out.mkdir()
    (out / "run.json.partial").symlink_to(victim)
    settings = Finetune(model="m", text="t")
    assert runs.settle(Finetune, "finetune", vars(settings), out, False) == settings
    runs.claim(out, "finetune", settings, {"text": [base / "text.txt"]})
    assert victim.read_text() == "mine"
    assert not (out / "run.json").is_symlink()
    assert runs.settle(Finetune, "finetune", {}, out, True) == replace(settings, betas=[0.9, 0.999])


def test_a_sealed_file_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    content = {"losses": [1.5, -0.0, 1e-300], 7: "ü", "none": None, "nested": {"a": [True, {}]}}
    sealed.write(path, content)
    want, whole = json.loads(json.dumps(content)), path.read_bytes()
    assert sealed.read(path) == want
    draw, refusals = random.Random(0), []
    for _ in range(1000):
        data = bytearray(whole)
        place = draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        if draw.random() < 0.2:
            del data[place:]
        path.write_bytes(data)
        try:
            assert repr(sealed.read(path)) == repr(want)
        except ValueError as error:
            refusals.append(str(error))
    assert len(refusals) > 800
    assert all(str(path) in refusal for refusal in refusals)
