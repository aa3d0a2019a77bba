"""LoRA against its closed form, at points where nothing is zero, square or one by accident."""

import copy
import gc
import math
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import minigpt
import peft_lite
from minigpt.training.train import checkpoint_activations
from peft_lite import LoraConfig
from tests.closed_forms import (
    lora_count,
    lora_forward,
    lora_gradients,
    lora_gradients_of_weight,
    lora_scale,
    lora_weight,
)
from tests.peft_lite.peft_models import (
    PROJECTIONS,
    Picture,
    Plain,
    output,
    pair,
    perturb,
    tokens,
    twin,
)

EPS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def layer(
    dtype: torch.dtype = torch.float64, bias: bool = True, **settings: Any
) -> tuple[nn.Module, Any, Any]:
    """A linear layer 13 -> 9 with a perturbed LoRA: (the model around it, handle, LoRA layer)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(13, 9, bias=bias, dtype=dtype))
    config = {"target_modules": ["0"], "r": 4, "lora_alpha": 10, **settings}
    handle = peft_lite.attach(model, LoraConfig(**config))
    perturb(handle)
    return model, handle, model[0]


def numbers(layer: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    bias = None if layer.base.bias is None else layer.base.bias.detach().double()
    w, a, b = (p.detach().double() for p in (layer.base.weight, layer.lora_a, layer.lora_b))
    return w, bias, a, b


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_layer_output_is_the_closed_form(dtype: torch.dtype, bias: bool, rslora: bool) -> None:
    model, _, lora = layer(dtype, bias, use_rslora=rslora)
    x = torch.randn(2, 5, 13, dtype=dtype)
    w, beta, a, b = numbers(lora)
    expected = lora_forward(x.double().reshape(-1, 13), w, beta, a, b, lora_scale(10, 4, rslora))
    y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(
        y.detach().double().view(-1, 9), torch.tensor(expected), rtol=EPS[dtype], atol=EPS[dtype]
    )


@pytest.mark.parametrize("shape", [(13,), (1, 13), (0, 13), (2, 3, 4, 13)])
def test_layer_takes_the_shapes_that_a_linear_layer_takes(shape: tuple[int, ...]) -> None:
    model, _, lora = layer()
    x = torch.randn(shape, dtype=torch.float64)
    w, beta, a, b = numbers(lora)
    expected = lora_forward(x.reshape(-1, 13), w, beta, a, b, 2.5).reshape(*shape[:-1], 9)
    np.testing.assert_allclose(model(x).detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_gradients_are_the_closed_form(bias: bool, rslora: bool) -> None:
    model, _, lora = layer(bias=bias, use_rslora=rslora)
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(6, 9, dtype=torch.float64)
    model(x).backward(dy)
    w, _, a, b = numbers(lora)
    expected = lora_gradients(x.detach(), dy, w, a, b, lora_scale(10, 4, rslora))
    gradients = (x.grad, lora.lora_a.grad, lora.lora_b.grad)
    for got, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-12)
    assert all(p.grad is None for p in lora.base.parameters())


def test_dropout_scales_what_it_keeps_and_its_gradients_follow_the_mask() -> None:
    model, _, lora = layer(lora_dropout=0.4)
    model.train()
    x = 1 + torch.rand(400, 13, dtype=torch.float64)
    x.requires_grad_(True)
    dy = torch.randn(400, 9, dtype=torch.float64)
    with torch.no_grad():  # of rank 4, the kept inputs of the first four columns can be read back
        lora.lora_a.copy_(torch.eye(4, 13))
    y = model(x)
    y.backward(dy)
    w, beta, a, b = numbers(lora)
    update = (y.detach() - F.linear(x.detach(), w, beta)) / 2.5
    dropped = torch.linalg.lstsq(b, update.T).solution.T  # drop(x), first four columns
    kept = dropped / x.detach()[:, :4]
    is_kept = kept > 0.5
    torch.testing.assert_close(kept, is_kept.double() / 0.6)
    assert is_kept.double().mean().item() == pytest.approx(0.6, abs=4 * 0.49 / math.sqrt(1600))

    mask = F.pad(kept, (0, 9))
    dx, da, db = lora_gradients(x.detach(), dy, w, a, b, 2.5, kept=mask)
    np.testing.assert_allclose(x.grad.numpy(), dx, atol=1e-10)
    np.testing.assert_allclose(lora.lora_a.grad[:, :4].numpy(), da[:, :4], atol=1e-9)
    np.testing.assert_allclose(lora.lora_b.grad.numpy(), db, atol=1e-9)


def test_dropout_drops_in_training_only() -> None:
    model, _, lora = layer(lora_dropout=0.5)
    x = torch.randn(8, 13, dtype=torch.float64)
    w, beta, a, b = numbers(lora)
    expected = torch.tensor(lora_forward(x, w, beta, a, b, 2.5))
    model.train()
    assert not torch.allclose(model(x), expected)
    assert not torch.equal(model(x), model(x))
    model.eval()
    torch.testing.assert_close(model(x).detach(), expected)


def dense(theirs: nn.Module, handle: Any, s: Callable[[int], float]) -> None:
    """Puts W + s B A into the twin's own weights."""
    state = handle.state()
    for name in {n.rsplit(".", 2)[0] for n in state}:
        target = theirs.get_submodule(name.removeprefix("base_model.model."))
        a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
        w = lora_weight(target.weight.detach(), a, b, s(len(a)))
        target.weight.data = torch.tensor(w)


