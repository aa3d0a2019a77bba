"""A method adds its own term to what its layer gives, whatever the layer does."""

import inspect
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import minigpt
import peft_lite
from minigpt.models.linear import Linear
from minigpt.objectives.causal import language_model_loss
from minigpt.training.train import TrainConfig, train
from peft_lite import DoraConfig, IA3Config, LoraConfig
from peft_lite.lora import LoraLinear, plain_linear
from tests import tiny

K, N, R, V = 7, 5, 3, 11
X = torch.randn(4, 6, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
IDS = torch.arange(12).view(3, 4) % V
S = 10 / R


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class OursTripled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Inherited(nn.Linear):
    """Of another name, yet plain."""


class Packed(nn.Linear):
    """Codes in int8 and a scale for each output, as the layers of bitsandbytes hold them."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        scale = self.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (self.weight.detach() / scale).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Dressed(nn.Embedding):
    """Scaled, as Gemma's token table is."""

    def forward(self, ids: Tensor) -> Tensor:
        return 10 * super().forward(ids)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda _module, _x, y: 2 * y + 1)
    return layer


def pre_hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda _module, x: (x[0] - 1,))
    return layer


def patched(layer: nn.Module) -> nn.Module:
    plain = layer.forward
    layer.forward = lambda x: plain(x) + 4  # type: ignore[method-assign]
    return layer


SPECIAL: dict[str, Callable[[], nn.Module]] = {
    "subclass": lambda: Tripled(K, N),
    "subclass of ours": lambda: OursTripled(K, N),
    "forward hook": lambda: hooked(nn.Linear(K, N)),
    "forward pre-hook": lambda: pre_hooked(nn.Linear(K, N)),
    "forward of the instance": lambda: patched(nn.Linear(K, N)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(K, N)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(K, N), "weight", 0.5),
    "packed": lambda: Packed(K, N),
}
PLAIN: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.Linear(K, N),
    "without bias": lambda: nn.Linear(K, N, bias=False),
    "ours": lambda: Linear(K, N),
    "inherited": lambda: Inherited(K, N),
}
EVERY = SPECIAL | PLAIN
TABLES: dict[str, Callable[[], nn.Embedding]] = {
    "scaled": lambda: Dressed(V, K),
    "padding": lambda: nn.Embedding(V, K, padding_idx=3),
    "max_norm": lambda: nn.Embedding(V, K, max_norm=0.5),
    "hook": lambda: hooked(nn.Embedding(V, K)),  # type: ignore[dict-item, return-value]
}
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(["0"], r=R, lora_alpha=10),
    "dora": DoraConfig(["0"], r=R, lora_alpha=10),
    "ia3": IA3Config(["0"]),
    "ia3 of inputs": IA3Config(["0"], ["0"]),
}


