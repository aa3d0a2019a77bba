"""Every method on the bundled model: a few updates lower the held-out loss, and it alone moves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import minigpt
import peft_lite
from minigpt.checkpoints.source import find
from minigpt.data.text import RandomWindows, consecutive_windows, read_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import TrainConfig, evaluate, train
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    FreezeConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
)

QUERY_VALUE = ["query", "value"]
METHODS: dict[str, tuple[Any, float]] = {
    "lora": (LoraConfig(QUERY_VALUE, lora_alpha=16), 3e-3),
    "lora with biases": (LoraConfig(QUERY_VALUE, lora_alpha=16, bias="all"), 3e-3),
    "lora and a norm": (LoraConfig(QUERY_VALUE, modules_to_save=["final_norm"]), 3e-3),
    "lora of the tables": (LoraConfig(["wte", "wpe", "mlp.up"], use_rslora=True), 3e-3),
    "dora": (DoraConfig(QUERY_VALUE, lora_alpha=16), 3e-3),
    "houlsby": (BottleneckConfig("houlsby", 16), 3e-3),
    "pfeiffer": (BottleneckConfig("pfeiffer", 16), 3e-3),
    "parallel": (BottleneckConfig("parallel", 16, "gelu"), 3e-3),
    "prefix": (PrefixConfig(8), 1e-2),
    "prefix as in peft": (PrefixConfig(8, form="peft"), 1e-2),
    "prefix by an mlp": (PrefixConfig(8, prefix_projection=True, encoder_hidden_size=32), 1e-2),
    "prompt": (PromptConfig(8), 3e-2),
    "bias": (BiasConfig(), 3e-3),
    "ia3": (IA3Config(["key", "value", "mlp.down"], ["mlp.down"]), 1e-2),
    "freezing": (FreezeConfig(freeze=["attention", "embeddings"]), 1e-3),
}
STEPS, BATCH, LENGTH = 25, 4, 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text() -> tuple[torch.Tensor, torch.Tensor]:
    """The beginning of a tale that the model has not seen, to learn from, and what follows."""
    words = read_text(find("bundled").parent / "tales" / "poe.txt")[:40_000]
    ids = torch.tensor(Tokenizer.load(find("bundled")).encode(words))
    cut = int(0.8 * len(ids))
    return ids[:cut], ids[cut:]


@pytest.mark.parametrize("method", METHODS)
def test_the_heldout_loss_falls_and_nothing_else_moves(
    method: str, text: tuple[torch.Tensor, torch.Tensor]
) -> None:
    config, lr = METHODS[method]
    learned, heldout = text
    model = minigpt.load("bundled")
    windows = list(consecutive_windows(heldout, LENGTH, BATCH))[:8]
    torch.manual_seed(0)
    parameters = dict(model.named_parameters())
    handle = peft_lite.attach(model, config)
    chosen = {id(p) for p in handle.methods["default"].trained()}
    frozen = {n: p.detach().clone() for n, p in parameters.items() if id(p) not in chosen}
    before = evaluate(model, language_model_loss, windows)
    train(
        model,
        language_model_loss,
        RandomWindows(learned, LENGTH, BATCH, 0),
        TrainConfig(steps=STEPS, lr=lr),
    )
    after = evaluate(model, language_model_loss, windows)
    print(f"{method}: {before:.3f} -> {after:.3f}")
    assert after < before - 0.04
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    if method != "freezing":
        base = minigpt.load("bundled")
        handle.detach()
        assert all(torch.equal(p, parameters[n]) for n, p in base.named_parameters())
