"""198 real `adapter_config.json`: each builds what HF PEFT builds, or is refused by name.

The oracle: PEFT puts the adapter of a config on a tiny transformers model of the architecture that
the config is for, its weights are moved off their start, and ours reads the real config with them.
"""

import json
import re
from collections import Counter
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import minigpt
import peft_lite
from peft_lite.lora import LoraLayer
from tests.conftest import real_data
from tests.peft_lite.peft_models import output, tokens

SIZES = {"vocab_size": 67, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 256}
GROUPED = {**WIDE, "num_key_value_heads": 2}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config,
        {"vocab_size": 67, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, WIDE),
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, WIDE),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, GROUPED),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, {**GROUPED, "head_dim": 8}),
    "qwen": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, GROUPED),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, GROUPED),
}
OUTCOMES = {
    "builds lora": 73,
    "builds prefix": 3,
    "builds prompt": 2,
    "builds ia3": 1,
    "refused: peft_type": 78,  # 35 methods that there is no code for
    "refused: peft_type None": 6,  # adapter-transformers, MLX, JAX
    "refused: target": 23,  # of other architectures
    "refused: no target_modules": 6,
    "refused: use_bdlora": 1,
    "refused: kasa_config": 1,
    "refused: init_lora_weights": 1,
    "refused: modules_to_save": 1,  # a module of Segformer
    "refused: num_transformer_submodules": 1,  # of T5
    "refused: Expecting value": 1,  # no JSON
}
# of a prefix or prompt
SHAPE = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4, "encoder_hidden_size": 32}


def kind_of(raw: dict[str, Any]) -> str:
    """The architecture that the base model's name tells, Llama where there is no code for it."""
    base = str(raw.get("base_model_name_or_path")).lower()
    if "distilbert" in base:
        return "bert"
    return next((kind for kind in KINDS if kind in base and "neox" not in base), "llama")


@cache
def models(kind: str) -> tuple[Any, nn.Module]:
    """A tiny model of transformers and ours with its weights.  Not to be changed."""
    cls, config, sizes = KINDS[kind]
    torch.manual_seed(0)
    theirs = cls(config(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=1)).eval()
    with TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, minigpt.load(folder)


def build(raw: dict[str, Any], folder: Path) -> Any:
    """PEFT's model, away from its start, and its weights in the folder; None where it refuses."""
    theirs = deepcopy(models(kind_of(raw))[0])
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    torch.manual_seed(1)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        config.inference_mode = False
        peer = peft.get_peft_model(theirs, config).eval()
        random = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for p in peer.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=random))
        peer.save_pretrained(folder)
    except Exception:  # whatever PEFT has against it
        save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
        return None
    return peer


def layers(peer: Any) -> dict[str, Any]:
    """The layers that PEFT put a LoRA around, by name."""
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in peer.named_modules()
        if hasattr(layer, "lora_A") and "default" in [*layer.lora_A, *layer.lora_embedding_A]
    }


def parts(name: str) -> list[str]:
    """PEFT's layer under the names of ours."""
    if not name.endswith("c_attn"):
        return [name]
    return [name.removesuffix("c_attn") + part for part in ("q_proj", "k_proj", "v_proj")]


def same_shape(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with the shape of the tiny model, as PEFT wrote it, where it names one."""
    written = json.loads((folder / "adapter_config.json").read_text())
    return raw | {name: written[name] for name in SHAPE if name in raw}


def outcome(path: Path, folder: Path) -> str:
    """What comes of a config: `builds lora`, or the reason with the field that it names."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raw = {}
    folder.mkdir()
    raw |= {name: size for name, size in SHAPE.items() if raw.get(name) is not None}
    peer = build(raw, folder)
    config = json.dumps(same_shape(raw, folder)) if raw else path.read_text()
    (folder / "adapter_config.json").write_text(config)
    ours = deepcopy(models(kind_of(raw))[1])
    try:
        handle = peft_lite.load(ours, folder)
    except ValueError as error:
        return reason(str(error))
    assert peer is not None, f"{path.name} builds here alone"
    with torch.no_grad():
        got, want = output(ours, tokens()), output(peer, tokens())
        plain = output(models(kind_of(raw))[0], tokens())
    want = want[:, -got.size(1) :]  # PEFT's prompt has logits, too
    assert (got - want).abs().max() <= 5e-5 * want.abs().max(), path.name
    assert (got - plain).abs().max() > 1e-3 * want.abs().max(), path.name
    wrappers = handle.methods["default"].wrappers
    loras = {ours.names.to_hf(n): w for n, w in wrappers.items() if isinstance(w, LoraLayer)}
    expected = {part: layer for name, layer in layers(peer).items() for part in parts(name)}
    assert {n: w.scaling for n, w in loras.items()} == pytest.approx(
        {n: layer.scaling["default"] for n, layer in expected.items()}
    )
    ranks = {n: layer.r["default"] for n, layer in expected.items()}
    assert {n: len(w.lora_a) for n, w in loras.items()} == ranks
    return f"builds {handle.methods['default'].kind}"


def reason(message: str) -> str:
    """The reason of a refusal without what differs from model to model."""
    assert message.isprintable()
    found = re.search(
        r": (cannot read|Expecting value|no target_modules|target '|peft_type None|peft_type '\w+'|"
        r"modules_to_save|[a-z_]+(?= (=|is) ))",
        message,
    )
    assert found is not None, message
    named = found[1].removesuffix(" '")
    return "refused: peft_type" if named.startswith("peft_type '") else f"refused: {named}"


@pytest.mark.filterwarnings("ignore")  # of PEFT, about what it does not know
def test_each_builds_what_peft_builds_or_is_refused_by_name(tmp_path: Path) -> None:
    paths = sorted(real_data("adapter_configs").glob("*.json"))
    outcomes = {path.stem: outcome(path, tmp_path / path.stem) for path in paths}
    assert Counter(outcomes.values()) == OUTCOMES
