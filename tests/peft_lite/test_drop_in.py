"""A wrapper takes the place of its layer, also for a model that does more with it than call it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import BottleneckConfig, DoraConfig, IA3Config, LoraConfig
from peft_lite.wrapper import Wrapper

D = 8
CONFIGS: dict[str, Callable[[str], Any]] = {
    "lora": lambda name: LoraConfig([name], r=2, lora_alpha=7),
    "dora": lambda name: DoraConfig([name], r=2, lora_alpha=7),
    "ia3": lambda name: IA3Config([name]),
    "ia3 of inputs": lambda name: IA3Config([name], [name]),
}


@torch.no_grad()
def shake(model: nn.Module, size: float = 0.3) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(size * torch.randn_like(p))


class Past(nn.Module):
    """Multiplies by the weight of a layer that it never calls, or calls it."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.called = nn.Linear(D, 5), called

    def forward(self, x: Tensor) -> Tensor:
        if self.called:
            y: Tensor = self.layer(input=x)
            return y
        return F.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_weight_that_is_read_past_the_layer_holds_the_change(method: str) -> None:
    """Outputs and gradients are those of the layer that is called."""
    x, results = torch.randn(3, D), []
    for called in (True, False):
        model = Past(called)
        torch.manual_seed(2)
        handle = peft_lite.attach(model, CONFIGS[method]("layer"))
        fresh = model(x)
        shake(model)
        y = model(x)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(y.sin().sum(), trained)
        handle.merge()
        merged = model(x)
        handle.unmerge()
        with handle.enabled(False):
            off = model(x)
        results.append((fresh, y, merged, off, *gradients))
    assert (results[0][1] - results[0][0]).abs().max() > 0.05
    torch.testing.assert_close(results[1], results[0])


def test_what_is_read_holds_every_change_that_acts() -> None:
    model = Past(called=False)
    x = torch.randn(3, D)
    peft_lite.attach(model, CONFIGS["lora"]("layer"))
    peft_lite.attach(model, CONFIGS["ia3"]("layer"), "ia3")
    shake(model)
    y = model(x)
    model.called = True
    torch.testing.assert_close(y, model(x))


@pytest.mark.parametrize("method", CONFIGS)
def test_it_has_the_attributes_of_its_layer(method: str) -> None:
    model = nn.Sequential(nn.Linear(D, 5).bfloat16())
    layer = model[0]
    layer.note = "mine"  # type: ignore[assignment]
    peft_lite.attach(model, CONFIGS[method]("0"))
    wrapper: Any = model[0]
    assert (wrapper.in_features, wrapper.out_features, wrapper.note) == (D, 5, "mine")
    assert (wrapper.weight.dtype, wrapper.weight.shape) == (torch.bfloat16, (5, D))
    assert wrapper.bias.dtype == torch.bfloat16
    assert not hasattr(wrapper, "num_embeddings")
    twin = deepcopy(model)
    assert twin[0].in_features == D
    assert twin[0].base is not wrapper.base


def test_inside_rows_there_is_no_one_weight() -> None:
    model = Past(called=False)
    handle = peft_lite.attach(model, CONFIGS["lora"]("layer"))
    with handle.rows(["default", None]), pytest.raises(ValueError, match="a weight of its own"):
        model(torch.randn(2, D))


def test_a_weight_within_an_adapter_is_not_read_past_it() -> None:
    model = Past(called=False)
    config = BottleneckConfig("pfeiffer", 4, target_modules=["layer"])
    handle = peft_lite.attach(model, config)
    with pytest.raises(AttributeError, match="'weight' of Linear is read past the change that Bot"):
        model(torch.randn(2, D))
    with handle.enabled(False):
        model(torch.randn(2, D))
    assert model.layer.in_features == D


# --- torch's own ---------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A layer of torch's, which reads the weights of its parts past them where nothing trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.TransformerEncoderLayer(D, 2, 3 * D, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y


@pytest.mark.parametrize("layer", ["out_proj", "linear1", "linear2"])
@pytest.mark.parametrize("method", CONFIGS)
def test_multihead_attention_reads_the_changed_weight(method: str, layer: str) -> None:
    """The reference is a plain model with the weight of the closed form."""
    x = torch.randn(3, 4, D)
    model, plain = Encoder().eval(), Encoder().eval()
    before = plain(x)
    peft_lite.attach(model, CONFIGS[method](layer))
    torch.testing.assert_close(model(x), before)
    shake(model)
    (name,) = (n for n, m in model.named_modules() if n.endswith(layer))
    wrapper: Any = model.get_submodule(name)
    target: Any = plain.get_submodule(name)
    with torch.no_grad():
        if method.startswith("ia3"):
            scale = wrapper.scale
            target.weight.mul_(scale if method == "ia3 of inputs" else scale[:, None])
            if method == "ia3":
                target.bias.mul_(scale)
        else:
            target.weight.add_(3.5 * wrapper.lora_b @ wrapper.lora_a)
        if method == "dora":
            norm = target.weight.square().sum(1, keepdim=True).sqrt()
            target.weight.mul_(wrapper.magnitude[:, None] / norm)
    expected = plain(x)
    assert (expected - before).abs().max() > 0.01
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # torch's fast path
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_multihead_attention_trains_what_it_reads() -> None:
    model = Encoder()
    peft_lite.attach(model, CONFIGS["lora"]("out_proj"))
    shake(model)
    model(torch.randn(3, 4, D)).pow(3).sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all(p.grad is not None and p.grad.abs().max() > 1e-3 for p in trained)


