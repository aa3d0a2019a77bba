"""Every method of HF PEFT: written here it computes the same there, and the other way round."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peft_lite
from peft_lite import DoraConfig, IA3Config, LoraConfig, PrefixConfig, PromptConfig
from tests.peft_lite.peft_models import output, pair, tokens

pytestmark = [
    # what PEFT itself does with the `transformers` of today
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    # for a classifier it looks for weights that only a trained one has
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
]

WRITTEN: dict[str, tuple[str, Any]] = {
    "dora": ("gpt-neo", DoraConfig(["query", "mlp.up"], r=3, lora_alpha=7)),
    "dora with biases": ("bert", DoraConfig(["key", "mlp.down"], r=3, lora_alpha=7)),
    "dora of a table": ("gpt-neo", DoraConfig(["position", "value"], r=3, lora_alpha=7)),
    "lora of tables": ("gpt-neo", LoraConfig(["wte", "wpe", "q_proj"], r=3, lora_alpha=7)),
    "lora of a table, encoder": (
        "bert masked",
        LoraConfig(["embeddings.token"], r=3, lora_alpha=7, use_rslora=True),
    ),
    "all biases": ("gpt-neo", LoraConfig(["query", "mlp.up"], r=3, bias="all")),
    "biases of the layers": ("bert", LoraConfig(["query", "mlp.up"], r=3, bias="lora_only")),
    "a classifier": ("bert", LoraConfig(["query"], r=3, modules_to_save=["classifier"])),
    "a pooler": ("bert bare", LoraConfig(["query"], r=3, modules_to_save=["pooler"])),
    "one block": ("gpt-neo", LoraConfig(["q_proj", "c_fc"], r=3, layers_to_transform=[1])),
    "ia3": ("gpt-neo", IA3Config(["key", "value", "mlp.down"], ["mlp.down"])),
    "ia3, encoder": ("bert", IA3Config(["key", "value", "mlp.up", "mlp.down"], ["mlp.down"])),
    "ia3, classifier": ("bert", IA3Config(["key"], modules_to_save=["classifier"])),
    "prefix": ("gpt-neo", PrefixConfig(3, form="peft")),
    "prefix longer than the window": ("gpt-neo", PrefixConfig(6, form="peft")),
    "prefix, mlp": (
        "gpt-neo",
        PrefixConfig(3, prefix_projection=True, encoder_hidden_size=10, form="peft"),
    ),
    "prefix, classifier": (
        "bert",
        PrefixConfig(3, form="peft", modules_to_save=["classifier"]),
    ),
    "prefix, encoder": ("bert masked", PrefixConfig(3, form="peft")),
    "prompt": ("gpt-neo", PromptConfig(4)),
    "prompt, classifier": ("bert", PromptConfig(4, modules_to_save=["classifier"])),
    "prompt, encoder": ("bert bare", PromptConfig(4)),
}


def close(ours: torch.Tensor, oracle: torch.Tensor) -> None:
    """Apart by at most 1e-5, or 1e-5 of the largest magnitude where that is above 1."""
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-5 * max(1, oracle.abs().max().item()))


def of_tokens(y: torch.Tensor, config: Any) -> torch.Tensor:
    """PEFT gives logits for the vectors of a prompt as well."""
    return y[:, config.num_virtual_tokens :] if _is_prompt(config) and y.dim() == 3 else y


def _is_prompt(config: Any) -> bool:
    return type(config).__name__.startswith("Prompt")


def masked(model: nn.Module, config: Any, side: str) -> torch.Tensor:
    """What the model makes of tokens of which one row is padded, where they are real."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, slice(7, None) if side == "right" else slice(4)] = 0
    y = model(ids, attention_mask=mask)
    y = y if isinstance(y, torch.Tensor) else y[0]
    if y.dim() == 2:  # one state of the whole row
        return y
    y = y if y.size(1) == ids.size(1) else of_tokens(y, config)
    return y[mask != 0]


def shake(handle: Any) -> None:
    """Away from the start, whether that is 0, 1 or a norm."""
    random = torch.Generator().manual_seed(11)
    for p in handle.methods["default"].trained():
        p.data.add_(0.3 * torch.randn(p.shape, generator=random))


