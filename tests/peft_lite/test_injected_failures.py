"""A failure at the k-th tensor operation of a call, for every k: the model is as it was before."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import minigpt
import peft_lite
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
from peft_lite.handle import handle_of
from tests.peft_lite.photo import bits, photo

TINY = {
    "vocab_size": 11,
    "max_position_embeddings": 8,
    "hidden_size": 6,
    "num_layers": 1,
    "num_heads": 2,
    "intermediate_size": 10,
}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
# two of each kind, the second where the first is and elsewhere
PAIRS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(["up", "place"], r=2, lora_alpha=3), LoraConfig(["up", "down"], r=1)),
    "lora with biases": (
        LoraConfig(["up"], r=2, bias="all"),
        LoraConfig(["down", "up"], r=1, bias="lora_only"),
    ),
    "lora and a norm": (
        LoraConfig(["up"], r=2, modules_to_save=["norm"]),
        LoraConfig(["down"], r=1, modules_to_save=["norm"]),
    ),
    "lora of a tied head": (LoraConfig(["head", "up"], r=2), LoraConfig(["token"], r=1)),
    "dora": (DoraConfig(["up", "place"], r=2), DoraConfig(["up", "down"], r=1)),
    "ia3": (IA3Config(["up", "down"], ["down"]), IA3Config(["down"])),
    "bottleneck": (
        BottleneckConfig("pfeiffer", 2, target_modules=["down"]),
        BottleneckConfig("houlsby", 3, target_modules=["up", "down"]),
    ),
    "prefix": (PrefixConfig(2), PrefixConfig(1, form="peft", prefix_projection=True)),
    "prompt": (PromptConfig(2), PromptConfig(3)),
    "bias": (BiasConfig(["down"]), BiasConfig()),
    "freezing": (FreezeConfig(train=["up"]), None),
}
MERGED = ("lora", "lora with biases", "lora and a norm", "lora of a tied head", "dora", "ia3")


class FailAt(TorchFunctionMode):
    """Raises at the k-th operation from now on, once; without `error` it counts them."""

    def __init__(self, k: int, error: type[BaseException] | None) -> None:
        super().__init__()
        self.k, self.error, self.count = k, error, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:  # torch's own `no_grad` would not recover
            return func(*args)
        self.count += 1
        if self.error is not None and self.count == self.k:
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


class Small(nn.Module):
    """Tables and linear layers, the head tied to the first table."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(11, 4), nn.Embedding(5, 4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.token.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place(torch.arange(ids.size(1)))
        return self.head(self.norm(x + self.down(self.up(x).tanh())))


@cache
def _base(kind: str) -> nn.Module:
    torch.manual_seed(0)
    slots = kind in ("prefix", "prompt")
    config = minigpt.GPTNeoConfig(**TINY)  # type: ignore[arg-type]
    model = minigpt.GPTNeo(config).eval() if slots else Small()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def attached(kind: str) -> nn.Module:
    """The model with one of the kind that rests and one that acts, no tensor at its start."""
    model = deepcopy(_base(kind))
    next(model.parameters()).requires_grad_(False)
    for name, config in zip(("first", "second"), reversed(PAIRS[kind]), strict=True):
        if config is not None:
            handle = peft_lite.attach(model, config, name)
            with torch.no_grad():
                for p in handle.methods[name].trained():
                    p.add_(torch.randn_like(p), alpha=0.3)
    return model


def merge(model: nn.Module) -> None:
    handle_of(model).merge(untie=True)


def enabled(model: nn.Module) -> None:
    with handle_of(model).enabled(False):
        pass


def rows(model: nn.Module) -> None:
    with handle_of(model).rows(["first", None]):
        pass


# name of the call: (the kinds it is for, whether it starts merged, the call)
Call = Callable[[nn.Module], object]
CALLS: dict[str, tuple[tuple[str, ...], bool, Call]] = {
    "merge": (MERGED, False, merge),
    "unmerge": (MERGED, True, lambda model: handle_of(model).unmerge()),
    "fold": ((*MERGED, "bias", "freezing"), False, lambda model: handle_of(model).fold(untie=True)),
    "fold what is merged": (MERGED, True, lambda model: handle_of(model).fold()),
    "detach all": (tuple(PAIRS), False, lambda model: handle_of(model).detach()),
    "detach one": (tuple(PAIRS), False, lambda model: handle_of(model).detach("second")),
    "detach what is merged": (MERGED, True, lambda model: handle_of(model).detach("second")),
    "switch": (
        tuple(kind for kind in PAIRS if kind != "freezing"),
        False,
        lambda model: handle_of(model).switch("first"),
    ),
    "combine": (
        ("lora", "lora of a tied head"),
        False,
        lambda model: handle_of(model).combine("sum", {"first": 0.5, "second": -2.0}),
    ),
    "enabled": (("lora with biases", "bias"), False, enabled),
    "rows": (("lora", "dora", "lora of a tied head"), False, rows),
}
CASES = [(call, kind) for call, (kinds, *_) in CALLS.items() for kind in kinds]


def fails_without_a_trace(model: nn.Module, call: Call) -> None:
    """Every point of the call, and then the call itself."""
    twin = deepcopy(model)
    with FailAt(0, None) as counter:
        call(twin)
    assert counter.count > 0
    before, output = photo(model), bits(model(IDS))
    for k in range(1, counter.count + 1):
        error = KeyboardInterrupt if k % 2 else RuntimeError
        # reading a file says in a ValueError what went wrong
        with pytest.raises((error, ValueError), match="injected"), FailAt(k, error):
            call(model)
        assert photo(model) == before, f"operation {k} of {counter.count}"
    assert bits(model(IDS)) == output
    call(model)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=map(" - ".join, CASES))
def test_a_call_that_fails_leaves_the_model_as_it_was(name: str, kind: str) -> None:
    _, merged, call = CALLS[name]
    model = attached(kind)
    if merged:
        merge(model)
    fails_without_a_trace(model, call)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("beside", [False, True])
def test_attach_and_load_that_fail_leave_the_model_as_it_was(
    kind: str, beside: bool, tmp_path: Path
) -> None:
    first, second = PAIRS[kind]
    if beside and second is None:
        pytest.skip("one freezing only")
    handle_of(attached(kind)).save(tmp_path, "second")
    for call in (
        lambda model: peft_lite.attach(model, first, "new"),
        lambda model: peft_lite.load(model, tmp_path, "new"),
    ):
        model = deepcopy(_base(kind))
        next(model.parameters()).requires_grad_(False)
        if beside:
            peft_lite.attach(model, second, "there")
        fails_without_a_trace(model, call)
        assert "new" in handle_of(model).active