def test_multihead_attention_trains_whole() -> None:
    """A copy of it gets keywords, gives two results and is asked for its attributes."""
    x = torch.randn(3, 4, D)
    model = Encoder()
    before = model(x)
    config = LoraConfig(["linear1"], r=2, modules_to_save=["self_attn"])
    handle = peft_lite.attach(model, config)
    torch.testing.assert_close(model(x), before)
    shake(model)
    y = model(x)
    y.pow(3).sum().backward()
    copy: Any = model.block.self_attn
    assert copy.num_heads == 2
    assert copy.in_proj_weight is copy.copy.in_proj_weight
    assert copy.in_proj_weight.grad.abs().max() > 1e-3
    assert copy.base.in_proj_weight.grad is None
    with handle.enabled(False):
        torch.testing.assert_close(model(x), before)
    handle.fold()
    torch.testing.assert_close(model(x), y)
    assert type(model.block.self_attn) is nn.MultiheadAttention


def test_dropout_would_not_act_on_a_weight_that_is_read() -> None:
    with pytest.raises(ValueError, match=r"lora_dropout, which is 0\.1, would not act: must be 0"):
        peft_lite.attach(Encoder(), LoraConfig(["out_proj"], lora_dropout=0.1))
    with pytest.raises(ValueError, match="MultiheadAttention reads the weight past the layer"):
        peft_lite.attach(Encoder(), BottleneckConfig(target_modules=["out_proj"]))


# --- this project's and transformers' -------------------------------------------------------------


@pytest.mark.parametrize("kind", [minigpt.GPTNeo, minigpt.Bert])
def test_an_attention_of_ours_trains_whole(kind: Any) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": D}
    if kind is minigpt.GPTNeo:
        model = kind(minigpt.GPTNeoConfig(**sizes, num_heads=2, num_layers=2))
    else:
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
        model = kind(minigpt.BertConfig(**sizes), "none")
    model = model.eval()
    ids = torch.arange(12).view(2, 6)
    before = model(ids)
    config = LoraConfig(["mlp.up"], r=2, modules_to_save=["attention"])
    handle = peft_lite.attach(model, config)
    torch.testing.assert_close(model(ids), before)
    shake(model)
    y = model(ids)
    assert (y - before).abs().max() > 0.01
    handle.fold()
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def t5() -> nn.Module:
    """Each `wo` is asked for its weight's dtype."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2
    )
    model: nn.Module = transformers.T5ForConditionalGeneration(config).eval()
    return model


T5: dict[str, Any] = {
    **{f"{method} of wo": config("wo") for method, config in CONFIGS.items()},
    "all linear layers": LoraConfig("all-linear", r=2, lora_dropout=0.1),
    "bottleneck": BottleneckConfig(target_modules=["DenseReluDense"], r=4),
    "bottleneck of attention": BottleneckConfig(target_modules=["SelfAttention"], r=4),
    "attention whole": LoraConfig(["wi"], r=2, modules_to_save=["SelfAttention"]),
    "wo whole": LoraConfig(["q"], r=2, modules_to_save=["wo"]),
    "token table": LoraConfig(["embed_tokens"], r=2),
}


@pytest.mark.parametrize("what", T5)
def test_t5(t5: nn.Module, what: str) -> None:
    model = deepcopy(t5)
    ids = torch.arange(12).view(2, 6)

    def logits() -> Tensor:
        y: Tensor = model(input_ids=ids, decoder_input_ids=ids).logits
        return y

    before = logits().detach()
    handle = peft_lite.attach(model, T5[what])
    torch.testing.assert_close(logits(), before)
    shake(model, 0.5)
    y = logits().detach()
    assert (y - before).abs().max() > 0.01 * before.abs().max()
    if "bottleneck" not in what and "table" not in what:  # T5 ties its table to the head
        handle.merge()
        torch.testing.assert_close(logits(), y, rtol=1e-4, atol=1e-4 * float(y.abs().max()))
    handle.detach()
    assert torch.equal(logits(), before)


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_scaled_table_is_that_of_peft(use_dora: bool) -> None:
    peft, gemma = pytest.importorskip("peft"), "transformers.models.gemma3.modeling_gemma3"
    table = pytest.importorskip(gemma).Gemma3TextScaledWordEmbedding

    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(table(11, D, padding_idx=0, embed_scale=2.5))

    ids = torch.arange(1, 11)[None]
    settings = {"r": 2, "lora_alpha": 7, "target_modules": ["0"]}
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**settings, use_dora=use_dora))
    ours = model()
    peft_lite.attach(ours, (DoraConfig if use_dora else LoraConfig)(**settings))
    shake(ours)
    layer, of_peft = ours[0], theirs.base_model.model[0]
    with torch.no_grad():
        of_peft.lora_embedding_A["default"].copy_(layer.lora_a)
        of_peft.lora_embedding_B["default"].copy_(layer.lora_b)
        if use_dora:
            of_peft.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    torch.testing.assert_close(ours(ids), theirs(ids))
    assert (ours(ids) - model()(ids)).abs().max() > 0.1


def test_a_wrapper_that_is_not_built_yet_has_no_attributes() -> None:
    """Libraries that copy or show objects ask some before `__init__` has filled them."""
    assert not hasattr(Wrapper.__new__(Wrapper), "weight")