@pytest.mark.parametrize(("kind", "config"), WRITTEN.values(), ids=WRITTEN)
def test_written_here_computes_the_same_in_peft(kind: str, config: Any, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path / "base")
    before = output(theirs, tokens())
    handle = peft_lite.attach(ours, config)
    shake(handle)
    handle.save(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    after = of_tokens(output(opened, tokens()), config)
    assert (after - before).abs().max() > 1e-2
    close(output(ours, tokens()), after)
    for side in ("right", "left"):
        close(masked(ours, config, side), masked(opened, config, side))


@pytest.mark.parametrize(("kind", "config"), WRITTEN.values(), ids=WRITTEN)
def test_written_here_loads_here(kind: str, config: Any, tmp_path: Path) -> None:
    ours, _ = pair(kind, tmp_path / "base")
    handle = peft_lite.attach(ours, config)
    shake(handle)
    handle.save(tmp_path / "adapter")
    other, _ = pair(kind, tmp_path / "base")
    loaded = peft_lite.load(other, tmp_path / "adapter")
    torch.testing.assert_close(output(other, tokens()), output(ours, tokens()), rtol=0, atol=1e-6)
    assert all(torch.equal(t, loaded.state()[n]) for n, t in handle.state().items())


L, IA3 = peft.LoraConfig, peft.IA3Config
FROM_PEFT: dict[str, tuple[str, Any]] = {
    "dora": ("gpt-neo", L(r=3, target_modules=["q_proj", "c_fc"], use_dora=True)),
    "dora with biases": ("bert", L(r=3, target_modules=["query", "dense"], use_dora=True)),
    "dora of a table": ("gpt-neo", L(r=3, target_modules=["wpe"], use_dora=True)),
    "lora of tables": ("gpt-neo", L(r=3, target_modules=["wte", "wpe"])),
    "all biases": ("gpt-neo", L(r=3, target_modules=["out_proj"], bias="all")),
    "biases of the layers": ("gpt-neo", L(r=3, target_modules=["out_proj"], bias="lora_only")),
    "classifier": ("bert", L(r=3, target_modules=["query"], task_type="SEQ_CLS")),
    "classifier and biases": (
        "bert",
        L(r=3, target_modules=["query"], task_type="SEQ_CLS", bias="all"),
    ),
    "one block": (
        "gpt-neo",
        L(r=3, target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=None),
    ),
    "ia3": (
        "gpt-neo",
        IA3(target_modules=["k_proj", "v_proj", "c_proj"], feedforward_modules=["c_proj"]),
    ),
    "ia3, encoder": (
        "bert",
        IA3(
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            task_type="SEQ_CLS",
        ),
    ),
    "prefix": ("gpt-neo", peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "prefix, mlp": (
        "gpt-neo",
        peft.PrefixTuningConfig(
            num_virtual_tokens=5,
            task_type="CAUSAL_LM",
            prefix_projection=True,
            encoder_hidden_size=9,
        ),
    ),
    "prefix, classifier": (
        "bert",
        peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
    ),
    "prompt": ("gpt-neo", peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")),
    "prompt, classifier": (
        "bert",
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
    ),
    "prompt, encoder": (
        "bert bare",
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="FEATURE_EXTRACTION"),
    ),
}


@pytest.mark.parametrize(("kind", "config"), FROM_PEFT.values(), ids=FROM_PEFT)
def test_written_by_peft_computes_the_same_here(kind: str, config: Any, tmp_path: Path) -> None:
    ours, theirs = pair(kind, tmp_path / "base")
    before = output(ours, tokens())
    torch.manual_seed(5)
    model: Any = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "adapter")
    expected = of_tokens(output(model, tokens()), config)
    handle = peft_lite.load(ours, tmp_path / "adapter")
    after = output(ours, tokens())
    assert (after - before).abs().max() > 1e-2
    close(after, expected)
    handle.detach()
    assert torch.equal(output(ours, tokens()), before)
