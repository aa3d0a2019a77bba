"""Every method on every kind of module: a fresh one changes no output, a merged one computes what
it computed before, a detached one leaves every bit as it was; or a ValueError says why not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune

import minigpt
import peft_lite
from minigpt.models.linear import Linear
from minigpt_kernels import nf4
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    FreezeConfig,
    IA3Config,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    QuantizedLinear,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Complex modules:UserWarning"),
]

K, N, V = 6, 8, 11
Make = Callable[[], nn.Module]


class Model(nn.Module):
    """The module at hand and a plain layer after it, in the module's dtype."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.part = module
        self.after = nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.part(x).to(self.after.weight.dtype))
        return y


class Twice(nn.Module):
    """One module under two names, and its weight in a second module: three uses of one weight."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.part = self.again = module
        self.tied = deepcopy(module)
        self.tied.weight = module.weight
        self.after = nn.Linear(N, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.part(x) * 2 + self.again(x) + self.tied(x))
        return y


class Tripled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x) + 1


class OursTripled(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x) + 1


class Inherited(nn.Linear):
    """Of another name, yet plain."""


class Packed(nn.Linear):
    """Codes and a scale for each output, as quantized layers hold them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(K, N)
        self.register_buffer("scale", self.weight.detach().abs().amax(1, keepdim=True) / 100)
        codes = self.weight.detach() / self.scale
        codes = codes if dtype.is_floating_point else codes.round()
        self.weight = nn.Parameter(codes.to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


class Scaled(nn.Embedding):
    """Rows times ten, by a forward pass of its own."""

    def forward(self, ids: Tensor) -> Tensor:
        return 10 * super().forward(ids)


class Gemma(nn.Embedding):
    """Rows times `embed_scale`, as Gemma's token table has them."""

    embed_scale = 2.5

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Lowered(nn.Module):
    """A parametrization: the weight is computed."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight - 0.1


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _module, _x, y: 2 * y + 1)
    return module


def pre_hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda _module, x: (x[0] - 1,))
    return module


def backward_hooked(module: nn.Module) -> nn.Module:
    module.register_full_backward_hook(lambda _module, dx, _dy: tuple(2 * d for d in dx))
    return module


def patched(module: nn.Module) -> nn.Module:
    plain = module.forward
    module.forward = lambda x: plain(x) + 4  # type: ignore[method-assign]
    return module


def parametrized(module: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(module, "weight", Lowered())
    return module


def with_zeros(module: Any) -> nn.Module:
    """A row and a column without direction."""
    module.weight.data[1], module.weight.data[:, 2] = 0, 0
    return module  # type: ignore[no-any-return]


def with_padding(module: Any) -> nn.Module:
    """A padding row as BERT's checkpoints have it: not of zeros."""
    module.weight.data[3] = torch.linspace(-1, 1, N)
    return module  # type: ignore[no-any-return]


def in_4_bits(layer: nn.Linear) -> nn.Module:
    return QuantizedLinear(layer, nf4.quantize(layer.weight))


LINEAR: dict[str, Make] = {
    "linear": lambda: nn.Linear(K, N),
    "without bias": lambda: nn.Linear(K, N, bias=False),
    "ours": lambda: Linear(K, N),
    "inherited": lambda: Inherited(K, N),
    "square": lambda: nn.Linear(N, N),
    "bfloat16": lambda: nn.Linear(K, N).bfloat16(),
    "float16": lambda: nn.Linear(K, N).half(),
    "float64": lambda: nn.Linear(K, N).double(),
    "zero rows": lambda: with_zeros(nn.Linear(K, N)),
    "zero rows, hooked": lambda: hooked(with_zeros(nn.Linear(K, N))),
    "subclass": lambda: Tripled(K, N),
    "subclass of ours": lambda: OursTripled(K, N),
    "subclass in bfloat16": lambda: Tripled(K, N).bfloat16(),
    "forward hook": lambda: hooked(nn.Linear(K, N)),
    "forward pre-hook": lambda: pre_hooked(nn.Linear(K, N)),
    "backward hook": lambda: backward_hooked(nn.Linear(K, N)),
    "forward of the instance": lambda: patched(nn.Linear(K, N)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(K, N)),
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(K, N)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(K, N)),
    "parametrized": lambda: parametrized(nn.Linear(K, N)),
    "pruned": lambda: prune.random_unstructured(nn.Linear(K, N), "weight", 0.5),
    "packed in int8": lambda: Packed(torch.int8),
    "packed in float8": lambda: Packed(torch.float8_e4m3fn),
    "packed in 4 bits": lambda: in_4_bits(nn.Linear(K, N)),
    "packed in 4 bits without bias": lambda: in_4_bits(nn.Linear(K, N, bias=False)),
    "lazy": lambda: nn.LazyLinear(N),
    "complex": lambda: nn.Linear(K, N, dtype=torch.complex64),
}
TABLE: dict[str, Make] = {
    "table": lambda: nn.Embedding(V, N),
    "padding": lambda: with_padding(with_zeros(nn.Embedding(V, N, padding_idx=3))),
    "max_norm": lambda: nn.Embedding(V, N, max_norm=0.5),
    "scaled": lambda: Scaled(V, N),
    "embed_scale": lambda: with_padding(Gemma(V, N, padding_idx=3)),
    "hooked table": lambda: hooked(nn.Embedding(V, N)),
    "parametrized table": lambda: parametrized(nn.Embedding(V, N)),
    "table in bfloat16": lambda: with_padding(nn.Embedding(V, N, padding_idx=3)).bfloat16(),
    "sparse": lambda: nn.Embedding(V, N, sparse=True),
}
MODULES = LINEAR | TABLE
METHODS: dict[str, Any] = {
    "lora": LoraConfig(["part"], r=2, lora_alpha=7),
    "dora": DoraConfig(["part"], r=2, lora_alpha=7),
    "ia3": IA3Config(["part"]),
    "ia3 of inputs": IA3Config(["part"], ["part"]),
    "bottleneck": BottleneckConfig("pfeiffer", 4, "gelu", target_modules=["part"]),
    "parallel": BottleneckConfig("parallel", 4, "gelu", target_modules=["part"]),
    "bias": BiasConfig(["part"]),
    "freeze": FreezeConfig(train=["part"]),
    "whole": LoraConfig(["after"], r=2, modules_to_save=["part"]),
}


