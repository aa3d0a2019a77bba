"""Starts of a LoRA at a part of the weight: PiSSA and OLoRA against NumPy, and against HF PEFT,
which puts the residual into the base.
"""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn

import minigpt
import peft_lite
from peft_lite import DoraConfig, LoraConfig
from peft_lite.starts import STARTS
from tests.closed_forms import lora_forward, lora_gradients, lora_scale
from tests.peft_lite.peft_methods import inputs, of, shake, trained
from tests.peft_lite.peft_models import Picture, Plain, output, pair, tokens

# what PEFT itself does with the `transformers` of today
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA with rank_pattern:UserWarning"),
]
starts = pytest.mark.parametrize("start", ["pissa", "olora"])
TARGETS = ["inner.0", "inner.2", "out"]  # of Plain: 7 -> 12 -> 5 -> 3


def layer(
    start: str, dtype: torch.dtype = torch.float64, bias: bool = True, **settings: Any
) -> tuple[nn.Module, Any]:
    """A linear layer 13 -> 9 with a LoRA that has just started: (the model around it, handle)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9, bias=bias, dtype=dtype))
    config = {"target_modules": ["0"], "r": 4, "lora_alpha": 10, **settings}
    return model, peft_lite.attach(model, LoraConfig(init_lora_weights=start, **config))


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.manual_seed(2))


@pytest.mark.parametrize("shape", [(9, 13), (13, 9), (6, 6)])
def test_pissa_starts_at_the_principal_part_in_equal_shares(shape: tuple[int, int]) -> None:
    W, r, s = matrix(*shape), 4, 2.5
    A, B = STARTS["pissa"](W, r, s)
    u, sigma, vh = np.linalg.svd(W.numpy())
    best = u[:, :r] @ np.diag(sigma[:r]) @ vh[:r]
    np.testing.assert_allclose(s * (B @ A).numpy(), best, atol=1e-12)
    for gram in (A @ A.T, B.T @ B):
        np.testing.assert_allclose(gram.numpy(), np.diag(sigma[:r]) / s, atol=1e-12)


@pytest.mark.parametrize("shape", [(9, 13), (13, 9), (6, 6)])
def test_olora_starts_at_the_first_columns_of_a_qr_decomposition(shape: tuple[int, int]) -> None:
    W, r = matrix(*shape), 4
    A, B = STARTS["olora"](W, r, 2.5)
    np.testing.assert_allclose((B.T @ B).numpy(), np.eye(r), atol=1e-12)
    np.testing.assert_array_equal(A.numpy(), np.triu(A.numpy()))
    # Gram-Schmidt: the first r columns of W are in the span of B, and all are projected onto it
    np.testing.assert_allclose((B @ A).numpy(), (B @ B.T @ W).numpy(), atol=1e-12)
    np.testing.assert_allclose((B @ A).numpy()[:, :r], W.numpy()[:, :r], atol=1e-12)


@starts
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_at_first_the_output_is_the_base_s_to_the_bit(
    start: str, dtype: torch.dtype, bias: bool
) -> None:
    for settings in ({}, {"lora_dropout": 0.5}, {"use_rslora": True}):
        model, handle = layer(start, dtype, bias, **settings)
        for p in trained(model).values():
            assert p.abs().max() > 0.05
        x = torch.randn(8, 13, dtype=dtype)
        model.train()
        y = model(x).detach()
        handle.merge()
        merged = model[0].layer.weight.clone()
        handle.detach()
        assert torch.equal(merged, model[0].weight)
        assert torch.equal(y, model(x))


@starts
@pytest.mark.parametrize("rslora", [False, True])
def test_output_and_gradients_are_those_of_a_lora_on_the_residual(start: str, rslora: bool) -> None:
    model, _ = layer(start, use_rslora=rslora)
    s = lora_scale(10, 4, rslora)
    lora: Any = model[0]
    a0, b0 = (p.detach().clone().numpy() for p in (lora.lora_a, lora.lora_b))
    shake(trained(model).values())
    a, b = (p.detach().numpy() for p in (lora.lora_a, lora.lora_b))
    residual = lora.layer.weight.detach().numpy() - s * b0 @ a0
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 9, dtype=torch.float64)
    y = model(x)
    y.backward(dy)
    bias = lora.layer.bias.detach()
    expected = lora_forward(x.detach(), residual, bias, a, b, s)
    np.testing.assert_allclose(y.detach().numpy(), expected, atol=1e-12)
    for got, want in zip(
        (x.grad, lora.lora_a.grad, lora.lora_b.grad),
        lora_gradients(x.detach(), dy, residual, a, b, s),
        strict=True,
    ):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-12)


@starts
def test_in_16_bits_a_small_change_keeps_its_digits(start: str) -> None:
    model, _ = layer(start, torch.bfloat16)
    lora: Any = model[0]
    before = [p.detach().double() for p in (lora.lora_a, lora.lora_b)]
    shake(trained(model).values(), std=1e-4)  # far below what bfloat16 resolves of A and B
    (a0, b0), (a, b) = before, [p.detach().double() for p in (lora.lora_a, lora.lora_b)]
    x = torch.randn(32, 13, dtype=torch.bfloat16)
    want = 2.5 * x.double() @ (b @ a - b0 @ a0).T
    error = (lora.update(x).double() - want).norm() / want.norm()
    assert error < 2**-7


METHODS = {"lora": LoraConfig, "dora": DoraConfig}


@starts
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_it_trains_as_in_peft(start: str, method: str, rslora: bool, optimizer: str) -> None:
    torch.manual_seed(4)
    ours = Plain()
    theirs: Any = copy.deepcopy(ours)
    settings = {"r": 3, "lora_alpha": 7, "use_rslora": rslora, "init_lora_weights": start}
    handle = peft_lite.attach(ours, METHODS[method](TARGETS, **settings))
    theirs = peft.get_peft_model(
        theirs, peft.LoraConfig(target_modules=TARGETS, use_dora=method == "dora", **settings)
    )
    for name in TARGETS:
        mine: Any = ours.get_submodule(name)
        other = theirs.get_submodule(f"base_model.model.{name}")
        residual = mine.layer.weight - mine.scaling * mine.start_b @ mine.start_a
        torch.testing.assert_close(residual, other.base_layer.weight, rtol=0, atol=1e-6)
        product = mine.lora_b @ mine.lora_a
        want = other.lora_B["default"].weight @ other.lora_A["default"].weight
        torch.testing.assert_close(product, want, rtol=0, atol=1e-6)
    before = output(ours, inputs("plain")).detach()
    for model in (ours, theirs):
        update = getattr(torch.optim, optimizer)(trained(model).values(), lr=1e-2, weight_decay=0.1)
        for seed in range(5):
            update.zero_grad()
            output(model, inputs("plain", seed)).sin().square().mean().backward()
            update.step()
    assert (output(ours, inputs("plain")) - before).abs().max() > 1e-3
    handle.merge()
    merged = theirs.merge_and_unload()
    for name in TARGETS:
        torch.testing.assert_close(
            ours.get_submodule(name).layer.weight,
            merged.get_submodule(name).weight,
            rtol=0,
            atol=1e-5,
        )


WRITTEN: dict[str, Any] = {
    "lora": LoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7),
    "rslora": LoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7, use_rslora=True),
    "patterns": LoraConfig(
        ["q_proj", "c_fc"], r=3, rank_pattern={"c_fc": 5}, alpha_pattern={"h.0.mlp.c_fc": 9}
    ),
    "rslora with patterns": LoraConfig(
        ["q_proj", "c_fc"],
        r=3,
        use_rslora=True,
        rank_pattern={"c_fc": 5},
        alpha_pattern={"h.0.mlp.c_fc": 9},
    ),
    "dora": DoraConfig(["q_proj", "c_fc"], r=3, lora_alpha=7, use_rslora=True),
}


@starts
@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_its_file_is_a_lora_on_the_model_as_it_was(
    start: str, config: LoraConfig, tmp_path: Path
) -> None:
    ours, theirs = pair("gpt-neo", tmp_path / "base")
    config = type(config)(**{**vars(config), "init_lora_weights": start})
    handle = peft_lite.attach(ours, config)
    shake(trained(ours).values())
    handle.save(tmp_path / "adapter")
    want = of(ours, tokens())
    before = output(theirs, tokens())
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    after = output(opened, tokens())
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(want, after, rtol=0, atol=1e-5 * max(1, want.abs().max().item()))
    again = minigpt.load(tmp_path / "base")
    peft_lite.load(again, tmp_path / "adapter")
    torch.testing.assert_close(of(again, tokens()), want, rtol=0, atol=1e-5)
    if not config.use_rslora:  # else alpha of the file is rounded
        assert torch.equal(of(again, tokens()), want)


@starts
def test_several_share_a_base_that_nothing_changes(start: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    model = Plain().eval()
    before, x = Picture(model), inputs("plain")
    base = of(model, x)
    handle: Any = None
    outputs = {}
    for seed, (name, settings) in enumerate(
        {"a": {"init_lora_weights": start}, "b": {"init_lora_weights": "pissa"}, "c": {}}.items()
    ):
        handle = peft_lite.attach(
            model, LoraConfig(TARGETS, r=2 + seed % 2, lora_alpha=3, **settings), name
        )
        if seed < 2:
            assert torch.equal(of(model, x), base)
        shake(trained(model).values(), seed=seed)
        outputs[name] = of(model, x)
    for name in "abcab":
        handle.switch(name)
        assert torch.equal(of(model, x), outputs[name])
        with handle.enabled(False):
            assert torch.equal(of(model, x), base)
        handle.merge()
        torch.testing.assert_close(of(model, x), outputs[name], rtol=0, atol=1e-5)
        handle.unmerge()
        assert torch.equal(of(model, x), outputs[name])
    with handle.rows(["b", None, "a"]):
        mixed = of(model, x)
    want = torch.stack([outputs["b"][0], base[1], outputs["a"][2]])
    torch.testing.assert_close(mixed, want, rtol=0, atol=1e-5)
    deltas = {n: handle.methods[n].wrappers["inner.0"].delta() for n in "ab"}
    handle.combine("sum", {"a": 0.5, "b": -2})
    total = handle.methods["sum"].wrappers["inner.0"].delta()
    torch.testing.assert_close(total, 0.5 * deltas["a"] - 2 * deltas["b"], rtol=0, atol=1e-5)
    handle.detach()
    assert Picture(model) == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt start": (
        {"init_lora_weights": "pisa"},
        "init_lora_weights is 'pisa', must be True, 'pissa', 'olora', 'loftq' "
        "(did you mean 'pissa'?)",
    ),
    "no start of ours": ({"init_lora_weights": False}, "init_lora_weights is False, must be True"),
    "one": ({"init_lora_weights": 1}, "init_lora_weights is 1, must be True"),
    "a table": (
        {"target_modules": ["table"], "init_lora_weights": "pissa"},
        "table is no linear layer: init_lora_weights 'pissa' cannot start it",
    ),
    "a rank too high": (
        {"rank_pattern": {"linear": 6}, "init_lora_weights": "olora"},
        "linear: rank r is 6, must be at most 5, the rank of the weight",
    ),
    "4 bits": (
        {"init_lora_weights": "loftq"},
        "init_lora_weights 'loftq' puts the base into 4 bits: call attach_quantized instead",
    ),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("method", [LoraConfig, DoraConfig])
def test_what_has_no_such_start_is_refused(
    settings: dict[str, Any], message: str, method: Any
) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(11, 5), "linear": nn.Linear(7, 5)})
    before = Picture(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        peft_lite.attach(model, method(**{"target_modules": ["linear"], **settings}))
    assert Picture(model) == before


@starts
def test_a_weight_that_is_not_finite_is_refused(start: str) -> None:
    model = Plain()
    with torch.no_grad():
        model.out.weight[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"out\.weight holds NaN or an infinite number"):
        peft_lite.attach(model, LoraConfig(["out"], r=2, init_lora_weights=start))


@starts
def test_a_model_without_values_gets_the_shapes(start: str) -> None:
    with torch.device("meta"):
        model = Plain()
    peft_lite.attach(model, LoraConfig(["out"], r=2, init_lora_weights=start))
    assert {tuple(p.shape) for p in trained(model).values()} == {(2, 5), (3, 2)}