def tolerance(model: nn.Module) -> float:
    """`transformers` computes GPT-Neo's scores in float32 whatever the weights are."""
    return 1e-4 if isinstance(model, minigpt.GPTNeo) else 1e-9


@pytest.fixture(params=["gpt-neo", "bert"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    ours, theirs = pair(request.param, tmp_path)
    return ours.double(), theirs.double()


def test_model_equals_its_twin_with_dense_updates(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    config = LoraConfig(PROJECTIONS, r=3, lora_alpha=7, rank_pattern={"query": 5})
    handle = peft_lite.attach(ours, config)
    perturb(handle)
    before = output(theirs, tokens())
    dense(theirs, handle, lambda r: lora_scale(7, r))
    after = output(theirs, tokens())
    assert (before - after).abs().max() > 0.05
    limit = tolerance(ours)
    torch.testing.assert_close(output(ours, tokens()), after, rtol=limit, atol=limit)

    dy = torch.randn(after.shape, dtype=torch.float64)
    output(ours, tokens()).backward(dy)
    after.backward(dy)
    for name, lora in handle.methods["default"].wrappers.items():
        dw = theirs.get_submodule(ours.names.to_hf(name)).weight.grad
        _, _, a, b = numbers(lora)
        da, db = lora_gradients_of_weight(dw, a, b, lora_scale(7, len(a)))
        for got, want in ((lora.lora_a.grad, da), (lora.lora_b.grad, db)):
            np.testing.assert_allclose(got, want, rtol=0, atol=limit * np.abs(want).max())
        assert lora.lora_a.grad.any()
        assert lora.lora_b.grad.any()


def test_merged_unmerged_and_closed_form_agree_pairwise(models: tuple[Any, Any]) -> None:
    ours, theirs = models
    base = output(ours, tokens()).detach()
    handle = peft_lite.attach(ours, LoraConfig(PROJECTIONS, r=3, lora_alpha=7, use_rslora=True))
    perturb(handle)
    unmerged = output(ours, tokens()).detach()
    handle.merge()
    merged = output(ours, tokens()).detach()
    dense(theirs, handle, lambda r: lora_scale(7, r, rslora=True))
    closed = output(theirs, tokens()).detach()
    torch.testing.assert_close(merged, unmerged, rtol=1e-9, atol=1e-9)
    for ours_now in (merged, unmerged):
        limit = tolerance(ours)
        torch.testing.assert_close(ours_now, closed, rtol=limit, atol=limit)
    assert (merged - base).abs().max() > 0.05
    handle.unmerge()
    assert torch.equal(output(ours, tokens()), unmerged)


def test_merged_weight_is_the_closed_form_on_a_layer_that_is_not_square() -> None:
    model, handle, lora = layer()
    w, beta, a, b = numbers(lora)
    x = torch.randn(4, 13, dtype=torch.float64)
    before = model(x)
    handle.merge()
    np.testing.assert_allclose(lora.base.weight.detach(), lora_weight(w, a, b, 2.5), atol=1e-14)
    np.testing.assert_allclose(model(x).detach(), lora_forward(x, w, beta, a, b, 2.5), atol=1e-12)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_the_base_weights_to_the_bit(dtype: torch.dtype) -> None:
    model = Plain().to(dtype)
    handle = peft_lite.attach(model, LoraConfig("all-linear", r=2))
    perturb(handle)
    attached = Picture(model)
    for _ in range(3):
        handle.merge()
        assert Picture(model) != attached
        handle.unmerge()
        assert Picture(model) == attached


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("kind", ["gpt-neo", "bert", "plain", "transformers"])
def test_detach_restores_modules_weights_flags_and_modes(
    kind: str, merged: bool, tmp_path: Path
) -> None:
    model: Any = Plain() if kind == "plain" else twin("bert")
    if kind in ("gpt-neo", "bert"):
        model, _ = pair(kind, tmp_path)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    before = Picture(model)
    handle = peft_lite.attach(model, LoraConfig("all-linear", r=2))
    perturb(handle)
    assert Picture(model) != before
    if merged:
        handle.merge()
    handle.detach()
    assert Picture(model) == before
    assert not model._state_dict_pre_hooks
    assert not first.requires_grad


def test_detach_keeps_a_mode_that_was_set_meanwhile() -> None:
    model = Plain()
    handle = peft_lite.attach(model, LoraConfig(["out"]))
    model.eval()
    handle.detach()
    assert not any(m.training for m in model.modules())


def test_second_detach_is_refused_and_harms_nothing() -> None:
    model = Plain()
    first = peft_lite.attach(model, LoraConfig(["out"]))
    first.detach()
    second = peft_lite.attach(model, LoraConfig(["out"]))
    attached = Picture(model)
    with pytest.raises(ValueError, match="detached"):
        first.detach()
    assert Picture(model) == attached
    second.detach()


def test_update_is_zero_at_the_start(models: tuple[Any, Any]) -> None:
    ours, _ = models
    before = output(ours, tokens())
    peft_lite.attach(ours, LoraConfig(PROJECTIONS, lora_alpha=99))
    torch.testing.assert_close(output(ours, tokens()), before, rtol=0, atol=1e-14)


def test_a_starts_uniform_within_one_over_the_root_of_its_inputs() -> None:
    model = nn.Sequential(nn.Linear(900, 40))
    peft_lite.attach(model, LoraConfig(["0"], r=16))
    a = model[0].lora_a
    assert a.shape == (16, 900)
    assert a.abs().max() <= 1 / 30
    assert a.abs().max() > 0.99 / 30
    assert a.std().item() == pytest.approx(1 / 30 / math.sqrt(3), rel=0.03)
    assert not model[0].lora_b.any()


@pytest.mark.parametrize("kind", ["gpt-neo", "transformers", "bert masked"])
def test_merge_into_a_tied_weight_is_refused(kind: str, tmp_path: Path) -> None:
    if kind == "transformers":
        model, ids = twin("gpt-neo"), tokens()
        target = "lm_head"
    else:
        model, _ = pair(kind, tmp_path)
        target, ids = ("head" if kind == "gpt-neo" else "decoder"), tokens()
    handle = peft_lite.attach(model, LoraConfig([target, "query" if "bert" in kind else "q_proj"]))
    perturb(handle)
    attached, before = Picture(model), output(model, ids)
    with pytest.raises(ValueError, match=r"tied to \S+(token|wte)\.weight"):
        handle.merge()
    assert Picture(model) == attached
    assert torch.equal(output(model, ids), before)


def test_an_untied_head_merges(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    embedding = model.embeddings.token.weight.clone()
    handle = peft_lite.attach(model, LoraConfig(["head"]))
    perturb(handle)
    before = output(model, tokens())
    handle.merge()
    torch.testing.assert_close(output(model, tokens()), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.embeddings.token.weight, embedding)


def test_second_merge_is_refused_and_adds_nothing() -> None:
    _, handle, lora = layer()
    handle.merge()
    once = lora.base.weight.clone()
    with pytest.raises(ValueError, match="merged already"):
        handle.merge()
    assert torch.equal(lora.base.weight, once)


def test_a_merged_model_gives_and_takes_no_state_dict() -> None:
    model = Plain()
    handle = peft_lite.attach(model, LoraConfig(["out"], r=2))
    state = model.state_dict()
    handle.merge()
    for use in (model.state_dict, lambda: model.load_state_dict(state)):
        with pytest.raises(ValueError, match="a state_dict while a method is merged"):
            use()
    handle.unmerge()
    model.load_state_dict(state)


def test_nothing_is_kept_once_it_is_unmerged() -> None:
    """A second weight would move with the model, and be restored after a later merge."""
    model, handle, _ = layer()
    before = [name for name, _ in model.named_buffers()]
    handle.merge()
    assert [name for name, _ in model.named_buffers()] != before
    handle.unmerge()
    assert [name for name, _ in model.named_buffers()] == before


def test_a_merged_model_can_be_moved_to_another_dtype() -> None:
    model, handle, lora = layer(torch.float32)
    base = lora.base.weight.detach().clone()
    handle.merge()
    model.double()
    handle.unmerge()
    assert lora.base.weight.dtype == torch.float64
    assert torch.equal(lora.base.weight, base.double())
    model(torch.randn(2, 13, dtype=torch.float64))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_and_b_are_float32_or_wider_and_the_output_has_the_dtype_of_the_input(
    base: torch.dtype,
) -> None:
    model, _, lora = layer(base)
    wanted = torch.float64 if base == torch.float64 else torch.float32
    assert lora.lora_a.dtype == lora.lora_b.dtype == wanted
    y = model(torch.randn(2, 13, dtype=base))
    assert y.dtype == base
    y.sum().backward()
    assert lora.lora_a.grad.dtype == wanted


def test_patterns_set_rank_and_alpha_by_the_end_of_a_name(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    handle: Any = peft_lite.attach(
        model,
        LoraConfig(
            PROJECTIONS,
            r=2,
            lora_alpha=3,
            rank_pattern={"h.1.attn.attention.q_proj": 7, "query": 5, r"mlp\..*": 6},
            alpha_pattern={r"blocks\.0\.attention\.\w+": 11, "v_proj": 13},
        ),
    )
    scales = {
        n: (len(m.lora_a), m.alpha, m.scaling)
        for n, m in handle.methods["default"].wrappers.items()
    }
    assert scales["blocks.1.attention.query"] == (7, 3, 3 / 7)  # the first key that matches counts
    assert scales["blocks.0.attention.query"] == (5, 11, 11 / 5)
    assert scales["blocks.0.attention.value"] == (2, 11, 11 / 2)
    assert scales["blocks.1.attention.value"] == (2, 13, 13 / 2)
    assert scales["blocks.1.mlp.down"] == (6, 3, 3 / 6)
    assert scales["blocks.1.attention.output"] == (2, 3, 3 / 2)


BAD_CONFIGS = {
    "target that matches nothing": ({"target_modules": ["out", "inner.9"]}, "'inner.9'"),
    "rank pattern": ({"rank_pattern": {"ot": 3}}, r"rank_pattern 'ot' .*'out'"),
    "alpha pattern": ({"alpha_pattern": {"inner.7": 3}}, r"alpha_pattern 'inner.7'"),
    "pattern for an end within a word": ({"alpha_pattern": {"ut": 3}}, r"alpha_pattern 'ut'"),
    "pattern for a layer that is not targeted": ({"rank_pattern": {"inner.0": 3}}, "inner.0"),
    "broken expression": ({"target_modules": "out("}, "not a regular expression"),
    "no target": ({"target_modules": []}, "empty"),
}


@pytest.mark.parametrize(("settings", "reason"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_an_error_leaves_the_model_as_it_was(settings: dict[str, Any], reason: str) -> None:
    model = Plain()
    model.inner[0].weight.requires_grad_(False)
    before = Picture(model)
    with pytest.raises(ValueError, match=reason):
        peft_lite.attach(model, LoraConfig(**{"target_modules": ["out"], **settings}))
    assert Picture(model) == before
    peft_lite.attach(model, LoraConfig(["out"]))


def test_a_model_that_is_itself_a_linear_layer_is_refused() -> None:
    model = nn.Linear(3, 2)
    before = Picture(model)
    with pytest.raises(ValueError, match=r".+"):
        peft_lite.attach(model, LoraConfig("all-linear"))
    assert Picture(model) == before


def test_multihead_attention_reads_weights_past_the_layer_so_dropout_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    before = Picture(model)
    with pytest.raises(ValueError, match="MultiheadAttention"):
        peft_lite.attach(model, LoraConfig(["out_proj"], lora_dropout=0.1))
    assert Picture(model) == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": -1}, "r is -1"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": np.int64(8)}, r"r is .*8.*, must be a whole number of at least 1 \(an int\)"),
        ({"lora_alpha": np.float32(8)}, r"must be a positive number \(an int or float\)"),
        ({"rank_pattern": {"out": 0}}, "r is 0"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": -2}, "lora_alpha is -2"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"alpha_pattern": {"out": math.inf}}, "lora_alpha is inf"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
    ],
)
def test_config_names_a_value_that_makes_no_sense(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LoraConfig(["out"], **settings)


def test_train_and_eval_change_modes_and_nothing_else() -> None:
    model, _, lora = layer(torch.bfloat16)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(3):
        assert model.eval() is model
        assert lora.eval() is lora
        assert lora.train() is lora
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    assert not lora.merged


def test_layers_begin_in_the_mode_of_what_they_wrap() -> None:
    model = Plain().eval()
    peft_lite.attach(model, LoraConfig("all-linear", lora_dropout=0.5))
    assert not any(m.training for m in model.modules())


def test_a_second_method_is_refused_until_the_first_is_detached() -> None:
    model = Plain()
    handle = peft_lite.attach(model, LoraConfig(["out"]))
    attached = Picture(model)
    with pytest.raises(ValueError, match="detach it first"):
        peft_lite.attach(model, LoraConfig(["inner.0"]))
    assert Picture(model) == attached
    peft_lite.attach(Plain(), LoraConfig(["out"]))
    handle.detach()
    peft_lite.attach(model, LoraConfig(["inner.0"]))


def test_a_copy_of_a_model_that_carries_a_method_is_refused_too() -> None:
    model = Plain()
    peft_lite.attach(model, LoraConfig(["out"]))
    with pytest.raises(ValueError, match="taken"):
        peft_lite.attach(copy.deepcopy(model), LoraConfig("all-linear"))


def test_an_attached_model_is_freed_with_its_last_reference() -> None:
    model = Plain()
    peft_lite.attach(model, LoraConfig(["out"]))
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_only_a_and_b_train_and_the_rest_stays_to_the_bit(models: tuple[Any, Any]) -> None:
    ours, _ = models
    handle = peft_lite.attach(ours, LoraConfig(["query", "mlp.up"], lora_dropout=0.1))
    trained = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trained} == {"lora_a", "lora_b"}
    before = {n: p.detach().clone() for n, p in ours.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), 1e-2, weight_decay=0.1)
    ours.train()
    for step in range(3):
        optimizer.zero_grad()
        output(ours, tokens(step)).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(p, before[n]) != (n in trained) for n, p in ours.named_parameters())
    assert all(p.grad is not None and p.grad.any() for p in trained.values())
    handle.detach()


def test_activation_checkpoints_leave_the_gradients_as_they_are(tmp_path: Path) -> None:
    model, _ = pair("gpt-neo", tmp_path)
    handle = peft_lite.attach(model, LoraConfig(["query", "value"]))
    perturb(handle)

    def gradients() -> Iterator[Tensor]:
        model.zero_grad()
        output(model, tokens()).square().mean().backward()
        return (p.grad.clone() for p in model.parameters() if p.requires_grad)

    plain = list(gradients())
    checkpoint_activations(model.blocks)
    for got, want in zip(gradients(), plain, strict=True):
        assert got.any()
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("n", "k", "r", "count"), [(512, 64, 8, 4_608), (1000, 1000, 100, 200_000)]
)
def test_counts_of_the_papers_examples(n: int, k: int, r: int, count: int) -> None:
    model = nn.Sequential(nn.Linear(k, n, bias=False))
    peft_lite.attach(model, LoraConfig(["0"], r=r))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert lora_count(r, [(n, k)]) == count
    assert tuple(model[0].lora_a.shape) == (r, k)
    assert tuple(model[0].lora_b.shape) == (n, r)


def test_count_at_the_size_of_gpt_neo_125m() -> None:
    with torch.device("meta"):
        model = minigpt.GPTNeo(minigpt.GPTNeoConfig())
        handle = peft_lite.attach(model, LoraConfig(["query", "value"], r=8))
    assert handle.report().trainable == 294_912 == lora_count(8, [(768, 768)] * 24)
    assert handle.report().total == 125_198_592 + 294_912
