"""`minigpt plan`: what it prints, what it refuses, and that it reads nothing but a config."""

import json
import re
from pathlib import Path

import pytest
import torch

import minigpt
from minigpt.commands import plan as command
from minigpt.commands.cli import main
from minigpt.commands.plan import parse_bytes, size_text
from minigpt.models.gpt_neo import GPTNeoConfig
from minigpt.plan import speed
from tests.conftest import real_data

SMALL = ["--batch-size", "2", "--sequence-length", "16"]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A config.json under another name, without weights."""
    monkeypatch.setattr(command, "CALIBRATION", 0.1)
    model = minigpt.GPTNeo(
        GPTNeoConfig(
            vocab_size=300,
            max_position_embeddings=64,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
        )
    )
    minigpt.save(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "config.json").rename(tmp_path / "tiny.json")
    return str(tmp_path / "tiny.json")


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The lines of a plan: name -> value."""
    lines = capsys.readouterr().out.splitlines()
    pairs = [re.fullmatch(r"  (\S.*?)  +(\S.*)", line) for line in lines]
    return {pair[1]: pair[2] for pair in pairs if pair}


def test_a_plan_has_memory_flops_and_seconds(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", config, "--method", "full", *SMALL]) == 0
    lines = said(capsys)
    model = minigpt.GPTNeo(GPTNeoConfig(300, 64, 32, 2, 4))
    numbers = sum(p.numel() for p in model.parameters())
    assert lines["weights"] == size_text(4 * numbers)
    assert lines["optimizer state"] == size_text(8 * numbers)
    # tokens x (12 D^2 a block + the head) x 6
    formula = 6 * 32 * (2 * 12 * 32**2 + 300 * 32)
    assert float(lines["FLOPs of products"]) == pytest.approx(formula, rel=0.01)
    assert float(lines["by 6 N and 4 N a token"]) == pytest.approx(formula, rel=0.01)
    assert float(lines["tokens a second"].replace(",", "")) > 0
    assert "libraries" in lines
    assert lines["tokens, each process"] == "32"


def test_a_card_needs_no_machine(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "calibrated", lambda *_: pytest.fail("nothing is to run"))
    several = ["--gpus", "8", "--parallel", "fsdp", "--card", "h100"]
    assert main(["plan", "--model", config, "--method", "full", *SMALL, *several]) == 0
    out = capsys.readouterr().out
    assert "H100 SXM" in out
    assert "assuming 60%" in out
    assert "each process sends" in out
    assert "gathered" in out
    assert main(["plan", "--model", config, *SMALL, "--quantize", "nf4", "--card", "l4"]) == 0
    assert "dequantisation" in capsys.readouterr().out


def test_the_largest_batch_is_said(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    card = ["--model", config, "--card", "l4", "--sequence-length", "16"]
    assert main(["plan", *card, "--memory", "700MB"]) == 0
    out = capsys.readouterr().out
    found = re.search(r"the largest batch that fits 700 MB: ([\d,]+)\n", out)
    assert found
    largest = int(found[1].replace(",", ""))
    for batch, fits in ((largest, True), (largest + 1, False)):
        assert main(["plan", *card, "--batch-size", str(batch)]) == 0
        total = said(capsys)["in all"]  # the last line of this name has the seconds
        assert total.endswith(" s")
        settings = command.PlanOptions(
            model=config, card="l4", sequence_length=16, batch_size=batch
        )
        there = command.planned(config, settings)
        parts = there.memory(settings.step, there.trace(settings.step), None)
        assert (sum(parts.values()) <= 700 * 10**6) == fits
    assert main(["plan", *card, "--memory", "1MB"]) == 0
    assert "not even a batch of 1 fits 1 MB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("80 GiB", 80 * 2**30), ("1.5tb", 15 * 10**11), ("4096", 4096)],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "24 gigs"], "--memory is '24 gigs', must be a number of bytes or of KB"),
        (["--memory", "0GB"], "--memory is '0GB'"),
        (["--memory=-1GB"], "--memory is '-1GB'"),
        (["--gpus", "8"], "--gpus 8 share no work: --parallel must be ddp or fsdp"),
        (["--parallel", "ddp"], "--parallel ddp needs --gpus of at least 2"),
        (["--gpus", "0"], "gpus is 0, must be at least 1"),
        (["--batch-size", "0"], "batch_size is 0, must be at least 1"),
        (["--sequence-length", "65"], "--sequence-length is 65, there are 64 positions"),
        (["--target", "quary"], "quary"),
        (["--virtual-tokens", "4"], "--virtual-tokens belongs to --method"),
        (["--batch-size", "99999999"], "tokens a step, must be at most"),
        (["--card", "v100"], "invalid choice: 'v100'"),
        (["--objective", "mlm"], "has causal-lm, none"),
    ],
)
def test_mistakes_are_told_in_one_line(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status = main(["plan", "--model", config, *arguments])
    except SystemExit as stop:
        status = int(stop.code or 0)
    assert status == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert "seconds" not in out


def test_a_folder_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--model", "no/such/model.json"])
    assert "no such model directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mistral-7b-v0.1", 7_241_732_096),
        ("llama-2-7b-hf", 6_738_415_616),
        ("qwen2-0.5b", 494_032_768),
        ("gpt2", 124_439_808),
    ],
)
def test_published_configs_are_planned(name: str, parameters: int) -> None:
    """Published numbers of parameters; GPT-2's too, whose layer of three is three here."""
    path = str(real_data("configs", f"{name}.json"))
    options = command.PlanOptions(model=path, method="full", card="h100", dtype="bfloat16")
    there = command.planned(path, options, "bfloat16")
    assert there.sizes.weights == 2 * parameters


def test_finetune_sets_its_plan_beside_what_it_took(tmp_path: Path) -> None:
    """The peak of this process has a history; it is the prediction that is looked at."""
    common = [
        "--model",
        "bundled",
        "--text",
        "bundled-carroll",
        "--steps",
        "2",
        "--heldout",
        "0.02",
    ]
    sizes = []
    for batch in ("1", "16"):
        out = tmp_path / batch
        run = ["finetune", *common, "--out", str(out), "--batch-size", batch]
        assert main([*run, "--sequence-length", "64", "--method", "lora"]) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["step_seconds"] > 0
        assert summary["predicted_step_seconds"] > 0
        sizes.append(summary["predicted_peak_memory_bytes"] - summary["memory_before_model_bytes"])
    model = minigpt.load("bundled")
    assert sizes[0] > sum(p.nbytes for p in model.parameters())
    assert 20e6 < sizes[1] - sizes[0] < 200e6
    assert torch.cuda.is_initialized() or sizes[1] < 500e6
