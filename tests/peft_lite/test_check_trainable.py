"""check_trainable finds what does not train, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peft_lite
from peft_lite import (
    BiasConfig,
    BottleneckConfig,
    DoraConfig,
    FreezeConfig,
    IA3Config,
    LoraConfig,
    check_trainable,
)
from tests.peft_lite.peft_methods import CASES, TABLES, fresh, inputs, shake, trained
from tests.peft_lite.peft_models import Picture, Plain, tokens


class Everything:
    """What the check must not change: weights, buffers, gradients, modes, random state."""

    def __init__(self, model: nn.Module) -> None:
        self.picture = Picture(model)
        self.buffers = {n: b.clone() for n, b in model.named_buffers()}
        self.grads = {n: p.grad for n, p in model.named_parameters()}
        self.values = {n: None if g is None else g.clone() for n, g in self.grads.items()}
        self.random = torch.get_rng_state()

    def unchanged(self, model: nn.Module) -> bool:
        now = Everything(model)
        return (
            self.picture == now.picture
            and all(torch.equal(b, now.buffers[n]) for n, b in self.buffers.items())
            and all(g is now.grads[n] for n, g in self.grads.items())
            and all(v is None or torch.equal(v, now.grads[n]) for n, v in self.values.items())
            and torch.equal(self.random, now.random)
        )


def checked(model: nn.Module, batch: Any, loss: Any = None) -> peft_lite.Trainability:
    """Twice, with and without gradients and in either mode, always with the same result."""
    checks = []
    for training in (False, True):
        model.train(training)
        model.zero_grad()
        if training:
            for p in trained(model).values():
                p.grad = torch.full_like(p, 3.0)
        before = Everything(model)
        checks.append(check_trainable(model, batch, loss))
        assert before.unchanged(model)
    assert checks[0].faults.keys() == checks[1].faults.keys()
    assert checks[0].ok == checks[1].ok
    return checks[0]


@pytest.mark.parametrize(("kind", "method"), CASES, ids=map(" - ".join, CASES))
@pytest.mark.parametrize("shaken", [False, True])
def test_every_method_is_well(kind: str, method: str, shaken: bool) -> None:
    model = fresh(kind)
    torch.manual_seed(0)
    peft_lite.attach(model, TABLES[kind][method])
    names = set(trained(model))
    if shaken:
        shake(trained(model).values())
    check = checked(model, inputs(kind))
    assert check.ok, str(check)
    assert {*check.gradients, *check.waiting} == names
    assert not shaken or not check.waiting
    assert all(0 < norm < float("inf") for norm in check.gradients.values())


def test_gradients_are_those_of_the_loss() -> None:
    model, x = fresh("gpt-neo"), tokens()
    peft_lite.attach(model, LoraConfig(["query"], r=3))
    shake(trained(model).values())

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sin().square().mean()

    check = check_trainable(model, x, loss)
    loss(model, x).backward()
    assert check.gradients == {
        n: pytest.approx(p.grad.norm().item(), rel=1e-5) for n, p in trained(model).items()
    }


def test_a_waits_for_b_at_the_start_of_a_lora() -> None:
    model = fresh("gpt-neo")
    peft_lite.attach(model, LoraConfig(["query", "mlp.up"], r=3))
    check = check_trainable(model, {"input_ids": tokens()})
    assert check.ok
    assert {n.rsplit(".", 1)[1] for n in check.waiting} == {"lora_a"}
    assert {n.rsplit(".", 1)[1] for n in check.gradients} == {"lora_b"}
    assert len(check.waiting) == len(check.gradients) == 4
    assert "4 trainable tensors get" in str(check)
    assert "4 have a zero gradient only because" in str(check)


class Spare(Plain):
    """`Plain` with a layer that the forward pass never uses."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(5, 4)


class Cut(Plain):
    """The graph is cut before the last layer, or behind it."""

    def __init__(self, behind: bool = False) -> None:
        super().__init__()
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return self.out(h).detach() if self.behind else self.out(h.detach())


class Reentrant(Plain):
    """The first part runs under the older kind of activation checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.inner, x, use_reentrant=True))


class Multiplied(Plain):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x)


class Argmax(Plain):
    """Its last layer's gradient is there, and zero wherever one looks."""

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x)).sign()


