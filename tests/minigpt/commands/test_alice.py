"""The whole way on real input: GPT-Neo at the 125M size, its real tokenizer, Alice, the command."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers

import minigpt
import peft_lite
from minigpt.commands.cli import main
from minigpt.data.text import read_text
from tests.conftest import real_data

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
]


def test_lora_learns_alice_and_its_adapter_opens_in_peft(tmp_path: Path) -> None:
    tokenizer = real_data("tokenizers", "gpt_neo_125m")
    text = tmp_path / "alice.txt"
    text.write_text(read_text(real_data("texts", "alice.txt"))[:12_000])
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        hidden_size=768,
        num_layers=12,
        num_heads=12,
        attention_types=[[["global", "local"], 6]],
    )
    transformers.GPTNeoForCausalLM(config).save_pretrained(base)
    for file in tokenizer.iterdir():
        shutil.copy(file, base)
    out = tmp_path / "run"
    data = ["--model", str(base), "--text", str(text), "--out", str(out)]
    method = ["--method", "lora", "--target", "all-linear", "--rank", "8", "--lr", "2e-3"]
    size = ["--steps", "6", "--batch-size", "2", "--sequence-length", "64"]
    assert main(["finetune", *data, *method, *size]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["trainable_parameters"] == 1_327_104
    assert summary["heldout_loss_before"] - summary["heldout_loss_after"] > 0.3

    ids = torch.tensor([minigpt.Tokenizer.load(base).encode("Alice was beginning to get very")])
    ours = minigpt.load(base)
    theirs = transformers.GPTNeoForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        before = ours(ids)
        peft_lite.load(ours, out / "adapter")
        opened = peft.PeftModel.from_pretrained(theirs, out / "adapter").eval()
        expected = opened(ids).logits
        assert (expected - before).abs().max() > 1e-2
        limit = 1e-5 * expected.abs().max().item()
        torch.testing.assert_close(ours(ids), expected, rtol=0, atol=limit)
