"""Methods of different kinds on one model, against dense arithmetic; what does not go together."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

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
from tests.peft_lite.peft_methods import fresh, of, same, shake, steps, trained
from tests.peft_lite.peft_models import Picture, Plain, tokens

LORA = LoraConfig(["query", "mlp.up", "mlp.down"], r=3, lora_alpha=7)


def put(model: nn.Module, configs: dict[str, Any], order: Any = None) -> peft_lite.Handle:
    """Attaches in the given order, and shakes each method the same way whatever that order is."""
    for name in order or configs:
        torch.manual_seed(0)
        handle = peft_lite.attach(model, configs[name], name)
    for seed, name in enumerate(configs):
        shake(handle.methods[name].trained(), seed=seed)
    return handle


# --- on one layer, the arithmetic ---------------------------------------------------------------

LAYER: dict[str, dict[str, Any]] = {
    "lora, bias": {
        "lora": LoraConfig(["inner.0"], r=2, lora_alpha=3),
        "bias": BiasConfig(["inner.0"]),
    },
    "lora, ia3 after": {
        "lora": LoraConfig(["inner.0"], r=2, lora_alpha=3),
        "ia3": IA3Config(["inner.0"]),
    },
    "lora, ia3 before": {
        "lora": LoraConfig(["inner.0"], r=2, lora_alpha=3),
        "ia3": IA3Config(["inner.0"], ["inner.0"]),
    },
    "dora, ia3 after": {
        "lora": DoraConfig(["inner.0"], r=2, lora_alpha=3),
        "ia3": IA3Config(["inner.0"]),
    },
    "ia3, bias, lora": {
        "ia3": IA3Config(["inner.0"]),
        "bias": BiasConfig(["inner.0"]),
        "lora": LoraConfig(["inner.0"], r=2, lora_alpha=3),
    },
    "lora, bottleneck": {
        "lora": LoraConfig(["inner.0"], r=2, lora_alpha=3),
        "bottleneck": BottleneckConfig("pfeiffer", 4, "tanh", ["inner.0"]),
    },
    "bottleneck, ia3, lora": {
        "bottleneck": BottleneckConfig("pfeiffer", 4, "relu", ["inner.0"]),
        "ia3": IA3Config(["inner.0"], ["inner.0"]),
        "lora": LoraConfig(["inner.0"], r=2, lora_alpha=3),
    },
}


def by_hand(handle: Any, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """Y of the layer: LoRA changes W, IA3 scales around it, the adapter comes last."""
    w, b = weight.clone(), bias.clone()
    after = 1.0
    states = {
        name: {k.rsplit("inner.0.", 1)[1]: t.double() for k, t in handle.state(name).items()}
        for name in handle.methods
    }
    if (lora := states.get("lora")) is not None:
        w = w + 1.5 * lora["lora_B.weight"] @ lora["lora_A.weight"]
        if (m := lora.get("lora_magnitude_vector")) is not None:
            w = w * (m / w.norm(dim=1))[:, None]
    if "bias" in states:
        b = next(iter(states["bias"].values()))
    if (ia3 := states.get("ia3")) is not None:
        scale = ia3["ia3_l"]
        if scale.size(0) == 1:
            x = x * scale[0]
        else:
            after = scale[:, 0]
    y = after * (x @ w.T + b)
    if (adapter := states.get("bottleneck")) is not None:
        sigma = {"tanh": torch.tanh, "relu": torch.relu}
        inner = y @ adapter["adapter_down.weight"].T + adapter["adapter_down.bias"]
        inner = sigma[handle.methods["bottleneck"].config.non_linearity](inner)
        y = y + inner @ adapter["adapter_up.weight"].T + adapter["adapter_up.bias"]
    return y


ORDERS = [(n, order) for n, configs in LAYER.items() for order in itertools.permutations(configs)]
every_order = pytest.mark.parametrize(
    ("what", "order"), ORDERS, ids=[f"{n}: {' '.join(order)}" for n, order in ORDERS]
)


def layered(what: str, order: tuple[str, ...]) -> tuple[Any, Any, Tensor, Tensor]:
    """(model, handle, x, y by hand) of the first layer of `Plain`."""
    torch.manual_seed(0)
    model = Plain().double()
    weight, bias = model.inner[0].weight.detach().clone(), model.inner[0].bias.detach().clone()
    handle = put(model, LAYER[what], order)
    x = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return model, handle, x, by_hand(handle, weight, bias, x)


@every_order
def test_one_layer_under_several_methods_is_the_closed_form_in_every_order(
    what: str, order: tuple[str, ...]
) -> None:
    model, _, x, expected = layered(what, order)
    torch.testing.assert_close(model.inner[0](x).detach(), expected, rtol=1e-12, atol=1e-12)


@every_order
def test_what_can_merge_merges_into_the_same_and_back_to_the_bit(
    what: str, order: tuple[str, ...]
) -> None:
    model, handle, x, expected = layered(what, order)
    attached = Picture(model)
    if "bottleneck" in order:
        with pytest.raises(ValueError, match="cannot merge 'bottleneck'"):
            handle.merge()
        assert Picture(model) == attached
        for name in ("lora", "ia3"):
            if name in order:
                handle.merge(name)
    else:
        handle.merge()
        merged = F.linear(x, *(p.detach() for p in innermost(model.inner[0]).parameters()))
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.inner[0](x).detach(), expected, rtol=1e-12, atol=1e-12)
    handle.unmerge()
    assert Picture(model) == attached


def innermost(module: Any) -> nn.Module:
    while not isinstance(module, nn.Linear):
        module = module.base
    return module


@every_order
def test_they_come_off_in_any_order(what: str, order: tuple[str, ...]) -> None:
    for off in itertools.permutations(order):
        torch.manual_seed(0)
        model = Plain().double()
        before = Picture(model)
        handle = put(model, LAYER[what], order)
        x = torch.randn(5, 7, dtype=torch.float64)
        for name in off:
            handle.detach(name)
            if handle.methods:
                rest = by_hand(
                    handle, before.values["inner.0.weight"], before.values["inner.0.bias"], x
                )
                torch.testing.assert_close(model.inner[0](x).detach(), rest, rtol=1e-12, atol=1e-12)
        assert Picture(model) == before


@pytest.mark.parametrize("what", [n for n in LAYER if "bottleneck" not in n])
@pytest.mark.parametrize("merged", [[], ["lora"], ["lora", "ia3"]])
def test_fold_keeps_all_that_acts_whatever_was_merged_before(what: str, merged: list[str]) -> None:
    model, handle, x, expected = layered(what, tuple(LAYER[what]))
    for name in merged:
        if name in handle.methods:
            handle.merge(name)
    handle.fold()
    assert type(model.inner[0]) is nn.Linear
    torch.testing.assert_close(model.inner[0](x).detach(), expected, rtol=1e-12, atol=1e-12)
    assert all(p.requires_grad for p in model.parameters())


def test_fold_refuses_to_drop_a_prefix_beside_a_merged_lora() -> None:
    model = fresh("gpt-neo")
    handle = put(model, {"lora": LORA, "prefix": PrefixConfig(3)})
    handle.merge("lora")
    merged, before = Picture(model), of(model, tokens())
    with pytest.raises(ValueError, match="cannot merge 'prefix'"):
        handle.fold()
    assert Picture(model) == merged
    assert torch.equal(of(model, tokens()), before)


def test_ia3_alone_is_not_merged_over_a_lora_that_acts() -> None:
    model, handle, x, expected = layered("lora, ia3 after", ("lora", "ia3"))
    attached = Picture(model)
    with pytest.raises(
        ValueError, match="cannot merge 'ia3' alone: another active method is inside it"
    ):
        handle.merge("ia3")
    assert Picture(model) == attached
    handle.merge("lora")
    handle.merge("ia3")
    torch.testing.assert_close(model.inner[0](x).detach(), expected, rtol=1e-12, atol=1e-12)
    handle.unmerge()
    assert Picture(model) == attached


# --- on a model ---------------------------------------------------------------------------------

TOGETHER: dict[str, dict[str, Any]] = {
    "lora, bias": {"lora": LORA, "bias": BiasConfig()},
    "lora, ia3": {"lora": LORA, "ia3": IA3Config(["query", "mlp.down"], ["mlp.down"])},
    "dora, bottleneck": {
        "dora": DoraConfig(["mlp.down", "attention.output"], r=3),
        "bottleneck": BottleneckConfig("houlsby", 4),
    },
    "lora, parallel": {"lora": LORA, "parallel": BottleneckConfig("parallel", 4)},
    "bottleneck, freezing": {
        "bottleneck": BottleneckConfig("pfeiffer", 4),
        "freezing": FreezeConfig(train=["attention_norm", "mlp"]),
    },
    "lora, freezing": {
        "lora": LoraConfig(["query"], r=3),
        "freezing": FreezeConfig(train=["mlp"]),
    },
    "lora, prefix": {"lora": LoraConfig(["key", "value"], r=3), "prefix": PrefixConfig(3)},
    "prompt, lora": {"prompt": PromptConfig(3), "lora": LORA},
    "prompt, lora of tables": {
        "prompt": PromptConfig(3),
        "lora": LoraConfig(["embeddings.token", "embeddings.position"], r=3),
    },
    "everything": {
        "lora": LoraConfig(["query", "mlp.down"], r=3),
        "ia3": IA3Config(["value", "mlp.down"], ["mlp.down"]),
        "bottleneck": BottleneckConfig("houlsby", 4),
        "prefix": PrefixConfig(2, form="peft"),
        "bias": BiasConfig(["mlp_norm", "attention"]),
    },
}
together = pytest.mark.parametrize("what", TOGETHER)
both_models = pytest.mark.parametrize("kind", ["gpt-neo", "bert"])


@both_models
@together
def test_the_order_of_attaching_changes_nothing(kind: str, what: str) -> None:
    configs = TOGETHER[what]
    outputs = []
    for order in (list(configs), list(configs)[::-1]):
        model = fresh(kind)
        handle = put(model, configs, order)
        outputs.append(of(model, tokens()))
        assert sorted(handle.active) == sorted(configs)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)


@both_models
@pytest.mark.parametrize("what", [n for n in TOGETHER if "freezing" not in n])
def test_each_alone_and_all_together_compute_different_things(kind: str, what: str) -> None:
    configs = TOGETHER[what]
    outputs = []
    for chosen in ([], *([name] for name in configs), list(configs)):
        model = fresh(kind)
        handle = put(model, configs)
        for name in configs:
            if name not in chosen:
                handle.detach(name)
        outputs.append(of(model, tokens()))
    for a, b in itertools.combinations(outputs, 2):
        assert (a - b).abs().max() > 1e-3


@both_models
@together
def test_all_of_them_train_and_detach_restores_the_model(kind: str, what: str) -> None:
    configs = TOGETHER[what]
    model = fresh(kind)
    before, base = Picture(model), of(model, tokens())
    for name, config in configs.items():
        handle = peft_lite.attach(model, config, name)
    tuned = {name: handle.methods[name].trained() for name in configs}
    ids = [id(p) for parameters in tuned.values() for p in parameters]
    assert len(ids) == len(set(ids))
    assert {id(p) for p in trained(model).values()} == set(ids)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    steps(model, kind)
    for n, p in model.named_parameters():
        assert torch.equal(p, start[n]) == (id(p) not in ids), n
    handle.detach()
    if "freezing" not in configs:
        assert Picture(model) == before
        assert torch.equal(of(model, tokens()), base)
    assert Picture(model).parameters == before.parameters
    assert Picture(model).modules == before.modules


@both_models
@together
def test_each_is_saved_beside_the_others_and_comes_back(
    kind: str, what: str, tmp_path: Path
) -> None:
    model, other = fresh(kind), fresh(kind)
    handle = put(model, TOGETHER[what])
    for name in TOGETHER[what]:
        handle.save(tmp_path / name, name=name)
    for name in reversed(TOGETHER[what]):
        loaded = peft_lite.load(other, tmp_path / name, name)
    torch.testing.assert_close(of(other, tokens()), of(model, tokens()), rtol=0, atol=1e-6)
    for name in TOGETHER[what]:
        assert same(loaded.state(name), handle.state(name))


@both_models
def test_a_lora_within_a_parallel_adapter_is_the_sum_of_both(kind: str) -> None:
    configs = TOGETHER["lora, parallel"]
    model, x = fresh(kind).double(), torch.randn(2, 24, dtype=torch.float64)
    mlp = fresh(kind).double().blocks[1].mlp
    handle = put(model, configs)
    lora = {n: t for n, t in handle.state("lora").items() if f"{1}." in n}
    for layer, hf in (("up", ("c_fc", "intermediate.dense")), ("down", ("c_proj", "output.dense"))):
        (a,), (b,) = (
            [
                t
                for n, t in lora.items()
                if n.endswith(tuple(f"{h}.lora_{end}.weight" for h in hf))
                and "attention.output" not in n
            ]
            for end in "AB"
        )
        getattr(mlp, layer).weight.data += 7 / 3 * b @ a
    adapter = [t for n, t in handle.state("parallel").items() if "1" in n.split("adapter")[0]]
    down, down_bias, up, up_bias = adapter
    expected = mlp(x) + F.linear(F.relu(F.linear(x, down, down_bias)), up, up_bias)
    output = model.blocks[1].mlp(x)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_prompt_and_lora_of_the_token_table_leave_the_vectors_of_the_prompt_alone() -> None:
    model = fresh("gpt-neo")
    put(model, {"prompt": PromptConfig(3), "lora": LoraConfig(["embeddings.token"], r=3)})
    before = of(model, tokens())
    model.embeddings.token.lora_b.data.mul_(0)
    without = of(model, tokens())
    reference = fresh("gpt-neo")
    put(reference, {"prompt": PromptConfig(3)})
    assert torch.equal(without, of(reference, tokens()))
    assert (before - without).abs().max() > 1e-3


def test_one_is_switched_off_alone_by_another_of_its_kind() -> None:
    model = fresh("gpt-neo")
    handle = put(model, {"lora": LORA, "ia3": IA3Config(["key"]), "prefix": PrefixConfig(2)})
    peft_lite.attach(model, LoraConfig(["value"], r=2), "other")
    assert handle.active == ["ia3", "prefix", "other"]
    peft_lite.attach(model, PrefixConfig(4), "longer")
    assert handle.active == ["ia3", "other", "longer"]
    handle.switch("lora")
    assert handle.active == ["lora", "ia3", "longer"]


# --- what does not go together ------------------------------------------------------------------

REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "lora on a weight that trains": (
        "gpt-neo",
        {"freezing": FreezeConfig(train=["mlp"])},
        LoraConfig(["query", "mlp.up"]),
        r"blocks\.0\.mlp\.up\.weight trains under 'freezing': 'new' changes the same weight",
    ),
    "a weight that has a lora trains": (
        "bert",
        {"lora": LORA},
        FreezeConfig(freeze=["embeddings"]),
        r"\.weight trains under 'new': 'lora' changes the same weight",
    ),
    "ia3 on a weight that trains": (
        "gpt-neo",
        {"freezing": FreezeConfig(train=["key"])},
        IA3Config(["key"]),
        r"key\.weight trains under 'freezing'",
    ),
    "lora on a tied table that trains": (
        "gpt-neo",
        {"freezing": FreezeConfig(train=["head"])},
        LoraConfig(["embeddings.token"]),
        r"embeddings\.token\.weight trains under 'freezing'",
    ),
    "one bias under two kinds": (
        "gpt-neo",
        {"lora": LoraConfig(["mlp.up"], bias="lora_only")},
        BiasConfig(["mlp"]),
        r"blocks\.0\.mlp\.up\.bias trains under 'lora' already",
    ),
    "biases under freezing": (
        "bert",
        {"bias": BiasConfig(["pooler"])},
        FreezeConfig(train=["pooler"]),
        r"pooler\.bias trains under 'bias' already",
    ),
    "prefix and prompt": (
        "gpt-neo",
        {"prefix": PrefixConfig(2)},
        PromptConfig(2),
        "prompt beside the prefix 'prefix': both stand before",
    ),
    "prompt and prefix": (
        "bert",
        {"prompt": PromptConfig(2)},
        PrefixConfig(2, form="peft"),
        "prefix beside the prompt 'prompt': both stand before",
    ),
    "second freezing": (
        "gpt-neo",
        {"freezing": FreezeConfig(train=["mlp"])},
        FreezeConfig(train=["attention"]),
        "'freezing' freezes already: detach it first",
    ),
    "copy of a layer with a lora": (
        "bert",
        {"lora": LoraConfig(["classifier"])},
        IA3Config(["key"], modules_to_save=["classifier"]),
        r"head\.classifier: 'lora' changes it, 'new' trains it whole",
    ),
    "copy of what holds a layer with a lora": (
        "bert",
        {"lora": LoraConfig(["classifier"])},
        PromptConfig(2, modules_to_save=["head"]),
        "within head another method stands",
    ),
    "copy of what holds a lora of the same kind": (
        "gpt-neo",
        {"lora": LoraConfig(["mlp.up"])},
        LoraConfig(["query"], modules_to_save=["mlp"]),
        r"within blocks\.0\.mlp another method stands",
    ),
    "lora on a copied layer": (
        "bert",
        {"ia3": IA3Config(["key"], modules_to_save=["classifier"])},
        LoraConfig(["classifier", "query"]),
        r"head\.classifier: 'new' changes it, 'ia3' trains it whole",
    ),
    "lora within a copy": (
        "bert",
        {"bottleneck": BottleneckConfig(modules_to_save=["head"])},
        LoraConfig(["classifier", "query"]),
        r"head\.classifier: 'new' changes it, 'bottleneck' trains it whole",
    ),
    "a bias of a copy": (
        "bert",
        {"prefix": PrefixConfig(2, modules_to_save=["classifier"])},
        BiasConfig(),
        r"head\.classifier\.bias: 'new' changes it, 'prefix' trains it whole",
    ),
    "a copy of a copy": (
        "bert",
        {"prefix": PrefixConfig(2, modules_to_save=["classifier"])},
        LoraConfig(["query"], modules_to_save=["classifier"]),
        r"head\.classifier: .* trains it whole",
    ),
    "a target that is copied": (
        "bert",
        {},
        LoraConfig(["classifier", "query"], modules_to_save=["head"]),
        r"head\.classifier: 'new' changes it, 'new' trains it whole",
    ),
}


@pytest.mark.parametrize(("kind", "configs", "new", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_together_is_refused_with_its_reason(
    kind: str, configs: dict[str, Any], new: Any, reason: str
) -> None:
    model = fresh(kind)
    if configs:
        put(model, configs)
    attached, before, attributes = Picture(model), of(model, tokens()), set(vars(model))
    with pytest.raises(ValueError, match=reason):
        peft_lite.attach(model, new, "new")
    assert Picture(model) == attached
    assert set(vars(model)) == attributes
    assert torch.equal(of(model, tokens()), before)
    peft_lite.attach(model, LoraConfig(["value"]), "new")


def test_while_merged_only_unmerging_is_left(tmp_path: Path) -> None:
    model = fresh("gpt-neo")
    handle = put(model, {"lora": LORA, "ia3": IA3Config(["key"]), "bias": BiasConfig()})
    peft_lite.attach(model, LoraConfig(["value"], r=2), "other")
    peft_lite.attach(model, LoraConfig(["query"]), "b").save(tmp_path / "b", name="b")
    handle.switch("lora")
    unmerged = Picture(model)
    for part in ("ia3", None):
        if part is None:
            handle.merge()
        else:
            handle.merge(part)
        merged, y = Picture(model), of(model, tokens())
        refusals = {
            "attach": lambda: peft_lite.attach(model, PrefixConfig(2), "new"),
            "load": lambda: peft_lite.load(model, tmp_path / "b", "new"),
            "switch": lambda: handle.switch("other"),
            "enabled": lambda: handle.enabled(False).__enter__(),
            "rows": lambda: handle.rows(["other"]).__enter__(),
            "combine": lambda: handle.combine("new", {"lora": 1.0, "other": 1.0}),
            "merge": handle.merge,
            **{f"save {n}": lambda n=n: handle.save(tmp_path / "c", n) for n in handle.methods},
        }
        for name, call in refusals.items():
            with pytest.raises(ValueError, match=r"merged") as caught:
                call()
            assert "unmerge" in str(caught.value) or name == "merge"
            assert Picture(model) == merged, name
            assert torch.equal(of(model, tokens()), y)
        assert not (tmp_path / "c").exists()
        assert set(handle.methods) == {"lora", "ia3", "bias", "other", "b"}
        handle.unmerge()
        assert Picture(model) == unmerged


def test_one_that_rests_is_not_merged() -> None:
    model = fresh("gpt-neo")
    handle = put(model, {"a": LORA, "b": LoraConfig(["query"])})
    attached = Picture(model)
    with pytest.raises(ValueError, match="'a' is not active: switch to it"):
        handle.merge("a")
    assert Picture(model) == attached


# --- tied weights -------------------------------------------------------------------------------

TIED: dict[str, tuple[str, Any, str, str]] = {
    "lora of the head": ("gpt-neo", LoraConfig(["head", "query"], r=3), "head", "embeddings.token"),
    "lora of the table": ("gpt-neo", LoraConfig(["wte"], r=3), "embeddings.token", "head"),
    "dora of the head": ("gpt-neo", DoraConfig(["head"], r=3), "head", "embeddings.token"),
    "dora of the table": ("gpt-neo", DoraConfig(["wte"], r=3), "embeddings.token", "head"),
    "ia3 of the head": ("gpt-neo", IA3Config(["head", "key"]), "head", "embeddings.token"),
    "lora in transformers": (
        "transformers gpt-neo",
        LoraConfig(["lm_head"], r=3),
        "lm_head",
        "transformer.wte",
    ),
}


@pytest.mark.parametrize(("kind", "config", "here", "there"), TIED.values(), ids=TIED)
def test_a_tied_weight_is_merged_into_only_when_it_is_untied(
    kind: str, config: Any, here: str, there: str
) -> None:
    model = fresh(kind)
    p = model.get_parameter(f"{there}.weight")
    assert model.get_parameter(f"{here}.weight") is p
    original = p.detach().clone()
    handle = put(model, {"it": config})
    attached, tuned = Picture(model), of(model, tokens())
    for call in (handle.merge, handle.fold):
        with pytest.raises(ValueError, match=f"{here}.weight: it is tied to {there}.weight"):
            call()
        assert Picture(model) == attached
    for _ in range(2):
        handle.merge(untie=True)
        merged = model.get_submodule(here).base.weight
        assert merged is not p
        assert not torch.equal(merged, original)
        assert model.get_parameter(f"{there}.weight") is p
        assert torch.equal(p, original)
        torch.testing.assert_close(of(model, tokens()), tuned, rtol=0, atol=2e-4)
        handle.unmerge()
        assert model.get_submodule(here).base.weight is p
        assert Picture(model) == attached
    handle.fold(untie=True)
    assert model.get_parameter(f"{here}.weight") is not p
    assert model.get_parameter(f"{there}.weight") is p
    assert torch.equal(p, original)
    torch.testing.assert_close(of(model, tokens()), tuned, rtol=0, atol=2e-4)


def test_detaching_a_merged_and_untied_one_ties_again() -> None:
    model = fresh("gpt-neo")
    before = Picture(model)
    handle = put(model, {"lora": LoraConfig(["head"], r=3), "ia3": IA3Config(["head"])})
    handle.merge(untie=True)
    handle.detach()
    assert Picture(model) == before
    assert model.head.weight is model.embeddings.token.weight


def test_lora_and_ia3_on_a_tied_head_merge_as_they_compute() -> None:
    model = fresh("gpt-neo").double()
    table = model.embeddings.token.weight.detach().clone()
    handle = put(model, {"lora": LoraConfig(["head"], r=3), "ia3": IA3Config(["head"])})
    attached, tuned = Picture(model), of(model, tokens())
    handle.merge(untie=True)
    torch.testing.assert_close(of(model, tokens()), tuned, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.embeddings.token.weight, table)
    handle.unmerge()
    assert Picture(model) == attached


def test_both_ends_of_a_tie_merge_each_into_a_weight_of_its_own() -> None:
    model = fresh("gpt-neo").double()
    handle = put(model, {"lora": LoraConfig(["head", "wte"], r=3)})
    attached, tuned = Picture(model), of(model, tokens())
    handle.merge(untie=True)
    torch.testing.assert_close(of(model, tokens()), tuned, rtol=1e-12, atol=1e-12)
    handle.unmerge()
    assert Picture(model) == attached


@pytest.mark.parametrize("flag", [True, False])
def test_an_untied_and_folded_weight_keeps_the_flag_of_the_one_it_was(flag: bool) -> None:
    model = fresh("gpt-neo").requires_grad_(flag)
    put(model, {"lora": LoraConfig(["head"], r=3)}).fold(untie=True)
    assert all(p.requires_grad is flag for p in model.parameters())


def test_an_untied_and_folded_model_is_saved_as_one_that_is_not_tied(tmp_path: Path) -> None:
    for kind, classes, head in (
        ("gpt-neo", transformers.GPTNeoForCausalLM, "head"),
        ("bert masked", transformers.BertForMaskedLM, "decoder"),
    ):
        model, folder = fresh(kind), tmp_path / kind
        put(model, {"lora": LoraConfig([head], r=3)}).fold(untie=True)
        expected = of(model, tokens())
        minigpt.save(model, folder)
        assert same(minigpt.load(folder).state_dict(), model.state_dict())
        theirs = classes.from_pretrained(folder).eval()
        torch.testing.assert_close(of(theirs, tokens()), expected, rtol=0, atol=1e-4)