def made(name: str) -> tuple[nn.Module, Tensor]:
    """A model around the module, and its input."""
    torch.manual_seed(0)
    part = MODULES[name]()
    model = Model(part)
    x: Tensor = torch.randint(V, (3, 4)) if name in TABLE else torch.randn(2, 5, K)
    p = next(p for p in part.parameters())
    if name == "square":
        x = torch.randn(2, 5, N)
    if name not in TABLE and not name.startswith("packed"):
        x = x.to(p.dtype)
    if p.dtype in (torch.float64, torch.complex64):
        model.after.to(p.dtype)
    return model.eval(), x


NO_LINEAR = "matches no Linear layer"
SHARED = {"lazy": "no shape yet", "complex": "complex numbers"}
CODES = dict.fromkeys(("packed in int8", "packed in float8"), "is packed as torch")
NF4 = dict.fromkeys(("packed in 4 bits", "packed in 4 bits without bias"), "is packed as torch")
REFUSED: dict[str, dict[str, str]] = {
    "lora": SHARED,
    "dora": SHARED | CODES | {"max_norm": "rescales its rows to max_norm"},
    "ia3": SHARED | dict.fromkeys(TABLE, NO_LINEAR),
    "ia3 of inputs": SHARED | dict.fromkeys(TABLE, NO_LINEAR),
    "bottleneck": SHARED | dict.fromkeys(TABLE, "holds no linear layer"),
    "parallel": dict.fromkeys(LINEAR.keys() - {"square"}, "as many inputs as outputs")
    | dict.fromkeys(TABLE, "holds no linear layer"),
    "bias": dict.fromkeys(["without bias", "packed in 4 bits without bias", *TABLE], "has no bias")
    | {"lazy": "uninitialized parameter"},
    "freeze": CODES
    | dict.fromkeys(NF4, "is packed as torch")
    | {"lazy": "uninitialized parameter"},
    "whole": CODES
    | NF4
    | {"lazy": "uninitialized parameter", "complex": "complex numbers"}
    | {"forward of the instance": "the forward pass of a copy of Linear is this one's"}
    | dict.fromkeys(["old weight norm", "pruned"], "Linear cannot be copied: Only Tensors"),
}
MERGED = {"lora", "dora", "ia3", "ia3 of inputs", "whole"}
NOT_PLAIN = {
    "subclass": "a forward pass of its own",
    "subclass of ours": "a forward pass of its own",
    "subclass in bfloat16": "a forward pass of its own",
    "forward of the instance": "a forward pass of its own",
    "packed in int8": "a forward pass of its own",
    "packed in float8": "a forward pass of its own",
    "scaled": "a forward pass of its own",
    "embed_scale": "a forward pass of its own",
    "zero rows, hooked": "forward hooks",
    "forward hook": "forward hooks",
    "forward pre-hook": "forward hooks",
    "hooked table": "forward hooks",
    "weight norm": "parametrized or pruned",
    "old weight norm": "parametrized or pruned",
    "spectral norm": "parametrized or pruned",
    "parametrized": "parametrized or pruned",
    "parametrized table": "parametrized or pruned",
    "pruned": "parametrized or pruned",
    "max_norm": "rows to max_norm",
}
CASES = [(module, method) for method in METHODS for module in MODULES]
ACCEPTED = [(module, method) for module, method in CASES if module not in REFUSED[method]]


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Moves what trains, but for padding rows, which no step moves."""
    random = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if p.requires_grad:
            step = 0.3 * torch.randn(p.shape, generator=random)
            padding = getattr(model.part, "padding_idx", None)
            if padding is not None and name.endswith("lora_a"):
                step[:, padding] = 0
            p.add_(step)


def tolerance(module: str, factor: float = 4) -> dict[str, float]:
    """Of some roundings in the dtype of the module."""
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    kinds = [d for name, d in dtype.items() if name in module] or [torch.float32]
    return dict.fromkeys(("rtol", "atol"), factor * torch.finfo(kinds[0]).eps)


def bits(model: nn.Module) -> dict[str, tuple[bytes, bool, int]]:
    """The model to the bit: its tensors, what trains, and which modules stand where."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    values = {
        n: (t.detach().flatten().view(torch.uint8).numpy().tobytes(), t.requires_grad, id(t))
        for n, t in tensors.items()
    }
    return values | {n: (b"", m.training, id(m)) for n, m in model.named_modules()}


