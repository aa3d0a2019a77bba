"""Llama, Mistral, Qwen2 and Qwen3 against transformers, from random weights."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt.checkpoints.directory import load, outline, save
from minigpt.generation import generate
from minigpt.models.architectures import ARCHITECTURES
from minigpt.models.attention import naive_attention
from minigpt.models.llama import FAMILY, Llama, LlamaConfig
from minigpt.models.norms import RMSNorm
from minigpt.models.rotary import frequencies, rotate, rotation

V, T = 97, 13
SIZES = {
    "vocab_size": V,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, one head of keys each": ("llama", {"num_key_value_heads": 6}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 10}),
    "llama, theta": ("llama", {"rope_theta": 500.0}),
    "llama, linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA3}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 5}),
    "mistral, window of one": ("mistral", {"sliding_window": 1}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3, biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "qwen3, layer types": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def pair(case: str, folder: Path) -> tuple[Llama, Any]:
    """The model of transformers, with every weight moved, and ours, loaded from its files."""
    kind, settings = CASES[case]
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.eval().save_pretrained(folder)
    ours = load(folder)
    assert isinstance(ours, Llama)
    return ours, theirs


def ids(B: int = 2, length: int = T) -> Tensor:
    return torch.randint(0, V, (B, length), generator=torch.Generator().manual_seed(1))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, tmp_path)
    x = ids()
    with torch.no_grad():
        close(ours(x), theirs(x).logits)
        for side in ("left", "right"):
            mask = torch.ones(2, T, dtype=torch.long)
            mask[1, slice(0, 4) if side == "left" else slice(T - 4, T)] = 0
            places = (mask.cumsum(1) - 1).clamp(min=0)
            real = mask.bool()
            got, want = ours(x, mask, places), theirs(x, mask, position_ids=places).logits
            close(got[real], want[real])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, tmp_path)
    x = ids()
    dy = torch.randn(2, T, V, generator=torch.Generator().manual_seed(2))
    (ours(x) * dy).sum().backward()
    (theirs(x).logits * dy).sum().backward()
    wanted = {n: p.grad for n, p in theirs.named_parameters()}
    given = {ours.names.to_hf(n): p.grad for n, p in ours.named_parameters()}
    assert given.keys() == wanted.keys()
    for name, want in wanted.items():
        torch.testing.assert_close(given[name], want, rtol=1e-3, atol=3e-5 * want.abs().max())


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, tmp_path)
    x = ids()
    mask = torch.ones_like(x)
    mask[1, :5] = 0
    want = theirs.generate(
        input_ids=x,
        attention_mask=mask,
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        use_cache=case != "mistral, window of one",  # of which transformers' cache keeps no key
    )
    got = generate(ours, x, 20, attention_mask=mask, temperature=0)
    assert torch.equal(got[:, T:], want[:, T:])


@pytest.mark.parametrize("case", CASES)
def test_what_is_saved_opens_in_transformers_and_here(case: str, tmp_path: Path) -> None:
    ours, theirs = pair(case, tmp_path / "a")
    save(ours, tmp_path / "b")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert type(again) is type(theirs)
    x = ids()
    with torch.no_grad():
        assert torch.equal(again(x).logits, theirs(x).logits)
        assert torch.equal(load(tmp_path / "b")(x), ours(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_that_of_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    _, theirs = pair("llama, llama3", tmp_path)
    x = ids()
    with torch.no_grad():
        exact = theirs.double()(x).logits
        mine, peer = load(tmp_path, dtype=dtype)(x), theirs.to(dtype)(x).logits
    error, allowed = ((y.double() - exact).norm() for y in (mine, peer))
    assert error <= 1.5 * allowed


def test_the_naive_form_of_grouped_heads_is_that_of_repeated_ones(tmp_path: Path) -> None:
    ours, _ = pair("mistral, window", tmp_path)
    x = ids()
    with torch.no_grad():
        fast = ours(x)
        for block in ours.blocks:
            block.attention.attend = naive_attention
        close(ours(x), fast)


def test_a_product_of_rotated_heads_depends_on_the_distance_alone() -> None:
    f = frequencies(8, 10000.0, {}, torch.device("cpu")).double()
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=random)

    def product(m: int, n: int) -> float:
        turned = [
            rotate(x, *rotation(torch.tensor([[place]]), f, torch.float64))
            for x, place in ((q, m), (k, n))
        ]
        return float((turned[0] * turned[1]).sum())

    for m, n in ((3, 1), (20, 17), (5, 40)):
        assert product(m, n) == pytest.approx(product(m + 100, n + 100), abs=1e-12)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-12)
    assert abs(product(3, 1) - product(4, 1)) > 1e-3


def test_the_norm_is_its_equation_and_rounds_before_the_scale() -> None:
    norm = RMSNorm(6, 1e-3)
    nn.init.uniform_(norm.weight, 0.5, 2)
    x = torch.randn(4, 6)
    wide = x.double()
    want = norm.weight.double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x).double(), want, rtol=1e-6, atol=1e-6)
    half = norm.bfloat16()
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(6, 1e-3).bfloat16()
    theirs.weight = half.weight
    assert torch.equal(half(x.bfloat16()), theirs(x.bfloat16()))


@pytest.mark.parametrize("kind", FAMILY)
def test_absent_fields_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    ours: Any = outline(tmp_path).config
    theirs = transformers.AutoConfig.for_model(kind)
    for name in (
        *("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "hidden_act", "rms_norm_eps"),
        *("attention_dropout", "initializer_range", "bos_token_id", "eos_token_id"),
        "tie_word_embeddings",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    wide = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert ours.head_width == wide


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral', must be one of llama, mistral"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is no multiple of num_key_value_heads"),
        ({"hidden_size": 25}, "hidden_size 25 is no multiple of num_attention_heads 6"),
        ({"head_dim": 5}, "head_dim is 5, must be even"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type is 'yarn', must be one of default"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is None, must be a positive number"),
        ({"sliding_window": 4}, "a llama has none"),
        (
            {"model_type": "qwen2", "attention_bias": True},
            "attention_bias is True, a qwen2 has no such bias",
        ),
        ({"model_type": "qwen3", "layer_types": ("full",) * 3}, "layer_types"),
        ({"hidden_act": "swish2"}, "hidden_act is 'swish2'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LlamaConfig(**SIZES | settings)


METHODS = {
    "lora": peft_lite.LoraConfig("all-linear", r=3, lora_alpha=5),
    "dora": peft_lite.DoraConfig(["query", "value", "gate"], r=3, lora_alpha=5),
    "bottleneck": peft_lite.BottleneckConfig("houlsby", 5),
    "prefix": peft_lite.PrefixConfig(4),
    "prefix of peft": peft_lite.PrefixConfig(4, form="peft"),
    "prompt": peft_lite.PromptConfig(4),
    "ia3": peft_lite.IA3Config(["key", "value", "mlp.down"], ["mlp.down"]),
    "freeze": peft_lite.FreezeConfig(train=["lm_head"]),
}


@pytest.mark.parametrize("kind", ["llama", "mistral, window", "qwen3, biases"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_saves_and_loads(kind: str, method: str, tmp_path: Path) -> None:
    model, _ = pair(kind, tmp_path / "base")
    x = ids()
    with torch.no_grad():
        before = model(x)
    handle = peft_lite.attach(model, METHODS[method])
    moved = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(moved, lr=0.1)
    for _ in range(2):
        model(x).square().mean().backward()
        assert all(p.grad is not None for p in moved)
        optimizer.step()
    with torch.no_grad():
        after = model.eval()(x)
    assert (after - before).abs().max() > 1e-4
    handle.save(tmp_path / "adapter")
    again = load(tmp_path / "base")
    peft_lite.load(again, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(x), after, rtol=1e-5, atol=1e-5)
    whole = x[:, :5]
    cached = generate(again, whole, 6, temperature=0)
    for _ in range(6):
        with torch.no_grad():
            whole = torch.cat([whole, again(whole)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, whole)


def test_lora_opens_in_peft_with_equal_logits(tmp_path: Path) -> None:
    import peft

    ours, theirs = pair("llama", tmp_path / "base")
    handle = peft_lite.attach(ours, METHODS["lora"])
    with torch.no_grad():
        for p in ours.parameters():
            if p.requires_grad:
                p.normal_(std=0.1)
    handle.save(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a name that transformers retires
        peer = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        close(ours(ids()), peer(ids()).logits)


def test_the_package_names_the_model() -> None:
    assert minigpt.Llama is Llama
    assert minigpt.LlamaConfig is LlamaConfig


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_rotation_of_part_of_a_head_is_refused(kind: str) -> None:
    read = ARCHITECTURES[kind].config_from
    assert read({"model_type": kind, "partial_rotary_factor": 1.0}) == read({"model_type": kind})
    with pytest.raises(ValueError, match=r"partial_rotary_factor 0\.5 is not supported"):
        read({"model_type": kind, "partial_rotary_factor": 0.5})
