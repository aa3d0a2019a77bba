"""GPT-2 against transformers, from random weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt.checkpoints.directory import load, outline, save
from minigpt.generation import generate
from minigpt.models.gpt2 import GPT2, GPT2Config
from peft_lite import DoraConfig, IA3Config, LoraConfig
from tests.conftest import real_data

V, T = 61, 11
SIZES = {"vocab_size": V, "n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 3}


def pair(folder: Path, **settings: Any) -> tuple[GPT2, Any]:
    config = transformers.GPT2Config(**SIZES | settings)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(folder)
    ours = load(folder)
    assert isinstance(ours, GPT2)
    return ours, theirs


def ids() -> Tensor:
    return torch.randint(0, V, (2, T), generator=torch.Generator().manual_seed(1))


SETTINGS: list[dict[str, Any]] = [
    {},
    {"n_inner": 40, "activation_function": "relu"},
    {"scale_attn_weights": False},
    {"tie_word_embeddings": False},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_logits_gradients_and_tokens_are_those_of_transformers(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = pair(tmp_path, **settings)
    x, dy = ids(), torch.randn(2, T, V, generator=torch.Generator().manual_seed(2))
    got, want = ours(x), theirs(x).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    (got * dy).sum().backward()
    (want * dy).sum().backward()
    given = {ours.names.to_hf(n): p.grad for n, p in ours.named_parameters() if p.grad is not None}
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    assert ours.architecture.pack(given).keys() == wanted.keys()
    for name, gradient in ours.architecture.pack(given).items():
        expected = wanted[name]
        limit = 3e-5 * float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=limit)
    new = generate(ours, x, 12, temperature=0)
    mask = torch.ones_like(x)
    greedy = theirs.generate(
        input_ids=x, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert torch.equal(new, greedy)


@pytest.mark.parametrize("head", ["causal-lm", "none"])
def test_what_is_saved_opens_in_transformers(head: str, tmp_path: Path) -> None:
    _, theirs = pair(tmp_path / "a")
    ours = load(tmp_path / "a", head=head)
    save(ours, tmp_path / "b")
    kind = transformers.GPT2LMHeadModel if head == "causal-lm" else transformers.GPT2Model
    again = kind.from_pretrained(tmp_path / "b").eval()
    want = theirs.state_dict()
    prefix = "" if head == "causal-lm" else "transformer."
    assert all(torch.equal(p, want[prefix + n]) for n, p in again.state_dict().items())


def test_every_layer_is_plain(tmp_path: Path) -> None:
    ours, _ = pair(tmp_path)
    linear = [m for m in ours.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 3 * 6 + 1


@pytest.mark.parametrize("layer", ["mlp.c_fc", "attn.c_proj", "mlp.c_proj"])
def test_a_lora_opens_in_peft_with_equal_logits(layer: str, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "base")
    handle = peft_lite.attach(ours, peft_lite.LoraConfig([layer], r=3, lora_alpha=5))
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    handle.save(tmp_path / "adapter")
    peer = in_peft(theirs, tmp_path / "adapter")
    with torch.no_grad():
        want = peer(ids()).logits
        assert (ours(ids()) - want).abs().max() <= 2e-5 * want.abs().max()


def in_peft(theirs: Any, folder: Path) -> Any:
    """HF PEFT's model with a saved adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D: it sets fan_in_fan_out itself
        return peft.PeftModel.from_pretrained(theirs, folder).eval()


PEFT = [  # configs of HF PEFT, whose layer c_attn is query, key and value
    {"target_modules": ["c_attn"]},
    {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"c_attn": 5, "mlp.c_fc": 2}},
    {"target_modules": r".*\.h\.[02]\.attn\.(c_attn|c_proj)", "alpha_pattern": {"attn.c_attn": 9}},
    {"target_modules": ["attn.c_attn"], "use_dora": True, "bias": "lora_only"},
    {"target_modules": ["c_attn"], "use_rslora": True, "bias": "all", "layers_to_transform": [1]},
    {"target_modules": ["c_attn"], "fan_in_fan_out": False},
    {"target_modules": ["c_attn"], "modules_to_save": ["attn.c_proj", "ln_f"]},
]


def from_peft(theirs: Any, folder: Path, settings: dict[str, Any]) -> Any:
    """An adapter that HF PEFT put on a model, moved off its start and saved."""
    config = peft.LoraConfig(
        **{"r": 3, "lora_alpha": 5, "fan_in_fan_out": True, "task_type": "CAUSAL_LM"} | settings
    )
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Conv1D: it sets fan_in_fan_out itself
        peer = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize("settings", PEFT, ids=str)
def test_an_adapter_of_peft_has_its_logits_here(settings: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "base")
    plain = ours(ids())
    peer = from_peft(theirs, tmp_path / "adapter", settings)
    handle = peft_lite.load(ours, tmp_path / "adapter")
    with torch.no_grad():
        got, want = ours(ids()), peer(ids()).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert (got - plain).abs().max() > 1e-2 * want.abs().max()
    handle.save(tmp_path / "again")
    other = load(tmp_path / "base")
    peft_lite.load(other, tmp_path / "again")
    assert torch.equal(other(ids()), got)
    files = [load_file(tmp_path / f / "adapter_model.safetensors") for f in ("adapter", "again")]
    assert {n: t.shape for n, t in files[0].items()} == {n: t.shape for n, t in files[1].items()}