@pytest.mark.parametrize(("module", "method"), [c for c in CASES if c not in ACCEPTED])
def test_what_a_method_cannot_be_put_on_is_refused_and_stays(module: str, method: str) -> None:
    model, x = made(module)
    before = None if module == "lazy" else (model(x), bits(model))
    with pytest.raises(ValueError, match=REFUSED[method][module]):
        peft_lite.attach(model, METHODS[method])
    if before:
        assert torch.equal(model(x), before[0])
        assert bits(model) == before[1]


@pytest.mark.parametrize(("module", "method"), ACCEPTED)
def test_a_fresh_method_changes_no_output_and_comes_off_without_a_trace(
    module: str, method: str
) -> None:
    model, x = made(module)
    y = model(x)
    before = bits(model)
    handle = peft_lite.attach(model, METHODS[method])
    torch.testing.assert_close(model(x), y, **tolerance(module))
    if method != "freeze":  # it trains in place
        shake(model)
        assert (model(x) - y).abs().max() > 0.05
    handle.detach()
    assert bits(model) == before
    assert torch.equal(model(x), y)


@pytest.mark.parametrize(("module", "method"), ACCEPTED)
def test_a_merged_method_computes_the_same_or_is_refused(module: str, method: str) -> None:
    model, x = made(module)
    handle = peft_lite.attach(model, METHODS[method])
    shake(model)
    y = model(x)
    reason = "nothing to merge|does not change weights"
    if method in MERGED:
        reason = "" if method == "whole" else NOT_PLAIN.get(module, "")
    if reason:
        with pytest.raises(ValueError, match=reason):
            handle.merge()
    else:
        handle.merge()
        torch.testing.assert_close(model(x), y, **tolerance(module, 16))
        handle.unmerge()
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("table", ["padding", "embed_scale"])
def test_the_padding_row_gets_no_step_and_no_change(table: str, method: str) -> None:
    model, _ = made(table)
    ids = torch.tensor([[3, 1, 3]])
    part: Any = model.part
    row = part.weight[3].detach().clone()
    y = part(ids)
    assert row.abs().max() > 0.1
    handle = peft_lite.attach(model, METHODS[method])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    assert torch.equal(model.part(ids)[0, 0], y[0, 0])  # type: ignore[operator]
    assert (model.part(ids)[0, 1] - y[0, 1]).abs().max() > 1e-3  # type: ignore[operator]
    if table == "padding":
        handle.fold()
        assert torch.equal(model.part.weight[3], row)  # type: ignore[union-attr, index]


