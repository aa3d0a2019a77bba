"""Layers of 4 bits: what `quantize` takes and refuses, and what every method makes of them."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_lite
from minigpt import Llama, LlamaConfig
from minigpt_kernels import nf4
from peft_lite import (
    BottleneckConfig,
    DoraConfig,
    FreezeConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    QuantizedLinear,
    quantize,
)
from peft_lite.quantized import is_quantized
from tests import tiny
from tests.live_bytes import LiveBytes

METHODS: dict[str, Any] = {
    "lora": LoraConfig("all-linear", r=3, lora_alpha=7),
    "lora and biases": LoraConfig("all-linear", r=3, bias="all"),
    "dora": DoraConfig("all-linear", r=3, lora_alpha=7),
    "ia3": IA3Config(["key", "value", "mlp.down"], ["mlp.down"]),
    "bottleneck": BottleneckConfig("houlsby", 5),
    "prefix": PrefixConfig(3),
}
MERGED = ("lora", "dora", "ia3")
IDS = torch.arange(18).view(2, 9) % 11


def model() -> nn.Module:
    it = tiny.gpt_neo(0).eval()
    quantize(it)
    torch.manual_seed(0)
    return it


def dense_twin(it: nn.Module) -> nn.Module:
    """The same model with the dequantised weights in dense layers."""
    twin = tiny.gpt_neo(0).eval()
    for name, layer in it.named_modules():
        if is_quantized(layer):
            twin.get_submodule(name).weight.data = nf4.dequantize(layer.quantized)  # type: ignore[union-attr]
    return twin


@torch.no_grad()
def shake(it: nn.Module) -> None:
    random = torch.Generator().manual_seed(1)
    for p in it.parameters():
        if p.requires_grad:
            p.add_(0.1 * torch.randn(p.shape, generator=random))


def test_linear_layers_but_the_head_are_quantised() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    it = Llama(LlamaConfig(num_attention_heads=4, **sizes), "causal-lm")
    names = quantize(it)
    linear = {name for name, m in it.named_modules() if isinstance(m, nn.Linear)}
    assert linear - {*names} == {"head"}
    assert {name for name, m in it.named_modules() if is_quantized(m)} == {*names}


def test_the_head_of_another_library_stays_dense() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    it = transformers.LlamaForCausalLM(config)
    before = it(IDS).logits
    quantize(it)
    assert not is_quantized(it.lm_head)
    assert is_quantized(it.model.layers[0].mlp.up_proj)
    assert 0 < (it(IDS).logits - before).abs().max() < 0.5


def test_the_model_is_that_of_the_dequantised_weights() -> None:
    it = model()
    torch.testing.assert_close(it(IDS), dense_twin(it)(IDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_those_of_a_dense_twin(method: str) -> None:
    it = model()
    twin = dense_twin(it)
    for each in (it, twin):
        torch.manual_seed(3)
        peft_lite.attach(each, METHODS[method])
        shake(each)
    y, want = it(IDS), twin(IDS)
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    want.square().sum().backward()
    ours = {n: p.grad for n, p in it.named_parameters() if p.requires_grad}
    theirs = {n: p.grad for n, p in twin.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_comes_goes_and_is_saved(method: str, tmp_path: Path) -> None:
    it = model()
    before, bits = it(IDS), {n: t.clone() for n, t in it.state_dict().items()}
    handle = peft_lite.attach(it, METHODS[method])
    shake(it)
    changed = it(IDS)
    with handle.enabled(False):
        assert torch.equal(it(IDS), before)
    copy = deepcopy(it)
    assert torch.equal(copy(IDS), changed)
    handle.save(tmp_path)
    handle.detach()
    assert torch.equal(it(IDS), before)
    assert all(torch.equal(t, bits[n]) for n, t in it.state_dict().items())
    peft_lite.load(it, tmp_path)
    assert torch.equal(it(IDS), changed)


@pytest.mark.parametrize("method", MERGED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_it_is_a_dense_copy_and_says_so(
    method: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    it = model().to(dtype)
    handle = peft_lite.attach(it, METHODS[method])
    shake(it)
    changed, codes = it(IDS), it.state_dict()
    limit = 40 * torch.finfo(dtype).eps * changed.abs().max().item()
    tolerance = {"rtol": 0, "atol": limit}
    handle.merge()
    assert "hold dense copies now" in caplog.text
    torch.testing.assert_close(it(IDS), changed, **tolerance)
    handle.unmerge()
    assert torch.equal(it(IDS), changed)
    assert all(torch.equal(t, codes[n]) for n, t in it.state_dict().items())
    handle.fold()
    torch.testing.assert_close(it(IDS), changed, **tolerance)
    dense = [m for m in it.modules() if isinstance(m, nn.Linear) and not is_quantized(m)]
    assert all(type(m) is not QuantizedLinear and m.weight.dtype == dtype for m in dense)


def test_the_error_of_quantising_again_is_the_one_that_is_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    it = nn.Sequential(nn.Linear(64, 32))
    quantize(it)
    handle = peft_lite.attach(it, LoraConfig(["0"], r=4))
    shake(it)
    w = it[0].weight.detach()  # type: ignore[union-attr]
    again = nf4.dequantize(nf4.quantize(w))  # type: ignore[arg-type]
    handle.merge()
    assert f"be off by {100 * (again - w).norm() / w.norm():.2f} %" in caplog.text


def test_two_methods_are_merged_and_folded_together() -> None:
    it = model()
    handle = peft_lite.attach(it, METHODS["lora"], "a")
    peft_lite.attach(it, METHODS["ia3"], "b")
    shake(it)
    changed = it(IDS)
    handle.fold()
    torch.testing.assert_close(it(IDS), changed, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(m, QuantizedLinear) and not is_quantized(m) for m in it.modules())


def test_rows_and_switching() -> None:
    it = model()
    before = it(IDS)
    handle = peft_lite.attach(it, METHODS["lora"], "a")
    shake(it)
    a = it(IDS)
    peft_lite.attach(it, METHODS["lora"], "b")
    assert torch.equal(it(IDS), before)
    handle.switch("a")
    assert torch.equal(it(IDS), a)
    with handle.rows(["a", None]):
        torch.testing.assert_close(it(IDS), torch.stack([a[0], before[1]]), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_closed_form() -> None:
    """dX = dY deq(W) + s (dY B) A, and those of A and B, in float64."""
    layer = nn.Linear(40, 24)
    it = nn.Sequential(layer)
    quantize(it)
    peft_lite.attach(it, LoraConfig(["0"], r=4, lora_alpha=6))
    shake(it)
    wrapper: Any = it[0]
    W = nf4.dequantize(wrapper.base.quantized, torch.float32).double()
    A, B, s = wrapper.lora_a.detach().double(), wrapper.lora_b.detach().double(), 6 / 4
    x = torch.randn(7, 40, requires_grad=True)
    dy = torch.randn(7, 24)
    it(x).backward(dy)
    X, dY = x.detach().double(), dy.double()
    want = (dY @ W + s * dY @ B @ A, s * (dY @ B).T @ X, s * dY.T @ (X @ A.T))
    assert x.grad is not None
    for got, closed in zip((x.grad, wrapper.lora_a.grad, wrapper.lora_b.grad), want, strict=True):
        torch.testing.assert_close(got.double(), closed, rtol=1e-5, atol=1e-5)


def test_checkpointing_and_autocast() -> None:
    it = model()
    peft_lite.attach(it, METHODS["lora"])
    shake(it)
    it.zero_grad()
    it(IDS).square().sum().backward()
    plain = [p.grad.clone() for p in it.parameters() if p.grad is not None]
    it.zero_grad()
    checkpoint(it, IDS, use_reentrant=False).square().sum().backward()
    again = [p.grad for p in it.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        y = it(IDS)
    assert 0 < (y - it(IDS)).abs().max() < 0.2


def test_the_scales_keep_their_bits_when_the_model_moves() -> None:
    it = model()
    before = {n: t.clone() for n, t in it.state_dict().items() if "scales" in n or "offset" in n}
    it.to(torch.bfloat16).to(torch.float16).float()
    after = it.state_dict()
    assert before
    assert all(torch.equal(t, after[n]) and t.dtype == after[n].dtype for n, t in before.items())
    assert it.bfloat16()(IDS).dtype == torch.bfloat16


def test_a_state_dict_comes_back() -> None:
    it, other = model(), tiny.gpt_neo(5).eval()
    quantize(other)
    other.load_state_dict(it.state_dict())
    assert torch.equal(other(IDS), it(IDS))


def test_the_table_counts_what_the_bits_stand_for() -> None:
    dense = peft_lite.report(tiny.gpt_neo(0))
    it = model()
    table = peft_lite.report(it)
    assert table.total == dense.total
    weights = [m.quantized for m in it.modules() if is_quantized(m)]
    stored = sum(w.nbytes for w in weights)
    left = sum(p.nbytes for p in it.parameters() if p.is_floating_point())
    assert table.total_bytes == stored + left


def test_nothing_dense_lives_beyond_a_layer() -> None:
    """Live bytes: forward and backward of a stack never hold more than one dense weight."""
    width, layers = 1024, 6
    it = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    quantize(it)
    peft_lite.attach(it, LoraConfig("all-linear", r=2))
    x = torch.randn(1, width)
    it(x)  # makes the table of codes
    live = LiveBytes()
    with live:
        it(x).sum().backward()
    dense = width * width * 4
    assert 0 < live.most < 2 * dense


def test_what_cannot_be_quantised_is_refused_and_nothing_has_changed() -> None:
    class Tripled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    def hooked() -> nn.Module:
        layer = nn.Linear(4, 4)
        layer.register_forward_hook(lambda *_: None)
        return layer

    def not_finite() -> nn.Module:
        layer = nn.Linear(4, 4)
        layer.weight.data[1, 2] = float("nan")
        return layer

    def tied() -> nn.Module:
        layer = nn.Linear(4, 4)
        layer.again = nn.Linear(4, 4)
        layer.again.weight = layer.weight
        return layer

    reasons = {
        "forward pass of its own": lambda: Tripled(4, 4),
        "it has hooks": hooked,
        "NaN or an infinite": not_finite,
        "its weight is torch.float64": lambda: nn.Linear(4, 4).double(),
        "reads its weight past the layer": lambda: nn.MultiheadAttention(4, 2),
        "its weight is parametrized": lambda: nn.utils.parametrizations.weight_norm(
            nn.Linear(4, 4)
        ),
        "its weight is 1.again.weight, too": tied,
    }
    for reason, make in reasons.items():
        it = nn.Sequential(nn.Linear(4, 4), make())
        with pytest.raises(ValueError, match=reason):
            quantize(it)
        assert not any(is_quantized(m) for m in it.modules())
    with pytest.raises(ValueError, match=r"codec is 'nf3', must be nf4 \(did you mean 'nf4'"):
        quantize(nn.Sequential(nn.Linear(4, 4)), "nf3")
    with pytest.raises(ValueError, match="codec is 4, must be nf4"):
        quantize(nn.Sequential(nn.Linear(4, 4)), 4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"skip: 'querry' is part of no layer.* 'query'"):
        quantize(tiny.gpt_neo(0), skip=["querry"])
    with pytest.raises(ValueError, match="no linear layer"):
        quantize(nn.Sequential(nn.Embedding(4, 4)))
    attached = tiny.gpt_neo(0)
    peft_lite.attach(attached, METHODS["lora"])
    with pytest.raises(ValueError, match="quantize first"):
        quantize(attached)


def test_names_that_are_skipped_stay_dense() -> None:
    it = tiny.gpt_neo(0)
    names = quantize(it, skip=["head", "attention", "blocks.0"])
    assert names == ["blocks.1.mlp.up", "blocks.1.mlp.down"]


def test_codes_do_not_train() -> None:
    with pytest.raises(ValueError, match=r"weight is packed as torch\.uint8: it cannot train"):
        peft_lite.attach(model(), FreezeConfig(train=["mlp"]))
    it = model()
    peft_lite.attach(it, FreezeConfig(train=["mlp_norm"]))
    assert it(IDS).requires_grad