FAULTS: dict[str, tuple[Callable[[], Plain], tuple[str, ...], str]] = {
    "unused layer": (Spare, ("spare",), "it gets no gradient"),
    "cut within": (Cut, ("inner",), "it gets no gradient"),
    "cut behind": (lambda: Cut(behind=True), ("inner", "out"), "it gets no gradient"),
    "reentrant checkpoint": (Reentrant, ("inner",), "it gets no gradient"),
    "nan": (lambda: Multiplied(torch.nan), ("inner", "out"), "its gradient is nan"),
    "infinite": (lambda: Multiplied(torch.inf), ("inner", "out"), "its gradient is "),
    "flat": (Argmax, ("inner", "out"), "its gradient is zero, also after a small random step"),
}
METHODS = {
    "lora": LoraConfig("all-linear", r=2),
    "dora": DoraConfig("all-linear", r=2),
    "ia3": IA3Config("all-linear"),
    "bottleneck": BottleneckConfig(r=4, target_modules="all-linear"),
    "bias": BiasConfig(),
    "freezing": FreezeConfig(train="weight"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "where", "reason"), FAULTS.values(), ids=FAULTS)
def test_faults_are_found_and_named(
    build: Callable[[], Plain], where: tuple[str, ...], reason: str, method: str
) -> None:
    torch.manual_seed(0)
    model = build()
    peft_lite.attach(model, METHODS[method])
    shake(trained(model).values())
    check = checked(model, inputs("plain"))
    expected = {n for n in trained(model) if n.startswith(where)}
    assert check.faults.keys() == expected
    assert all(reason in fault for fault in check.faults.values())
    assert check.ok is (not expected)
    assert check.gradients.keys() == set(trained(model)) - check.faults.keys()
    assert not check.moved
    for name in check.faults:
        assert f"{name}: {reason}" in str(check)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_the_older_checkpoint_is_well_once_its_input_needs_a_gradient() -> None:
    torch.manual_seed(0)
    model = Reentrant()
    peft_lite.attach(model, LoraConfig(["inner.0"], r=2))
    assert not check_trainable(model, inputs("plain")).ok
    assert check_trainable(model, inputs("plain").requires_grad_()).ok


def test_a_frozen_tensor_that_shares_memory_with_a_trained_one_is_found() -> None:
    torch.manual_seed(0)
    model = Spare()
    peft_lite.attach(model, LoraConfig(["inner.2", "out"], r=4))
    model.spare.weight.data = model.out.lora_a.data  # (4, 5) both
    check = checked(model, inputs("plain"))
    assert check.moved == ["spare.weight"]
    assert not check.ok
    assert not check.faults
    assert "spare.weight: frozen, but its values changed" in str(check)


def test_a_single_dead_tensor_among_many_is_found() -> None:
    model = fresh("bert")
    peft_lite.attach(model, LoraConfig(["value", "mlp.down"], r=3))
    shake(trained(model).values())
    layer: Any = model.blocks[1].attention.value
    layer.register_forward_hook(lambda *args: args[-1].detach())
    check = checked(model, tokens())
    assert set(check.faults) == {f"blocks.1.attention.value.{n}" for n in ("lora_a", "lora_b")}


def test_a_copy_that_nothing_reads_is_found() -> None:
    torch.manual_seed(0)
    model = Spare()
    peft_lite.attach(model, LoraConfig(["out"], r=2, modules_to_save=["spare"]))
    check = checked(model, inputs("plain"))
    assert set(check.faults) == {"spare.copy.weight", "spare.copy.bias"}


def test_what_a_forward_pass_counts_is_put_back() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 12), nn.BatchNorm1d(12), nn.Dropout(0.3), nn.Linear(12, 3))
    peft_lite.attach(model, LoraConfig(["0", "3"], r=2))
    assert checked(model, torch.randn(9, 7)).ok


def test_an_error_of_the_loss_leaves_everything_as_it_was() -> None:
    model = fresh("gpt-neo").train()
    peft_lite.attach(model, LoraConfig(["query"], lora_dropout=0.5))
    calls = []

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        calls.append(1)
        y = model(batch).sum()
        if len(calls) == 2:
            raise KeyError("an accident")
        return y

    before = Everything(model)
    with pytest.raises(KeyError, match="an accident"):
        check_trainable(model, tokens(), loss)
    assert before.unchanged(model)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Plain has no parameter that requires a gradient"):
        check_trainable(Plain().requires_grad_(False), inputs("plain"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_checked_too(dtype: torch.dtype) -> None:
    model = fresh("gpt-neo").to(dtype)
    peft_lite.attach(model, DoraConfig(["query", "mlp.up"], r=3))
    shake(trained(model).values())
    check = checked(model, tokens())
    assert check.ok
    assert len(check.gradients) == 12
