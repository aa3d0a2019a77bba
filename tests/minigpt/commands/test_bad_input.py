"""What a user can get wrong: each is a ValueError that says what, and the model is as it was."""

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

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
from tests.peft_lite.peft_methods import fresh, of, shake, trained
from tests.peft_lite.peft_models import Picture, Plain, tokens

WRONG_KINDS: dict[str, list[tuple[type, dict[str, Any], str]]] = {
    "lora": [
        (kind, {"target_modules": ["query"], **settings}, reason)
        for kind in (LoraConfig, DoraConfig)
        for settings, reason in [
            ({"target_modules": 5}, "target_modules is 5, must be"),
            ({"target_modules": None}, "target_modules is None, must be"),
            ({"target_modules": ["query", 5]}, r"target_modules is \['query', 5\], must be"),
            ({"r": 0}, "r is 0, must be a whole number of at least 1"),
            ({"r": -3}, "r is -3"),
            ({"r": "8"}, "r is '?8"),
            ({"r": 2.0}, r"r is 2\.0"),
            ({"r": True}, "r is True"),
            ({"r": None}, "r is None"),
            ({"lora_alpha": 0}, "lora_alpha is 0, must be a positive number"),
            ({"lora_alpha": "16"}, "lora_alpha is '?16"),
            ({"lora_alpha": True}, "lora_alpha is True"),
            ({"lora_alpha": math.nan}, "lora_alpha is nan"),
            ({"lora_dropout": 1}, r"lora_dropout is 1, must lie in \[0, 1\)"),
            ({"lora_dropout": "0.1"}, r"lora_dropout is '?0\.1"),
            ({"lora_dropout": False}, "lora_dropout is False"),
            ({"use_rslora": "no"}, "use_rslora is 'no', must be true or false"),
            ({"use_rslora": 1}, "use_rslora is 1"),
            ({"rank_pattern": ["query"]}, r"rank_pattern is \['query'\], must be a dictionary"),
            ({"rank_pattern": {"query": "4"}}, "r is '?4"),
            ({"rank_pattern": {4: 4}}, r"rank_pattern is \{4: 4\}"),
            ({"alpha_pattern": None}, "alpha_pattern is None"),
            ({"alpha_pattern": {"query": 0}}, "lora_alpha is 0"),
            ({"layers_to_transform": "1"}, "layers_to_transform is '1', must be"),
            ({"layers_to_transform": 1.0}, r"layers_to_transform is 1\.0"),
            ({"layers_to_transform": True}, "layers_to_transform is True"),
            ({"layers_to_transform": [1, None]}, r"layers_to_transform is \[1, None\]"),
            ({"layers_to_transform": []}, r"layers_to_transform is \[\]"),
            ({"bias": True}, "bias is True, must be 'none', 'all' or 'lora_only'"),
            ({"bias": "lora-only"}, "bias is 'lora-only'"),
            ({"modules_to_save": "head"}, "modules_to_save is 'head', must be a list of names"),
            ({"modules_to_save": 5}, "modules_to_save is 5"),
            ({"modules_to_save": ["head", 5]}, r"modules_to_save is \['head', 5\]"),
        ]
    ],
    "dora": [
        (DoraConfig, {"target_modules": ["query"], "detach_norm": "no"}, "detach_norm is 'no'"),
    ],
    "bottleneck": [
        (BottleneckConfig, settings, reason)
        for settings, reason in [
            ({"placement": "pfeifer"}, r"'pfeifer', must be one of houlsby.*mean 'pfeiffer'"),
            ({"placement": None}, "placement is None, must be one of"),
            ({"placement": ["houlsby"]}, r"placement is \['houlsby'\]"),
            ({"r": 0}, "r is 0, must be"),
            ({"r": "64"}, "r is '?64"),
            ({"r": True}, "r is True"),
            ({"non_linearity": "rele"}, r"non_linearity is 'rele'.*did you mean 'relu'"),
            ({"non_linearity": torch.relu}, "non_linearity is "),
            ({"target_modules": 5}, "target_modules is 5"),
            ({"modules_to_save": "head"}, "modules_to_save is 'head'"),
        ]
    ],
    "prefix": [
        (PrefixConfig, settings, reason)
        for settings, reason in [
            ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0, must be"),
            ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
            ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
            ({"num_virtual_tokens": "20"}, "num_virtual_tokens is '?20"),
            ({"encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
            ({"encoder_hidden_size": 2.5}, r"encoder_hidden_size is 2\.5"),
            ({"prefix_projection": "yes"}, "prefix_projection is 'yes', must be"),
            ({"form": "fix"}, r"form is 'fix', must be 'fixed' or 'peft' \(did you mean 'fixed'"),
            ({"form": None}, "form is None"),
            ({"modules_to_save": 5}, "modules_to_save is 5"),
        ]
    ],
    "prompt": [
        (PromptConfig, settings, reason)
        for settings, reason in [
            ({"num_virtual_tokens": -1}, "num_virtual_tokens is -1, must be"),
            ({"num_virtual_tokens": None}, "num_virtual_tokens is None"),
            ({"num_virtual_tokens": True}, "num_virtual_tokens is True"),
            ({"num_virtual_tokens": 2.0}, r"num_virtual_tokens is 2\.0"),
            ({"prompt_tuning_init": "RANDON"}, r"'RANDON', must be one of .*mean 'RANDOM'"),
            ({"prompt_tuning_init": 5}, "prompt_tuning_init is 5"),
            ({"modules_to_save": {"head": 1}}, r"modules_to_save is \{'head': 1\}"),
        ]
    ],
    "bias": [
        (BiasConfig, {"target_modules": 5}, "target_modules is 5, must be"),
        (BiasConfig, {"target_modules": [None]}, r"target_modules is \[None\]"),
        (BiasConfig, {"modules_to_save": "head"}, "modules_to_save is 'head'"),
    ],
    "ia3": [
        (IA3Config, {"target_modules": None}, "target_modules is None, must be"),
        (IA3Config, {"target_modules": ["key"], "feedforward_modules": None}, "feedforward_mod"),
        (IA3Config, {"target_modules": ["key"], "feedforward_modules": [1]}, "feedforward_mod"),
        (IA3Config, {"target_modules": ["key"], "modules_to_save": "head"}, "modules_to_save is"),
    ],
    "freezing": [
        (FreezeConfig, {}, "either train= or freeze="),
        (FreezeConfig, {"train": ["mlp"], "freeze": ["head"]}, "either train= or freeze="),
        (FreezeConfig, {"train": 5}, "train is 5, must be"),
        (FreezeConfig, {"freeze": ["mlp", None]}, r"freeze is \['mlp', None\]"),
        (FreezeConfig, {"train": ["mlp"], "layers_to_transform": "1"}, "layers_to_transform is"),
        (FreezeConfig, {"train": ["mlp"], "layers_to_transform": []}, "layers_to_transform is"),
    ],
}
KINDS = [case for cases in WRONG_KINDS.values() for case in cases]


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    KINDS,
    ids=[f"{k.__name__} {' '.join(f'{n}={v!r}' for n, v in s.items())}" for k, s, _ in KINDS],
)
def test_a_value_of_the_wrong_kind_is_named_with_what_is_allowed(
    kind: type, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        kind(**settings)


NO_MATCH: dict[str, tuple[str, Any, str]] = {
    "lora target": ("gpt-neo", LoraConfig(["quary"]), r"target 'quary' .* mean 'query'"),
    "checkpoint name": ("gpt-neo", LoraConfig(["q_prj"]), r"'q_prj' .*mean 'q_proj'"),
    "one of two": ("bert", LoraConfig(["query", "valeu"]), r"'valeu' .*'value'"),
    "dora target": ("bert", DoraConfig(["mlp.uq"]), r"target 'mlp\.uq' matches no"),
    "expression": ("gpt-neo", LoraConfig(r".*\.quer"), r"target '\.\*\\\\\.quer' matches no"),
    "broken expression": ("gpt-neo", LoraConfig(r"(query"), "is not a regular expression"),
    "no target": ("gpt-neo", LoraConfig([]), "target_modules is empty"),
    "container": ("gpt-neo", LoraConfig(["attention"]), "target 'attention' matches no Linear"),
    "rank pattern": (
        "gpt-neo",
        LoraConfig(["query"], rank_pattern={"key": 3}),
        "rank_pattern 'key' matches no targeted layer",
    ),
    "alpha pattern": (
        "gpt-neo",
        LoraConfig(["query"], alpha_pattern={"qery": 3}),
        r"alpha_pattern 'qery' .*did you mean 'query'",
    ),
    "block": ("gpt-neo", LoraConfig(["query"], layers_to_transform=[0, 2]), r"2 is not a block of"),
    "negative block": (
        "bert",
        LoraConfig(["query"], layers_to_transform=-1),
        "-1 is not a block of",
    ),
    "block of freezing": (
        "gpt-neo",
        FreezeConfig(train=["mlp"], layers_to_transform=[5]),
        r"5 is not a block of \[0, 1\]",
    ),
    "bottleneck target": ("gpt-neo", BottleneckConfig(target_modules=["mpl"]), "'mpl' .*'mlp'"),
    "bottleneck on a norm": (
        "gpt-neo",
        BottleneckConfig(target_modules=["final_norm"]),
        "'final_norm' holds no linear layer",
    ),
    "parallel adapter that widens": (
        "gpt-neo",
        BottleneckConfig("parallel", target_modules=["mlp.up"]),
        r"mlp\.up: a parallel adapter needs as many inputs as outputs",
    ),
    "bottleneck on another model": (
        "transformers bert",
        BottleneckConfig(),
        r"target 'mlp\.down' matches no",
    ),
    "prefix on another model": ("transformers gpt-neo", PrefixConfig(), "no slot for a prefix"),
    "prompt on another model": ("plain", PromptConfig(), "Plain has no slot for a prompt"),
    "bias": ("gpt-neo", BiasConfig(["mpl"]), "pattern 'mpl' matches no parameter .*'mlp'"),
    "layer without bias": ("gpt-neo", BiasConfig(["query"]), "no bias that .'query'. names"),
    "ia3 target": ("bert", IA3Config(["kay"]), "target 'kay' .*'key'"),
    "ia3 on a table": ("bert", IA3Config(["embeddings.token"]), "matches no Linear layer"),
    "ia3 feed-forward": (
        "bert",
        IA3Config(["key"], ["mlp.down"]),
        r"feedforward_modules: blocks\.0\.mlp\.down is none of the target_modules",
    ),
    "freezing": ("gpt-neo", FreezeConfig(freeze=["embedings"]), "'embedings' .*'embeddings'"),
    "freezing all": ("gpt-neo", FreezeConfig(freeze="."), "leaves nothing to train"),
    **{
        f"modules of {type(config).__name__}": ("bert", config, "'clasifier' .*'classifier'")
        for config in [
            LoraConfig(["query"], modules_to_save=["clasifier"]),
            DoraConfig(["query"], modules_to_save=["clasifier"]),
            IA3Config(["key"], modules_to_save=["clasifier"]),
            BottleneckConfig(modules_to_save=["clasifier"]),
            PrefixConfig(3, modules_to_save=["clasifier"]),
            PromptConfig(3, modules_to_save=["clasifier"]),
            BiasConfig(modules_to_save=["clasifier"]),
        ]
    },
    "module without weights": (
        "gpt-neo",
        LoraConfig(["query"], modules_to_save=["prefix"]),
        r"prefix has no parameter to train",
    ),
    "no config": (
        "gpt-neo",
        "lora",
        "str is not a config, must be one of FreezeConfig, BiasConfig, LoraConfig, ",
    ),
    "a class": ("gpt-neo", LoraConfig, "type is not a config, must be one of"),
}


@pytest.mark.parametrize(("kind", "config", "reason"), NO_MATCH.values(), ids=NO_MATCH)
@pytest.mark.parametrize("occupied", [False, True])
def test_what_does_not_fit_the_model_is_named_and_changes_nothing(
    kind: str, config: Any, reason: str, occupied: bool
) -> None:
    model = fresh(kind)
    next(iter(model.parameters())).requires_grad_(False)
    if occupied:
        peft_lite.attach(model, LoraConfig("all-linear", r=2), "first")
        shake(trained(model).values())
    before, attributes = Picture(model), set(vars(model))
    with pytest.raises(ValueError, match=reason):
        peft_lite.attach(model, config, "second")
    assert Picture(model) == before
    assert set(vars(model)) == attributes


@pytest.mark.parametrize("config", [LoraConfig, DoraConfig])
def test_a_rank_above_what_a_layer_can_use_is_warned_of(
    config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = Plain()
    with caplog.at_level(logging.WARNING, logger="peft_lite"):
        peft_lite.attach(model, config(["inner.0"], r=7)).detach()
        assert not caplog.records
        handle = peft_lite.attach(model, config(["inner.0", "out"], r=4))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("out: rank 4 is above what its Linear(in_features=5")
    assert len(handle.methods["default"].wrappers) == 2


UNKNOWN: dict[str, Callable[[peft_lite.Handle, Path], Any]] = {
    "switch": lambda handle, folder: handle.switch("frist"),
    "detach": lambda handle, folder: handle.detach("frist"),
    "save": lambda handle, folder: handle.save(folder / "new", name="frist"),
    "state": lambda handle, folder: handle.state("frist"),
    "rows": lambda handle, folder: handle.rows(["frist", None]).__enter__(),
    "combine": lambda handle, folder: handle.combine("new", {"frist": 1.0}),
    "merge": lambda handle, folder: handle.merge("frist"),
}


@pytest.mark.parametrize("call", UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    call: Callable[[peft_lite.Handle, Path], Any], tmp_path: Path
) -> None:
    model = fresh("gpt-neo")
    peft_lite.attach(model, LoraConfig(["query"]), "first")
    handle = peft_lite.attach(model, LoraConfig(["value"]), "second")
    before = Picture(model)
    with pytest.raises(
        ValueError,
        match=r"is called 'frist' \(did you mean 'first'\?\), there are 'first', 'second'",
    ):
        call(handle, tmp_path)
    assert Picture(model) == before
    assert handle.active == ["second"]
    assert not list(tmp_path.iterdir())


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    model = fresh("gpt-neo")
    handle = peft_lite.attach(model, LoraConfig(["query"]), "first")
    handle.save(tmp_path)
    before = Picture(model)
    for call in (
        lambda: peft_lite.attach(model, IA3Config(["key"]), "first"),
        lambda: peft_lite.load(model, tmp_path, "first"),
        lambda: handle.combine("first", {"first": 2.0}),
    ):
        with pytest.raises(ValueError, match=r"the name 'first' is taken, .*detach it first"):
            call()
        assert Picture(model) == before
    assert handle.active == ["first"]


def test_a_handle_without_methods_says_so(tmp_path: Path) -> None:
    model = fresh("gpt-neo")
    handle = peft_lite.attach(model, LoraConfig(["query"]))
    handle.detach()
    before = Picture(model)
    for call, reason in (
        (handle.detach, "detached already"),
        (handle.fold, "detached already"),
        (handle.merge, "nothing to merge"),
        (handle.unmerge, "nothing to unmerge"),
        (handle.state, "no method is called 'default', there are none"),
        (lambda: handle.save(tmp_path / "new"), "there are none"),
        (lambda: handle.switch("default"), "there are none"),
    ):
        with pytest.raises(ValueError, match=reason):
            call()
    assert Picture(model) == before
    assert not list(tmp_path.iterdir())


# --- files --------------------------------------------------------------------------------------

SAVED: dict[str, Any] = {
    "LORA": LoraConfig(["query", "wte", "lm_head"], r=3),
    "LORA dora": DoraConfig(["query", "wte"], r=3),
    "IA3": IA3Config(["key", "value", "mlp.down"], ["mlp.down"]),
    "PREFIX": PrefixConfig(3),
    "PREFIX_TUNING": PrefixConfig(3, form="peft"),
    "PROMPT_TUNING": PromptConfig(3),
    "BIAS": BiasConfig(),
    "BOTTLENECK": BottleneckConfig("houlsby", 4),
    "FREEZE": FreezeConfig(freeze=["mlp"]),
}
SIZES = {
    "vocab_size": 61,
    "max_position_embeddings": 32,
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 3,
    "intermediate_size": 40,
}
OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "vocabulary": ({"vocab_size": 59}, ("LORA", "FREEZE")),
    "width": ({"hidden_size": 36}, tuple(SAVED)),
    "a layer more": ({"num_layers": 3}, tuple(n for n in SAVED if n != "PROMPT_TUNING")),
    "a layer fewer": ({"num_layers": 1}, tuple(n for n in SAVED if n != "PROMPT_TUNING")),
    "heads": ({"num_heads": 4}, ("PREFIX", "PREFIX_TUNING", "PROMPT_TUNING")),
}


def gpt_neo(**settings: Any) -> minigpt.GPTNeo:
    torch.manual_seed(0)
    return minigpt.GPTNeo(minigpt.GPTNeoConfig(**{**SIZES, **settings})).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One saved method of each kind, of the same model."""
    root = tmp_path_factory.mktemp("saved")
    for name, config in SAVED.items():
        model = gpt_neo()
        handle = peft_lite.attach(model, config)
        shake(trained(model).values())
        handle.save(root / name)
    return {name: root / name for name in SAVED}


def refuse(model: Any, folder: Path, reason: str) -> None:
    before, attributes = Picture(model), set(vars(model))
    y = of(model, tokens() % 59)
    with pytest.raises(ValueError, match=reason):
        peft_lite.load(model, folder)
    assert Picture(model) == before
    assert set(vars(model)) == attributes
    assert torch.equal(of(model, tokens() % 59), y)


@pytest.mark.parametrize(
    ("other", "name"), [(o, name) for o, (_, names) in OTHERS.items() for name in names]
)
def test_an_adapter_of_another_base_is_refused(
    other: str, name: str, folders: dict[str, Path]
) -> None:
    peft_lite.load(gpt_neo(), folders[name])
    settings, _ = OTHERS[other]
    refuse(gpt_neo(**settings), folders[name], r"this model|missing|unexpected")


# prefixes and prompts of the same shape fit
@pytest.mark.parametrize("name", [n for n in SAVED if not n.startswith("PR")])
def test_an_adapter_of_a_decoder_is_refused_by_an_encoder(
    name: str, folders: dict[str, Path]
) -> None:
    model = fresh("bert")
    before = Picture(model)
    with pytest.raises(ValueError, match=r"missing|unexpected|matches no|want"):
        peft_lite.load(model, folders[name])
    assert Picture(model) == before


@pytest.mark.parametrize("name", SAVED)
def test_a_field_without_code_is_refused_in_every_kind_of_file(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    peft_lite.load(gpt_neo(), tmp_path)
    for field, value in [("from_the_future", 0.5), ("modules_to_sav", ["head"])]:
        path.write_text(json.dumps({**raw, field: value}))
        refuse(gpt_neo(), tmp_path, rf"adapter_config\.json: {field} = .* is not supported")
    path.write_text(json.dumps({**raw, "modules_to_save": ["final_norm"]}))
    refuse(gpt_neo(), tmp_path, r"final_norm|modules_to_save")
    path.write_text(json.dumps({**raw, "peft_type": "LORRA"}))
    refuse(
        gpt_neo(),
        tmp_path,
        "peft_type 'LORRA' is not supported, must be one of FREEZE, BIAS, LORA, ",
    )


WRONG_IN_FILES: list[tuple[str, dict[str, Any]]] = [
    ("LORA", {"layers_to_transform": [7]}),
    ("LORA", {"layers_to_transform": "0"}),
    ("LORA", {"r": "3"}),
    ("LORA", {"r": None, "rank_pattern": 3}),
    ("LORA", {"bias": 3}),
    ("LORA", {"use_dora": True}),
    ("LORA", {"bias": "all"}),
    ("LORA dora", {"use_dora": False}),
    ("LORA dora", {"detach_norm": 3}),
    ("IA3", {"feedforward_modules": 3}),
    ("IA3", {"feedforward_modules": ["nowhere"]}),
    ("IA3", {"target_modules": ["key"], "feedforward_modules": []}),
    ("PREFIX", {"num_virtual_tokens": 4}),
    ("PREFIX", {"num_virtual_tokens": "3"}),
    ("PREFIX", {"num_attention_heads": 6}),
    ("PREFIX_TUNING", {"num_layers": 4}),
    ("PREFIX_TUNING", {"token_dim": 48}),
    ("PREFIX_TUNING", {"num_transformer_submodules": 2}),
    ("PROMPT_TUNING", {"num_virtual_tokens": 5}),
    ("PROMPT_TUNING", {"token_dim": 30}),
    ("PROMPT_TUNING", {"num_virtual_tokens": [3]}),
    ("BIAS", {"target_modules": ["mlp"]}),
    ("BIAS", {"target_modules": 3}),
    ("BOTTLENECK", {"placement": "nowhere"}),
    ("BOTTLENECK", {"placement": "pfeiffer"}),
    ("BOTTLENECK", {"placement": {"houlsby": 1}}),
    ("BOTTLENECK", {"r": 5}),
    ("BOTTLENECK", {"non_linearity": "swish"}),
    ("FREEZE", {"train": ["mlp"]}),
    ("FREEZE", {"freeze": 3}),
    ("FREEZE", {"layers_to_transform": [9]}),
]


@pytest.mark.parametrize(
    ("name", "fields"), WRONG_IN_FILES, ids=[f"{n} {f}" for n, f in WRONG_IN_FILES]
)
def test_a_file_that_contradicts_its_tensors_or_makes_no_sense_is_refused(
    name: str, fields: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    for file in folders[name].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    refuse(gpt_neo(), tmp_path, r".+")
