"""Several adapters of one kind under names: one acts at a time, their sum, or each on its rows."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

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
from tests.peft_lite.peft_methods import fresh, inputs, of, same, shake, steps, trained
from tests.peft_lite.peft_models import Picture, Plain, output, pair, tokens

# what PEFT itself does with the `transformers` of today
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

# two of each kind, that of the second not simply the first's
PAIRS: dict[str, tuple[Any, Any]] = {
    "lora": (LoraConfig(["query", "mlp.up"], r=3), LoraConfig(["mlp.up", "value"], r=2)),
    "lora, dora": (LoraConfig(["query"], r=3), DoraConfig(["query", "key"], r=2)),
    "lora with biases": (
        LoraConfig(["query"], r=3, bias="all"),
        LoraConfig(["mlp.up", "query"], r=3, bias="lora_only"),
    ),
    "lora and a norm": (
        LoraConfig(["query"], r=3, modules_to_save=["mlp_norm"]),
        LoraConfig(["query"], r=2, modules_to_save=["mlp_norm", "attention_norm"]),
    ),
    "bottleneck": (BottleneckConfig("pfeiffer", 4), BottleneckConfig("houlsby", 3)),
    "bottleneck, beside": (BottleneckConfig("parallel", 4), BottleneckConfig("pfeiffer", 3)),
    "prefix": (PrefixConfig(3), PrefixConfig(2, form="peft")),
    "prompt": (PromptConfig(3), PromptConfig(4)),
    "bias": (BiasConfig(["mlp"]), BiasConfig()),
    "ia3": (IA3Config(["key", "mlp.down"]), IA3Config(["mlp.down"], ["mlp.down"])),
}
every_pair = pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
both_models = pytest.mark.parametrize("kind", ["gpt-neo", "bert"])


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(1, b.abs().max().item()))


def alone(kind: str, config: Any, seed: int) -> tuple[Any, Any, Tensor]:
    """(model, handle, output) with one shaken adapter."""
    torch.manual_seed(seed)
    model = fresh(kind)
    handle = peft_lite.attach(model, config)
    shake(trained(model).values(), seed=seed)
    return model, handle, of(model, inputs(kind))


def two(kind: str, first: Any, second: Any) -> tuple[Any, peft_lite.Handle, Tensor, Tensor]:
    """(model, handle, output under "a", output under "b"); "b" acts, and each is as if alone."""
    model = fresh(kind)
    torch.manual_seed(1)
    handle = peft_lite.attach(model, first, "a")
    shake(trained(model).values(), seed=1)
    torch.manual_seed(2)
    assert peft_lite.attach(model, second, "b") is handle
    shake(trained(model).values(), seed=2)
    return model, handle, alone(kind, first, 1)[2], alone(kind, second, 2)[2]


@both_models
@every_pair
def test_switching_gives_what_each_gives_alone(kind: str, first: Any, second: Any) -> None:
    model, handle, of_a, of_b = two(kind, first, second)
    x = inputs(kind)
    assert (of_a - of_b).abs().max() > 1e-3
    for name, expected in [("b", of_b), ("a", of_a), ("a", of_a), ("b", of_b), ("a", of_a)]:
        handle.switch(name)
        assert handle.active == [name]
        assert torch.equal(of(model, x), expected)
    with handle.enabled(False):
        assert torch.equal(of(model, x), of(fresh(kind), x))
    assert handle.active == ["a"]
    assert torch.equal(of(model, x), of_a)


@both_models
@every_pair
def test_only_the_one_that_acts_trains(kind: str, first: Any, second: Any) -> None:
    model, handle, *_ = two(kind, first, second)
    x = inputs(kind)
    for name, other in ["ab", "ba", "ab"]:
        handle.switch(other)
        resting = of(model, x)
        handle.switch(name)
        before = of(model, x)
        names = {n for n, _ in trained(model).items()}
        expected = handle.methods[name].trained()
        assert {id(p) for p in trained(model).values()} == {id(p) for p in expected}
        model.zero_grad()
        steps(model, kind)
        assert not torch.equal(of(model, x), before)
        assert all((p.grad is not None) == (n in names) for n, p in model.named_parameters())
        handle.switch(other)
        assert torch.equal(of(model, x), resting)


@both_models
@every_pair
@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("active", "ab")
def test_one_of_two_is_taken_off_and_then_the_other(
    kind: str, first: Any, second: Any, order: str, active: str
) -> None:
    before = Picture(fresh(kind)).values
    flags = {n: p.requires_grad for n, p in fresh(kind).named_parameters()}
    model, handle, of_a, of_b = two(kind, first, second)
    x = inputs(kind)
    handle.switch(active)
    gone, left = order
    handle.detach(gone)
    assert list(handle.methods) == [left]
    assert handle.active == ([left] if left == active else [])
    if left == active:
        mine = handle.methods[left].trained()
        assert {id(p) for p in trained(model).values()} == {id(p) for p in mine}
    else:
        assert torch.equal(of(model, x), of(fresh(kind), x))
        assert not trained(model)
    handle.switch(left)
    assert torch.equal(of(model, x), {"a": of_a, "b": of_b}[left])
    assert trained(model)
    handle.detach(left)
    assert same(Picture(model).values, before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert not any(n.endswith("base") for n, _ in model.named_modules())


@both_models
@pytest.mark.parametrize(
    "pair_of",
    [n for n, (c, _) in PAIRS.items() if isinstance(c, LoraConfig | BiasConfig | IA3Config)],
)
def test_fold_keeps_the_one_that_acts(kind: str, pair_of: str) -> None:
    first, second = PAIRS[pair_of]
    for name in "ab":
        model, handle, of_a, of_b = two(kind, first, second)
        handle.switch(name)
        handle.fold()
        close(of(model, inputs(kind)), {"a": of_a, "b": of_b}[name])
        assert Picture(model).modules.keys() == Picture(fresh(kind)).modules.keys()


@both_models
@every_pair
def test_each_is_saved_and_loaded_by_its_name(
    kind: str, first: Any, second: Any, tmp_path: Path
) -> None:
    _, handle, of_a, of_b = two(kind, first, second)
    for name in "ab":
        handle.save(tmp_path / name, name=name)  # whichever acts
    with pytest.raises(ValueError, match="several methods: name one of 'a', 'b'"):
        handle.save(tmp_path / "c")
    with pytest.raises(ValueError, match="several methods"):
        handle.state()
    assert not (tmp_path / "c").exists()
    other, x = fresh(kind), inputs(kind)
    peft_lite.load(other, tmp_path / "b", name="y")
    loaded = peft_lite.load(other, tmp_path / "a", name="x")
    assert loaded.active == ["x"]
    assert list(loaded.methods) == ["y", "x"]
    close(of(other, x), of_a)
    loaded.switch("y")
    close(of(other, x), of_b)


@both_models
@every_pair
def test_the_state_of_the_one_that_rests_is_its_own(kind: str, first: Any, second: Any) -> None:
    _, handle, _, _ = two(kind, first, second)
    for name, config, seed in [("a", first, 1), ("b", second, 2)]:
        expected = alone(kind, config, seed)[1].state()
        for active in "ab":
            handle.switch(active)
            assert same(handle.state(name), expected)


@pytest.mark.parametrize("second", [LoraConfig(["query"]), BiasConfig()])
def test_a_load_that_fails_leaves_the_first_acting(second: Any, tmp_path: Path) -> None:
    other = pair("bert", tmp_path / "base")[0]
    peft_lite.attach(other, second).save(tmp_path / "adapter")
    model = fresh("gpt-neo")
    handle = peft_lite.attach(model, LoraConfig(["query"], r=3, bias="all"), "first")
    shake(trained(model).values())
    attached, before = Picture(model), of(model, tokens())
    with pytest.raises(ValueError, match=r"tensors are|first"):
        peft_lite.load(model, tmp_path / "adapter", "second")
    assert handle.active == ["first"]
    assert Picture(model) == attached
    assert torch.equal(of(model, tokens()), before)


def test_a_copy_is_of_the_models_own_module_whatever_acts() -> None:
    model = fresh("bert")
    before = model.head.classifier.bias.detach().clone()
    handle = peft_lite.attach(model, LoraConfig(["query"], bias="all"), "a")
    shake(trained(model).values())
    assert not torch.equal(model.head.classifier.bias, before)
    peft_lite.attach(model, LoraConfig(["query"], modules_to_save=["classifier"]), "b")
    state = handle.state("b")
    (bias,) = (t for n, t in state.items() if n.endswith("classifier.bias"))
    assert torch.equal(bias, before)


# --- the weighted sum ---------------------------------------------------------------------------


def random_lora(handle: Any, name: str, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for p in handle.methods[name].trained():
        p.data.copy_(0.3 * torch.randn(p.shape, generator=random))


def sum_of_updates(handle: Any, weights: dict[str, float], place: str) -> Tensor:
    """Sum of w s B A in float64, with s told from the config alone."""
    total: Any = 0.0
    for name, weight in weights.items():
        config, state = handle.methods[name].config, handle.state(name)
        a, b = (state.get(f"base_model.model.{place}.lora_{end}.weight") for end in "AB")
        table = a is None
        if table:
            a, b = (state.get(f"base_model.model.{place}.lora_embedding_{end}") for end in "AB")
        if a is None:
            continue
        r, alpha = len(a), config.lora_alpha
        for end, value in config.alpha_pattern.items():
            alpha = value if place.endswith(end) else alpha
        s = alpha / math.sqrt(r) if config.use_rslora else alpha / r
        update = weight * s * (b.double() @ a.double())
        total = total + (update.T if table else update)
    return total


SUMMANDS = {
    "a": LoraConfig(
        ["q_proj", "c_fc", "wpe"], r=4, lora_alpha=10, rank_pattern={"c_fc": 2, "wpe": 5}
    ),
    "b": LoraConfig(["v_proj", "q_proj"], r=3, lora_alpha=7, use_rslora=True),
    "c": LoraConfig(["wpe", "c_fc"], r=2, alpha_pattern={"c_fc": 3}, use_rslora=True),
}
PLACES = ["attn.attention.q_proj", "attn.attention.v_proj", "mlp.c_fc"]


def summed(weights: dict[str, float]) -> tuple[Any, Any]:
    model = fresh("gpt-neo").double()
    for seed, (name, config) in enumerate(SUMMANDS.items()):
        handle = peft_lite.attach(model, config, name)
        random_lora(handle, name, seed)
    handle.combine("sum", weights)
    return model, handle


@pytest.mark.parametrize(
    "weights",
    [
        {"a": 0.7, "b": -1.3, "c": 2.0},
        {"b": 1.0},
        {"c": -0.5, "a": 0.0},
    ],
)
def test_the_combination_is_the_weighted_sum(weights: dict[str, float]) -> None:
    model, handle = summed(weights)
    assert handle.active == ["sum"]
    base = fresh("gpt-neo").double()
    x, unlike = tokens(), of(base, tokens())
    places = [f"transformer.h.{i}.{place}" for i in range(2) for place in PLACES]
    for place in [*places, "transformer.wpe"]:
        update = sum_of_updates(handle, weights, place)
        layer = base.get_submodule(base.names.from_hf(place))
        layer.weight.data += update
        now = model.get_submodule(base.names.from_hf(place))
        if isinstance(update, float):
            assert type(now) is type(layer) or not now.active
    expected = of(base, x)
    assert (expected - unlike).abs().max() > 1e-2
    torch.testing.assert_close(of(model, x), expected, rtol=1e-10, atol=1e-10)
    handle.merge("sum")
    torch.testing.assert_close(of(model, x), expected, rtol=1e-10, atol=1e-10)
    for name in base.state_dict():
        p = base.get_parameter(name)
        merged = dict(model.named_parameters(remove_duplicate=False))
        value = merged.get(name)
        if value is not None:
            torch.testing.assert_close(value, p, rtol=1e-12, atol=1e-12)


def test_the_combination_trains_and_leaves_its_parts_alone() -> None:
    model, handle = summed({"a": 1.0, "b": 1.0})
    parts = {n: {k: t.clone() for k, t in handle.state(n).items()} for n in "abc"}
    state = {n: t.clone() for n, t in handle.state("sum").items()}
    mine = handle.methods["sum"].trained()
    assert {id(p) for p in trained(model).values()} == {id(p) for p in mine}
    steps(model, "gpt-neo")
    assert all(same(handle.state(n), parts[n]) for n in "abc")
    assert not any(torch.equal(t, state[n]) for n, t in handle.state("sum").items())


def test_the_combination_is_saved_loaded_and_opened_by_peft(tmp_path: Path) -> None:
    weights = {"a": 0.7, "b": -1.3, "c": 2.0}
    model, handle = summed(weights)
    model.float()
    handle.save(tmp_path / "sum", name="sum")
    expected = of(model, tokens())
    ours, theirs = pair("gpt-neo", tmp_path / "base")
    assert (of(ours, tokens()) - expected).abs().max() > 1e-2
    peft_lite.load(ours, tmp_path / "sum")
    close(of(ours, tokens()), expected)
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "sum").eval()
    close(output(opened, tokens()).detach(), expected)


def test_a_tied_tables_combination_is_the_weighted_sum_too() -> None:
    model = fresh("gpt-neo").double()
    handle = peft_lite.attach(model, LoraConfig(["wte"], r=3, lora_alpha=5), "a")
    random_lora(handle, "a", 1)
    peft_lite.attach(model, LoraConfig(["wte", "lm_head"], r=2, use_rslora=True), "b")
    random_lora(handle, "b", 2)
    weights = {"a": -0.4, "b": 1.5}
    handle.combine("sum", weights)
    base = fresh("gpt-neo").double()
    table, head = base.embeddings.token.weight.detach(), base.head.weight.detach()
    base.embeddings.token.weight = nn.Parameter(
        table + sum_of_updates(handle, weights, "transformer.wte")
    )
    base.head.weight = nn.Parameter(head + sum_of_updates(handle, weights, "lm_head"))
    torch.testing.assert_close(of(model, tokens()), of(base, tokens()), rtol=1e-10, atol=1e-10)


NOT_SUMMED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "absent": (LoraConfig(["query"]), {"a": 1.0, "x": 1.0}, r"no method is called 'x'"),
    "misspelt": (LoraConfig(["query"]), {"othr": 1.0}, r"'othr' \(did you mean 'other'\?\)"),
    "nothing": (LoraConfig(["query"]), {}, "nothing to combine"),
    "nan": (LoraConfig(["query"]), {"a": math.nan}, "weight of 'a' is nan"),
    "infinite": (LoraConfig(["query"]), {"a": 1.0, "other": -math.inf}, "of 'other' is -inf"),
    "a word": (LoraConfig(["query"]), {"a": "1"}, "weight of 'a' is '?1"),
    "dora": (DoraConfig(["query"]), {"a": 1.0, "other": 1.0}, "'other' is not a LoRA"),
    "ia3": (IA3Config(["key"]), {"other": 1.0}, "'other' is not a LoRA"),
    "bottleneck": (BottleneckConfig(), {"other": 1.0}, "'other' is not a LoRA"),
    "bias": (LoraConfig(["query"], bias="all"), {"other": 1.0}, "'other' trains biases"),
    "module": (
        LoraConfig(["query"], modules_to_save=["mlp_norm"]),
        {"a": 1.0, "other": 1.0},
        "'other' trains biases or whole modules",
    ),
}


@pytest.mark.parametrize(("config", "weights", "reason"), NOT_SUMMED.values(), ids=NOT_SUMMED)
def test_what_has_no_sum_is_refused(config: Any, weights: dict[str, float], reason: str) -> None:
    model = fresh("bert")
    handle = peft_lite.attach(model, LoraConfig(["query", "key"]), "a")
    peft_lite.attach(model, config, "other")
    attached, active = Picture(model), handle.active
    with pytest.raises(ValueError, match=reason):
        handle.combine("sum", weights)
    assert Picture(model) == attached
    assert handle.active == active
    with pytest.raises(ValueError, match="the name 'a' is taken"):
        handle.combine("a", {"a": 1.0})
    assert Picture(model) == attached


# --- rows ---------------------------------------------------------------------------------------


def three(kind: str, **settings: Any) -> tuple[Any, Any]:
    """A model with a LoRA "a", a DoRA "b" and a LoRA "c" on layers that overlap."""
    model = fresh(kind).double()
    configs = {
        "a": LoraConfig(["query", "mlp.up", "value"], r=3, lora_alpha=7, **settings),
        "b": DoraConfig(["query", "mlp.down"], r=2, lora_alpha=5),
        "c": LoraConfig(["value", "mlp.down", "query"], r=4, use_rslora=True),
    }
    for seed, (name, config) in enumerate(configs.items()):
        handle = peft_lite.attach(model, config, name)
        shake(trained(model).values(), seed=seed)
    return model, handle


NAMES = ["a", None, "b", "a", "c", None]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["gpt-neo", "bert"])
def test_each_row_runs_as_it_would_alone(kind: str, training: bool, padding: bool) -> None:
    model, handle = three(kind)
    for module in model.modules():
        module.training = training and not isinstance(module, nn.Dropout)
        if hasattr(module, "attend"):
            module.training = False
    handle.switch("c")
    x = torch.cat([tokens(1), tokens(2)])
    mask = torch.ones_like(x)
    if padding:
        mask[0, 7:], mask[3, :4], mask[5, 9:] = 0, 0, 0

    def run(rows: slice) -> Tensor:
        return model(x[rows], attention_mask=mask[rows] if padding else None).detach()

    attached, acting = Picture(model), run(slice(None))
    expected = []
    for i, name in enumerate(NAMES):
        if name is None:
            with handle.enabled(False):
                expected.append(run(slice(i, i + 1)))
        else:
            handle.switch(name)
            expected.append(run(slice(i, i + 1)))
    handle.switch("c")
    with handle.rows(NAMES):
        output = run(slice(None))
    torch.testing.assert_close(output, torch.cat(expected), rtol=1e-10, atol=1e-10)
    assert (output - acting)[:4].abs().amax((1, *range(2, output.dim()))).min() > 1e-3
    assert handle.active == ["c"]
    assert Picture(model) == attached
    assert torch.equal(run(slice(None)), acting)


def test_rows_of_vectors_and_of_sequences_of_them() -> None:
    model = Plain().double()
    handle = peft_lite.attach(model, LoraConfig("all-linear", r=2, lora_alpha=3), "a")
    shake(trained(model).values(), seed=1)
    peft_lite.attach(model, DoraConfig(["inner.0"], r=2), "b")
    shake(trained(model).values(), seed=2)
    for shape in [(4, 7), (4, 2, 7), (4, 3, 2, 7)]:
        x = torch.randn(shape, dtype=torch.float64)
        with handle.rows(["b", "a", None, "a"]):
            output = model(x)
        with handle.enabled(False):
            torch.testing.assert_close(output[2:3], model(x[2:3]))
        torch.testing.assert_close(output[:1], model(x[:1]))
        handle.switch("a")
        torch.testing.assert_close(output[[1, 3]], model(x[[1, 3]]))
        handle.switch("b")


def test_rows_of_a_table() -> None:
    model = fresh("bert").double()
    handle = peft_lite.attach(model, LoraConfig(["embeddings.token"], r=3), "a")
    shake(trained(model).values(), seed=1)
    peft_lite.attach(model, DoraConfig(["embeddings.token", "query"], r=3), "b")
    shake(trained(model).values(), seed=2)
    x = tokens()
    with handle.rows(["b", None, "a"]):
        output = of(model, x)
    torch.testing.assert_close(output[:1], of(model, x[:1]))
    handle.switch("a")
    torch.testing.assert_close(output[2:], of(model, x[2:]))
    torch.testing.assert_close(output[1:2], of(fresh("bert").double(), x[1:2]))


def test_gradients_of_rows_are_those_of_each_alone() -> None:
    model, handle = three("gpt-neo")
    x = torch.cat([tokens(1), tokens(2)])
    weights = torch.randn(
        6, 11, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    names = {id(p): n for n, p in model.named_parameters()}
    every = {n: handle.methods[n].trained() for n in "abc"}
    expected: dict[str, Tensor] = {}
    for name, parameters in every.items():
        handle.switch(name)
        model.zero_grad()
        rows = [i for i, n in enumerate(NAMES) if n == name]
        (weights[rows] * model(x[rows])).sum().backward()
        expected |= {names[id(p)]: p.grad.clone() for p in parameters}
    for parameters in every.values():
        for p in parameters:
            p.requires_grad_(True)
    model.zero_grad()
    with handle.rows(NAMES):
        y = model(x)
    (weights * y).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for n, g in gradients.items():
        torch.testing.assert_close(g, expected[n], rtol=1e-9, atol=1e-9)


def test_rows_under_another_method_leave_it_acting() -> None:
    model = fresh("gpt-neo").double()
    handle = peft_lite.attach(model, LoraConfig(["query", "mlp.down"], r=3), "a")
    shake(trained(model).values(), seed=1)
    for name, config in [
        ("scales", IA3Config(["query", "mlp.down"], ["mlp.down"])),
        ("prefix", PrefixConfig(3)),
        ("adapters", BottleneckConfig("pfeiffer", 4)),
    ]:
        peft_lite.attach(model, config, name)
        shake(handle.methods[name].trained(), seed=3)
    x = tokens()
    alone = of(model, x)
    with handle.rows(["a", None, "a"]):
        output = of(model, x)
    torch.testing.assert_close(output[[0, 2]], alone[[0, 2]])
    assert (output - alone)[1].abs().max() > 1e-3
    handle.detach("a")
    torch.testing.assert_close(output[1], of(model, x)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_in_a_lower_precision(dtype: torch.dtype) -> None:
    model, handle = three("gpt-neo")
    model.to(dtype)
    x = tokens()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        with handle.rows(["a", "b", None]):
            output = of(model, x)
        handle.switch("a")
        alone = of(model, x)
    assert output.dtype == torch.bfloat16
    assert (output - alone)[0].norm() < 0.05 * alone[0].norm()


def test_a_batch_of_another_size_is_refused_and_all_acts_as_before() -> None:
    model, handle = three("gpt-neo")
    attached, before = Picture(model), of(model, tokens())
    for names in (["a", "b"], ["a"] * 4, [None, "a"]):
        with pytest.raises(ValueError, match=f"batch of {len(names)}, .* 3"), handle.rows(names):
            model(tokens())
        assert handle.active == ["c"]
        assert Picture(model) == attached
        assert torch.equal(of(model, tokens()), before)


NO_ROWS: dict[str, tuple[Any, list[str | None], str]] = {
    "absent": (LoraConfig(["key"]), ["x", None], "no method is called 'x'"),
    "misspelt": (LoraConfig(["key"]), ["othr"], "did you mean 'other'"),
    "lora biases": (LoraConfig(["key"], bias="all"), ["other"], "'other' changes more than"),
    "copies": (
        LoraConfig(["key"], modules_to_save=["mlp_norm"]),
        [None, "other"],
        "'other' changes more than",
    ),
    "bias": (BiasConfig(), ["a", "other"], "'other' changes more than"),
    "freezing": (FreezeConfig(train=["mlp"]), ["other"], "'other' changes more than"),
    "bottleneck": (BottleneckConfig(), ["other"], "'other' changes more than"),
    "prompt": (PromptConfig(3), ["other"], "'other' changes more than"),
    "ia3": (IA3Config(["key"]), ["other"], "'other' changes more than"),
}


@pytest.mark.parametrize(("config", "names", "reason"), NO_ROWS.values(), ids=NO_ROWS)
def test_what_cannot_act_on_some_rows_is_refused(
    config: Any, names: list[str | None], reason: str
) -> None:
    model = fresh("gpt-neo")
    handle = peft_lite.attach(model, LoraConfig(["query"]), "a")
    peft_lite.attach(model, config, "other")
    shake(trained(model).values())
    attached, before, active = Picture(model), of(model, tokens()), handle.active
    with pytest.raises(ValueError, match=reason), handle.rows(names):
        pass
    assert Picture(model) == attached
    assert handle.active == active
    assert torch.equal(of(model, tokens()), before)


def test_rows_end_with_an_exception_too() -> None:
    model, handle = three("gpt-neo")
    attached, before = Picture(model), of(model, tokens())
    with pytest.raises(KeyError, match="an accident"), handle.rows(["a", "b", None]):
        raise KeyError("an accident")
    assert handle.active == ["c"]
    assert Picture(model) == attached
    assert torch.equal(of(model, tokens()), before)


def test_a_lora_with_biases_steps_aside_for_rows() -> None:
    model, x = fresh("gpt-neo"), tokens()
    handle = peft_lite.attach(model, LoraConfig(["query"], r=3), "a")
    shake(trained(model).values(), seed=1)
    of_a = of(model, x)
    peft_lite.attach(model, LoraConfig(["query"], r=3, bias="all"), "biases")
    shake(trained(model).values(), seed=2)
    before = of(model, x)
    with handle.rows(["a", None, "a"]):
        output = of(model, x)
    close(output[[0, 2]], of_a[[0, 2]])
    close(output[1], of(fresh("gpt-neo"), x)[1])
    assert torch.equal(of(model, x), before)