OURS: dict[str, Any] = {  # methods on query, key and value, which are c_attn in a file
    "all three": LoraConfig(["query", "key", "value"], r=3, lora_alpha=5),
    "one": LoraConfig(["key"], r=3, lora_alpha=5),
    "ranks and scalings": LoraConfig(
        ["query", "value", "mlp.up"],
        r=3,
        lora_alpha=5,
        rank_pattern={"value": 2, "mlp.up": 4},
        alpha_pattern={"query": 9},
    ),
    "root of the rank": LoraConfig(["query", "value"], r=3, lora_alpha=5, use_rslora=True),
    "some blocks": LoraConfig(r"blocks\.[02]\.attention\.(query|value)", r=3, lora_alpha=5),
    "every layer": LoraConfig("all-linear", r=3, lora_alpha=5),
    "dora": DoraConfig("all-linear", r=3, lora_alpha=5),
    "their biases": LoraConfig(["query", "key", "value"], r=3, bias="lora_only"),
    "all biases": LoraConfig(["value"], r=3, bias="all"),
    "ia3": IA3Config(["key", "value", "mlp.down"], ["mlp.down"]),
}


@pytest.mark.parametrize("name", OURS)
def test_an_adapter_of_query_key_value_opens_in_peft(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "base")
    plain = ours(ids())
    handle = peft_lite.attach(ours, OURS[name])
    torch.manual_seed(1)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    handle.save(tmp_path / "adapter")
    peer = in_peft(theirs, tmp_path / "adapter")
    with torch.no_grad():
        got, want = ours(ids()), peer(ids()).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert (got - plain).abs().max() > 1e-2 * want.abs().max()
    other = load(tmp_path / "base")
    peft_lite.load(other, tmp_path / "adapter")
    torch.testing.assert_close(other(ids()), got, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        DoraConfig(["query"], r=3),
        LoraConfig(["query"], r=3, bias="lora_only"),
        LoraConfig(["mlp.up"], r=3, modules_to_save=["query"]),
        IA3Config(["key", "value"], ["key"]),
    ],
    ids=str,
)
def test_what_has_no_form_on_c_attn_is_refused(config: Any, tmp_path: Path) -> None:
    ours, _ = pair(tmp_path / "base")
    handle = peft_lite.attach(ours, config)
    with pytest.raises(ValueError, match="no form in a file of HF PEFT"):
        handle.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_module_that_is_saved_whole_opens_in_peft(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "base")
    config = peft_lite.LoraConfig(["c_fc"], r=3, modules_to_save=["attn.c_proj", "mlp.c_proj"])
    handle = peft_lite.attach(ours, config)
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    handle.save(tmp_path / "adapter")
    peer = in_peft(theirs, tmp_path / "adapter")
    with torch.no_grad():
        got, want = ours(ids()), peer(ids()).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda n, t: t[:-1] if "c_attn.lora_B" in n else t,
            r"c_attn.lora_B.*is \[71, 3\], its row",
        ),
        (
            lambda n, t: t[:-3] if "c_attn.lora_B" in n else t,
            r"is \[23, 3\], this model wants \[24,",
        ),
        (lambda n, t: t[:, :-1] if "c_attn.lora_A" in n else t, r"is \[3, 23\], this model wants"),
    ],
)
def test_an_adapter_of_c_attn_that_does_not_fit_is_refused(
    change: Any, reason: str, tmp_path: Path
) -> None:
    ours, theirs = pair(tmp_path / "base")
    from_peft(theirs, tmp_path, PEFT[0])
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: change(n, t).clone() for n, t in load_file(file).items()}, file)
    with pytest.raises(ValueError, match=reason):
        peft_lite.load(ours, tmp_path)


def test_c_attn_as_a_whole_is_refused(tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path / "base")
    from_peft(theirs, tmp_path, {"target_modules": ["c_fc"], "modules_to_save": ["c_attn"]})
    with pytest.raises(
        ValueError, match=r"c_attn.weight is all of a layer that this model holds as q"
    ):
        peft_lite.load(ours, tmp_path)
    with pytest.raises(ValueError, match="c_attn"):  # only in files is it a name of the three
        peft_lite.attach(ours, peft_lite.LoraConfig(["c_attn"], r=3))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
def test_a_real_adapter_of_a_classifier(tmp_path: Path) -> None:
    """Its classifier has no place in a decoder, which the reason says; the rest is read."""
    source = real_data("adapters", "gpt2_lora_seqcls_mts")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V)).eval()
    theirs.save_pretrained(tmp_path / "base")
    ours = load(tmp_path / "base")
    with pytest.raises(ValueError, match=r"unexpected: base_model\.model\.score\.weight$"):
        peft_lite.load(ours, source)
    tensors = load_file(source / "adapter_model.safetensors")
    tensors.pop("base_model.model.score.weight")
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"modules_to_save": None, "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    plain = ours(ids())
    peft_lite.load(ours, tmp_path)
    peer = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        got, want = ours(ids()), peer(ids()).logits
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    assert (got - plain).abs().max() > 1e-3 * want.abs().max()


def test_absent_fields_are_those_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    ours, theirs = outline(tmp_path).config, transformers.GPT2Config()
    for name in GPT2Config.__dataclass_fields__:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_setting_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="n_embd 25 is no multiple of n_head 3"):
        GPT2Config(n_embd=25, n_head=3)
    raw = {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx True is not supported"):
        outline(tmp_path)
    with pytest.raises(ValueError, match=r"c_attn\.weight has 10 outputs, must be a multiple of 3"):
        minigpt.models.gpt2.unpack({"h.0.attn.c_attn.weight": torch.zeros(4, 10)})
