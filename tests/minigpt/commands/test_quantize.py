"""`minigpt quantize` and `minigpt finetune --quantize nf4`."""

import json
from pathlib import Path

import pytest
import torch

import minigpt
import peft_lite
from minigpt.commands.cli import main
from minigpt.data.tokenizer import Tokenizer
from peft_lite.quantized import is_quantized

FINETUNE = ["finetune", "--text", "bundled-poe", "--steps", "3", "--target", "all-linear"]
SMALL = ["--batch-size", "2", "--sequence-length", "16", "--heldout", "0.01"]


def losses_of(out: Path) -> list[float]:
    """The losses of a run."""
    return [json.loads(row)["loss"] for row in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    assert main(["quantize", "--model", "bundled", "--out", str(out)]) == 0
    return out


def test_a_checkpoint_of_four_bits(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = minigpt.load(packed)
    twin = minigpt.load("bundled", quantize="nf4")
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids), twin(ids))
    assert sum(is_quantized(m) for m in model.modules()) == 24
    text = "Down the rabbit hole"
    assert torch.equal(Tokenizer.load(packed).ids(text), Tokenizer.load("bundled").ids(text))
    assert not packed.with_name("model.partial").exists()
    weights = [m.quantized for m in model.modules() if is_quantized(m)]
    bits = 8 * sum(w.nbytes for w in weights) / sum(w.shape.numel() for w in weights)
    assert bits == pytest.approx(4.127, abs=2e-3)


def test_a_folder_that_exists_is_left_alone(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p.name: p.read_bytes() for p in packed.iterdir()}
    with pytest.raises(SystemExit) as stop:
        main(["quantize", "--model", "bundled", "--out", str(packed)])
    assert stop.value.code == 2
    assert "exists: choose another folder" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in packed.iterdir()} == before


def test_finetuning_in_four_bits_is_that_of_the_quantised_checkpoint(tmp_path: Path) -> None:
    """On a model whose samples are written in a moment."""
    tokenizer = Tokenizer.load("bundled")
    config = minigpt.GPTNeoConfig(
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=128,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        window_size=8,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    minigpt.save(minigpt.GPTNeo(config), tmp_path / "plain")
    tokenizer.save(tmp_path / "plain")
    packed = tmp_path / "four-bits"
    assert main(["quantize", "--model", str(tmp_path / "plain"), "--out", str(packed)]) == 0
    runs = {
        "quantize": ["--model", str(tmp_path / "plain"), "--quantize", "nf4"],
        "packed": ["--model", str(packed)],
    }
    losses = {}
    for name, model in runs.items():
        out = tmp_path / name
        assert main([*FINETUNE, *SMALL, *model, "--out", str(out)]) == 0
        losses[name] = losses_of(out)
    assert losses["quantize"] == losses["packed"]
    summary = json.loads((tmp_path / "packed" / "summary.json").read_text())
    dense = minigpt.load(tmp_path / "plain")
    peft_lite.attach(dense, peft_lite.LoraConfig("all-linear", r=8))
    assert summary["total_parameters"] == peft_lite.report(dense).total
    model = minigpt.load(packed)
    before = model(torch.arange(12)[None])
    peft_lite.load(model, tmp_path / "packed" / "adapter")
    assert not torch.equal(model(torch.arange(12)[None]), before)


def test_codes_do_not_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["finetune", "--model", "bundled", "--quantize", "nf4", "--text", "bundled-poe"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--steps", "1", "--method", "full", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "is packed as torch.uint8: it cannot train" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