def made(make: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(make()).double().eval()


@torch.no_grad()
def shake(layer: Any) -> None:
    torch.manual_seed(1)
    for p in layer.trained():
        p.add_(torch.randn_like(p))


def update(layer: Any) -> Tensor:
    return S * X @ layer.lora_a.double().T @ layer.lora_b.double().T


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", EVERY)
def test_a_fresh_method_changes_no_output(base: str, config: str) -> None:
    model = made(EVERY[base])
    before = model(X)
    if base == "packed" and config == "dora":  # its norm needs the weights themselves
        with pytest.raises(ValueError, match=r"Packed is packed as torch\.int8"):
            peft_lite.attach(model, CONFIGS[config])
        assert torch.equal(model(X), before)
        return
    peft_lite.attach(model, CONFIGS[config])
    torch.testing.assert_close(model(X), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", EVERY)
def test_lora_adds_its_update_to_what_the_layer_gives(base: str) -> None:
    model = made(EVERY[base])
    before = model(X)
    peft_lite.attach(model, CONFIGS["lora"])
    shake(model[0])
    assert update(model[0]).abs().max() > 1
    torch.testing.assert_close(model(X), before + update(model[0]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", EVERY.keys() - {"packed"})
def test_dora_scales_what_the_layer_gives_without_its_bias(base: str) -> None:
    model = made(EVERY[base])
    before = model(X)
    bias = 0 if model[0].bias is None else model[0].bias.detach()
    peft_lite.attach(model, CONFIGS["dora"])
    lora = model[0]
    shake(lora)
    v = lora.layer.weight + S * lora.lora_b @ lora.lora_a
    gain = lora.magnitude / v.square().sum(1).sqrt()
    expected = gain * (before - bias + update(lora)) + bias
    torch.testing.assert_close(model(X), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("base", EVERY)
def test_gradients_are_those_of_the_terms(base: str) -> None:
    model = made(EVERY[base])
    peft_lite.attach(model, CONFIGS["lora"])
    layer: Any = model[0]
    shake(layer)
    model(X).sin().sum().backward()
    gradients = layer.lora_a.grad, layer.lora_b.grad
    y = layer.base(X) + update(layer)
    expected = torch.autograd.grad(y.sin().sum(), (layer.lora_a, layer.lora_b))
    # the factors of a packed layer are float32, and so are their gradients
    tolerance = 2000 * torch.finfo(layer.lora_a.dtype).eps
    torch.testing.assert_close(gradients, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_is_called_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(Tripled(K, N)).to(dtype)
    peft_lite.attach(model, CONFIGS["lora"])
    assert model[0].lora_a.dtype == torch.float32
    assert model(X.to(dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(X.float()).dtype == torch.bfloat16


def test_dropout_of_a_layer_that_is_called_drops_inputs_of_a_in_training_only() -> None:
    model = made(lambda: Tripled(K, N))
    before = model(X)
    peft_lite.attach(model, LoraConfig(["0"], r=R, lora_alpha=10, lora_dropout=0.5))
    layer: Any = model[0]
    shake(layer)
    torch.testing.assert_close(model(X), before + update(layer))
    model.train()
    torch.manual_seed(2)
    dropped = model(X)
    torch.manual_seed(2)
    x = F.dropout(X, 0.5)
    torch.testing.assert_close(dropped, before + S * x @ layer.lora_a.T @ layer.lora_b.T)


@pytest.mark.parametrize("config", ["lora", "dora"])
@pytest.mark.parametrize("inside", [False, True], ids=["at the wrapper", "at the layer"])
def test_hooks_set_after_attaching_are_called(inside: bool, config: str) -> None:
    model = made(lambda: nn.Linear(K, N))
    peft_lite.attach(model, CONFIGS[config])
    calls: list[str] = []
    layer: Any = model[0].base if inside else model[0]
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    model(X.clone().requires_grad_()).sum().backward()
    assert calls == ["before", "forward", "backward"]


def test_what_is_inside_and_active_is_called() -> None:
    """Two LoRAs of one batch on one layer, and a wrapper inside one."""
    model = made(lambda: nn.Linear(K, N))
    before = model(X)
    peft_lite.attach(model, CONFIGS["lora"], "a")
    handle = peft_lite.attach(model, CONFIGS["lora"], "b")
    outer, inner = model[0], model[0].base  # type: ignore[union-attr]
    shake(inner)
    assert plain_linear(inner) is not None
    torch.testing.assert_close(model(X), before + update(outer))
    inner.active = True  # as a wrapper of any other kind would be
    torch.testing.assert_close(model(X), before + update(inner) + update(outer))
    inner.active = False
    shake(outer)
    outer.lora_a.data *= 2
    with handle.rows(["a", None, "b", "a"]):
        y = model(X)
    expected = before.clone()
    for row, layer in ((0, inner), (2, outer), (3, inner)):
        expected[row] += update(layer)[row]
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("base", EVERY)
def test_the_fused_product_computes_plain_layers_and_no_others(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    fused = peft_lite.lora.lora_linear
    monkeypatch.setattr(
        peft_lite.lora, "lora_linear", lambda *args: calls.append(1) or fused(*args)
    )
    model = made(EVERY[base])
    peft_lite.attach(model, CONFIGS["lora"])
    model(X)
    assert len(calls) == (base in PLAIN)


@pytest.mark.parametrize("config", ["lora", "dora"])
@pytest.mark.parametrize("table", TABLES)
def test_a_table_is_called_and_its_update_added(table: str, config: str) -> None:
    model = made(TABLES[table])
    before = model(IDS)
    if (table, config) == ("max_norm", "dora"):  # its columns change as they are read
        with pytest.raises(ValueError, match="rescales its rows to max_norm"):
            peft_lite.attach(model, CONFIGS[config])
        return
    peft_lite.attach(model, CONFIGS[config])
    torch.testing.assert_close(model(IDS), before, rtol=1e-12, atol=1e-12)
    layer: Any = model[0]
    if config == "lora":
        shake(layer)
        added = S * (layer.lora_b @ layer.lora_a).T[IDS]
        assert added.abs().max() > 1
        torch.testing.assert_close(model(IDS), before + added)


def test_the_padding_row_of_a_table_does_not_train() -> None:
    model = made(TABLES["padding"])
    row = model[0].weight[3].clone()
    handle = peft_lite.attach(model, CONFIGS["lora"])
    optimizer = torch.optim.SGD(model[0].trained(), 0.1)  # type: ignore[operator]
    (model(IDS) + 1).square().sum().backward()
    optimizer.step()
    handle.fold()
    assert torch.equal(model[0].weight[3], row)


REASONS = {
    "subclass": "Tripled has a forward pass of its own",
    "subclass of ours": "OursTripled has a forward pass of its own",
    "forward hook": "Linear has forward hooks",
    "forward pre-hook": "Linear has forward hooks",
    "forward of the instance": "Linear has a forward pass of its own",
    "weight norm": "ParametrizedLinear is parametrized or pruned",
    "pruned": "Linear is parametrized or pruned",
    "packed": "Packed has a forward pass of its own",
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", SPECIAL)
def test_merging_into_a_layer_that_is_not_plain_is_refused(base: str, config: str) -> None:
    if base == "packed" and config == "dora":
        return
    model = made(SPECIAL[base])
    handle = peft_lite.attach(model, CONFIGS[config])
    shake(model[0])
    before = model(X)
    for merge in (handle.merge, handle.fold):
        with pytest.raises(ValueError, match=f"cannot merge 'default' into 0: .*{REASONS[base]}"):
            merge()
    assert torch.equal(model(X), before)


@pytest.mark.parametrize(
    ("table", "reason"),
    [("scaled", "Dressed has"), ("max_norm", "rows to max_norm"), ("hook", "forward hooks")],
)
def test_merging_into_a_table_that_is_not_plain_is_refused(table: str, reason: str) -> None:
    model = made(TABLES[table])
    handle = peft_lite.attach(model, CONFIGS["lora"])
    with pytest.raises(ValueError, match=reason):
        handle.merge()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("base", PLAIN)
def test_merging_into_a_plain_layer_computes_the_same(base: str, config: str) -> None:
    model = made(PLAIN[base])
    handle = peft_lite.attach(model, CONFIGS[config])
    shake(model[0])
    before = model(X)
    handle.merge()
    torch.testing.assert_close(model(X), before)


# --- the line that holds the equation is the one that runs ---------------------------------------


@pytest.fixture
def lines_run() -> Iterator[set[int]]:
    """Line numbers of `LoraLinear.changed` that are executed."""
    code, seen = LoraLinear.changed.__code__, set()

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code is not code:
            return None
        seen.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    yield seen
    sys.settrace(before)


def test_a_default_finetune_step_runs_the_line_of_the_equation(lines_run: set[int]) -> None:
    source, first = inspect.getsourcelines(LoraLinear.changed)
    equation = "# y = base(x) + s (drop(x) A^T) B^T"
    (comment,) = (i for i, line in enumerate(source) if equation in line)
    model = minigpt.load("bundled")
    peft_lite.attach(model, LoraConfig(["query", "value"], r=8, lora_alpha=16))
    train(model, language_model_loss, tiny.batch, TrainConfig(steps=1))
    assert first + comment + 1 in lines_run
