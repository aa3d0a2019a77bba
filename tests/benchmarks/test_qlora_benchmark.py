"""The benchmark of QLoRA on a tiny shape: both sides run, and a run that was cut off goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

import minigpt
import peft_lite
from benchmarks import qlora, qlora_tables
from benchmarks.common import OURS, THEIRS, write
from tools import random_checkpoint

TINY: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "model"
    random_checkpoint.write(out, 2, **TINY)
    return out


def test_a_random_checkpoint_is_one_shard_a_block(tiny: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert len(list(tiny.glob("*.safetensors"))) == 3
    model = minigpt.load(tiny)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.arange(9)[None]
    torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert model.config.sliding_window == 4096


def test_the_shape_is_the_named_one() -> None:
    architecture = random_checkpoint.ARCHITECTURES["mistral"]
    config = architecture.config(**random_checkpoint.VISTRAL, num_hidden_layers=32)
    model = architecture.outline(config, "causal-lm")
    assert peft_lite.report(model).total == 7_293_906_944
    peft_lite.attach(model, peft_lite.LoraConfig("all-linear", r=qlora.RANK))
    assert peft_lite.report(model).trainable == 167_772_160


def test_a_run_that_was_cut_off_goes_on(tiny: Path, tmp_path: Path) -> None:
    rows = qlora.numbered(1, lambda: qlora.ours(tiny, 8, 4, tmp_path))
    assert [row["what"] for row in rows] == ["load", *["step"] * 3, "adapter"]
    assert all(int(str(row["anonymous_bytes"])) <= int(str(row["peak_bytes"])) for row in rows)
    again = qlora.ours(tiny, 8, 4, tmp_path, resume=True)
    assert [row["what"] for row in again] == ["load", *["resumed step"] * 2, "adapter"]


def test_a_checkpoint_is_made_once(tmp_path: Path) -> None:
    with qlora.checkpoint(1, tmp_path, **TINY) as first:
        made = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    with qlora.checkpoint(1, tmp_path, **TINY) as again:
        assert {file: file.stat().st_mtime_ns for file in again.iterdir()} == made
    with qlora.checkpoint(1, None, **TINY) as short:
        assert short.exists()
    assert not short.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_other_side_runs(tiny: Path) -> None:
    pytest.importorskip("bitsandbytes")
    torch.compiler.set_stance("force_eager")
    try:
        rows = qlora.numbered(2, lambda: qlora.theirs(tiny, 8, 2))
    finally:
        torch.compiler.set_stance("default")
    assert [(row["what"], row["round"]) for row in rows] == [("load", 2), ("step", 2)]


def test_the_tables_are_the_medians_of_the_files(tmp_path: Path) -> None:
    assert qlora_tables.section(tmp_path).count("Not measured yet") == 2

    def row(what: str, side: str, number: int, seconds: float, peak: float) -> dict[str, object]:
        tokens = 0 if what in ("load", "adapter") else 256
        return {"what": what, "side": side, "round": number, "tokens": tokens, "seconds": seconds,
                "peak_bytes": int(peak * 1e9), "anonymous_bytes": int(peak * 5e8)}  # fmt: skip

    run = [row("load", OURS, 1, 100, 4), *(row("step", OURS, 1, s, 8) for s in (64, 32, 128))]
    write(tmp_path / "qlora.csv", 2, run)
    assert "| the resumed step | not measured |" in qlora_tables.section(tmp_path)
    again = [row("load", OURS, 0, 200, 5), row("resumed step", OURS, 0, 50, 9)]
    write(tmp_path / "qlora_resumed.csv", 2, again)
    sides = [
        row(what, side, number, number * seconds * factor, factor)
        for number in (1, 2, 3)
        for side, factor in ((OURS, 1.0), (THEIRS, 2.0))
        for what, seconds in (("load", 3.0), ("step", 5.0))
    ]
    write(tmp_path / "qlora_four_layers.csv", 2, sides)
    text = qlora_tables.section(tmp_path)
    assert "| load into 4 bits | 100 |  | 4.00 GB | 2.00 GB |" in text
    assert "| a step | 64 | 4 | 8.00 GB | 4.00 GB |" in text
    assert "| the resumed step | 50 | 5.12 | 9.00 GB | 4.50 GB |" in text
    assert "| a step | 10 s | 20 s | 0.50 | 0.50 to 0.50 |" in text
    assert "| a step | 0.5 GB anonymous | 1 GB anonymous | 0.50 | 0.50 to 0.50 |" in text