@contextmanager
def for_all_modules(kind: type[nn.Module]) -> Iterator[None]:
    """A hook that torch calls for every module; it changes what those of a kind give."""
    hook = register_module_forward_hook(lambda m, _x, y: 2 * y + 1 if type(m) is kind else None)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "bottleneck", "whole"])
def test_hooks_for_all_modules_stop_a_method_and_act_on_the_layer_inside(method: str) -> None:
    model, x = made("linear")
    with for_all_modules(nn.Linear), pytest.raises(ValueError, match="for all modules"):
        peft_lite.attach(model, METHODS[method])
    with for_all_modules(nn.Linear):
        y = model.part(x)  # type: ignore[operator]
    handle = peft_lite.attach(model, METHODS[method])
    with for_all_modules(nn.Linear):
        torch.testing.assert_close(model.part(x), y)  # type: ignore[operator]
        if method in MERGED - {"whole"}:
            with pytest.raises(ValueError, match="Linear has forward hooks"):
                handle.merge()


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("kind", ["Linear8bitLt", "Linear4bit"])
def test_layers_of_bitsandbytes(kind: str, method: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    module = getattr(bitsandbytes.nn, kind)(64, N)
    module.load_state_dict(nn.Linear(64, N).state_dict())
    model = Model(module).to("cpu")
    x = torch.randn(5, 64)
    y = model(x)
    if method == "dora":
        with pytest.raises(ValueError, match="is packed as"):
            peft_lite.attach(model, METHODS[method])
    else:
        handle = peft_lite.attach(model, METHODS[method])
        torch.testing.assert_close(model(x), y)
        with pytest.raises(ValueError, match="cannot merge"):
            handle.merge()
    assert torch.equal(model(x), y) or method != "dora"


@pytest.mark.parametrize("config", [PrefixConfig(3), PrefixConfig(3, form="peft"), PromptConfig(3)])
def test_what_stands_before_the_tokens_can_be_switched_off_and_comes_off(config: Any) -> None:
    model = minigpt.GPTNeo(
        minigpt.GPTNeoConfig(vocab_size=V, max_position_embeddings=16, hidden_size=8, num_heads=2)
    ).eval()
    ids = torch.arange(8)[None]
    y, before = model(ids), bits(model)
    handle = peft_lite.attach(model, config)
    assert (model(ids) - y).abs().max() > 1e-4
    with handle.enabled(False):
        assert torch.equal(model(ids), y)
    with pytest.raises(ValueError, match="cannot merge 'default'"):
        handle.merge()
    handle.detach()
    assert bits(model) == before
    assert torch.equal(model(ids), y)


def test_float64_stays_float64_inside_autocast() -> None:
    model, x = made("float64")
    handle = peft_lite.attach(model, METHODS["lora"])
    shake(model)
    y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), y, **tolerance("float64"))
    assert handle.active == ["default"]


@pytest.mark.parametrize(
    ("module", "method"), [case for case in ACCEPTED if case[0] in ("square", "table")]
)
def test_a_module_under_two_names_that_shares_its_weight(module: str, method: str) -> None:
    torch.manual_seed(0)
    model = Twice(MODULES[module]()).eval()
    x = torch.randint(V, (3, 4)) if module == "table" else torch.randn(2, N)
    y, before = model(x), bits(model)
    handle = peft_lite.attach(model, METHODS[method])
    torch.testing.assert_close(model(x), y)
    if method != "freeze":
        shake(model)
        moved = model(x)
        assert (moved - y).abs().max() > 0.05
        assert model.part is model.again
    if method in MERGED - {"whole"}:
        with pytest.raises(ValueError, match=r"part.weight: it is tied to tied.weight"):
            handle.merge()
        handle.merge(untie=True)
        torch.testing.assert_close(model(x), moved, **tolerance(module, 16))
    handle.detach()
    assert bits(model) == before
    assert torch.equal(model(x), y)
