"""What an adapter's files say and hold: exact layers, all that changed, PEFT's ways."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
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
    storage,
    tensor_files,
)
from tests.peft_lite.peft_methods import fresh, of, shake, trained
from tests.peft_lite.peft_models import Picture, Plain, live, output, pair, perturb, tokens

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.xl = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.xl(self.l(x).tanh())
        return y


class Nested(nn.Module):
    """Names that are the ends of others: `l`, `block.l`, `block.xl`, `deep.block.l`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.l, self.deep = Part(), nn.Linear(6, 6), nn.ModuleDict({"block": Part()})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l(self.deep["block"](self.block(x)).tanh())
        return y


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(2))
LAYERS = ("l", "block.l", "block.xl", "deep.block.l", "deep.block.xl")


def chance(rng: random.Random) -> Any:
    """A random config of a random method."""
    target: Any = rng.sample(LAYERS, rng.randint(1, 3))
    if rng.random() < 0.5:
        target = "|".join(name.replace(".", r"\.") for name in target)
    kind = rng.randrange(6)
    if kind == 0:
        scaled = target if rng.random() < 0.5 or isinstance(target, str) else target[:1]
        return IA3Config(target, scaled if rng.random() < 0.7 else ())
    if kind == 1:
        return BottleneckConfig(rng.choice(["pfeiffer", "parallel"]), 3, target_modules=target)
    if kind == 2:
        return FreezeConfig(train=rng.sample(["l", "block", "deep"], 2))
    if kind == 3:
        return BiasConfig(rng.choice([None, ["l"], "^l"]), rng.choice([None, ["block.xl"]]))
    patterns = [
        {key: rng.randint(1, 5) for key in rng.sample(["^l", ".*", "block.l", "l", r".*xl"], 2)}
        for _ in range(2)
    ]
    return rng.choice([LoraConfig, DoraConfig])(
        rng.choice([target, "all-linear"]),
        r=rng.randint(1, 4),
        lora_alpha=rng.choice([0.5, 3, 64]),
        use_rslora=rng.random() < 0.3,
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        bias=rng.choice(["none", "all", "lora_only"]),
    )


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_any_config_reads_back_as_the_same_model_here_and_in_peft(tmp_path: Path) -> None:
    rng, met, alien = random.Random(5), set(), 0
    for i in range(150):
        model = Nested()
        config = chance(rng)
        try:
            handle = peft_lite.attach(model, config)
        except ValueError:  # a pattern that matches none of the targets
            continue
        shake(trained(model).values())
        folder = tmp_path / str(i)
        handle.save(folder)
        other = Nested()
        loaded = peft_lite.load(other, folder)
        met.add(type(config))
        assert torch.equal(other(X), model(X)), config
        assert loaded.state().keys() == handle.state().keys()
        if isinstance(config, LoraConfig | IA3Config):
            alien += 1
            opened = peft.PeftModel.from_pretrained(Nested(), folder)
            torch.testing.assert_close(opened(X), model(X), rtol=0, atol=1e-4, msg=repr(config))
    assert len(met) == 6
    assert alien > 40


def test_a_name_of_special_characters_is_written_as_itself(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.ModuleDict({"a+b": nn.Linear(3, 2), "ab": nn.Linear(3, 2)}))

    config = LoraConfig(["a+b", "ab"], r=2, alpha_pattern={r"a\+b": 64}, rank_pattern={"ab": 1})
    handle = peft_lite.attach(model(), config)
    handle.save(tmp_path)
    loaded = peft_lite.load(model(), tmp_path).methods["default"].wrappers
    assert {n: (w.alpha, len(w.lora_a)) for n, w in loaded.items()} == {  # type: ignore[arg-type]
        "0.a+b": (64, 2),
        "0.ab": (8, 1),
    }


# all that trains or was changed


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(self.a(x))
        return y


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(["a"], r=2, modules_to_save=["bn"]),
        LoraConfig(["a"], r=2),
        IA3Config(["a"]),
        BiasConfig(),
        FreezeConfig(train=["a"]),
        BottleneckConfig(r=2, target_modules=["a"]),
    ],
)
def test_statistics_that_training_changed_are_saved(config: Any, tmp_path: Path) -> None:
    model = Normed().eval()
    handle = peft_lite.attach(model, config)
    untouched = handle.state().keys()
    assert "base_model.model.bn.running_mean" not in untouched or config.modules_to_save
    model.train()
    for _ in range(3):
        model(3 + X)
    model.eval()
    handle.save(tmp_path / "a")
    other = Normed().eval()
    again = peft_lite.load(other, tmp_path / "a")
    assert torch.equal(other(X), model(X))
    assert not torch.equal(other(X), Normed().eval()(X))
    again.save(tmp_path / "b")
    assert load_file(tmp_path / "b/adapter_model.safetensors").keys() == handle.state().keys()
    if isinstance(config, LoraConfig | IA3Config):
        opened = peft.PeftModel.from_pretrained(Normed().eval(), tmp_path / "a").eval()
        torch.testing.assert_close(opened(X), model(X), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "gpt-neo", "bert masked"])
@pytest.mark.parametrize("name", ["head", "mlp.up", "attention_norm", "blocks.1.mlp", "mlp"])
@pytest.mark.parametrize("whole", ["lora", "bias", "ia3"])
def test_containers_are_saved_and_loaded_back(
    kind: str, name: str, whole: str, tmp_path: Path
) -> None:
    saved = [name]
    configs: dict[str, Any] = {
        "lora": LoraConfig(["query"], r=2, modules_to_save=saved),
        "bias": BiasConfig(["attention.output"], modules_to_save=saved),
        "ia3": IA3Config(["query"], modules_to_save=saved),
    }
    model, theirs = pair(kind, tmp_path / "base")
    handle = peft_lite.attach(model, configs[whole])
    shake(trained(model).values())
    handle.save(tmp_path / "adapter")
    other = minigpt.load(tmp_path / "base", head=model.head_kind)
    peft_lite.load(other, tmp_path / "adapter")
    torch.testing.assert_close(of(other, tokens()), of(model, tokens()), rtol=0, atol=1e-6)
    assert not torch.equal(of(other, tokens()), output(theirs, tokens()))
    # PEFT calls the bias of the masked-language head by another name
    if whole != "bias" and (kind, name) != ("bert masked", "head"):
        opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
        torch.testing.assert_close(output(opened, tokens()), of(model, tokens()), rtol=0, atol=1e-4)


def test_weights_that_the_checkpoint_lacks_are_saved_with_the_adapter(tmp_path: Path) -> None:
    pair("bert masked", tmp_path / "base")
    torch.manual_seed(1)
    model = minigpt.load(tmp_path / "base", "classification", 3)
    handle = peft_lite.attach(model, LoraConfig(["query"], r=2, modules_to_save=["classifier"]))
    perturb(handle)
    handle.save(tmp_path / "adapter")
    torch.manual_seed(2)
    other = minigpt.load(tmp_path / "base", "classification", 3)
    assert not torch.equal(other.pooler.weight, model.pooler.weight)
    again = peft_lite.load(other, tmp_path / "adapter")
    assert torch.equal(of(other, tokens()), of(model, tokens()))
    assert again.state().keys() == handle.state().keys()
    theirs = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3
    )
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    torch.testing.assert_close(output(opened, tokens()), of(model, tokens()), rtol=0, atol=1e-5)


def test_a_file_without_the_fresh_weights_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair("bert masked", tmp_path / "base")
    model = minigpt.load(tmp_path / "base", "classification", 3)
    peft_lite.attach(model, LoraConfig(["query"], r=2)).save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "lora" in n}, file)
    caplog.clear()
    peft_lite.load(minigpt.load(tmp_path / "base", "classification", 3), tmp_path / "adapter")
    assert "freshly initialised" in caplog.messages[-1]
    assert "pooler" in caplog.messages[-1]


def test_the_state_is_a_copy() -> None:
    for config in (LoraConfig(["out"], r=2), FreezeConfig(train=["out"])):
        model = Plain()
        handle = peft_lite.attach(model, config)
        y = model(torch.ones(2, 7))
        for t in handle.state().values():
            t.fill_(9)
        assert torch.equal(model(torch.ones(2, 7)), y)


# PEFT's ways


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", [["lm_head"], ["wte"], ["lm_head", "wte"], ["wte", "q_proj"]])
def test_copies_of_the_models_weights_are_compared_with_them(
    targets: list[str], tmp_path: Path
) -> None:
    ours, theirs = pair("gpt-neo", tmp_path / "base")
    config = peft.LoraConfig(
        r=3, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    written = peft.get_peft_model(theirs, config).eval()
    written.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    file = tmp_path / "adapter/adapter_model.safetensors"
    assert any(".base_layer.weight" in name for name in load_file(file))
    peft_lite.load(ours, tmp_path / "adapter")
    torch.testing.assert_close(of(ours, tokens()), output(written, tokens()), rtol=0, atol=1e-4)
    other = fresh("gpt-neo")
    other.embeddings.token.weight.data[3, 5] += 1
    before = Picture(other)
    with pytest.raises(ValueError, match=r"weight is a weight of the model, and this"):
        peft_lite.load(other, tmp_path / "adapter")
    assert Picture(other) == before


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda n: n.replace("base_model.model.", "base_model.model.module."),
        lambda n: f"module.{n}",
        lambda n: f"_orig_mod.{n}",
    ],
)
def test_names_of_compiled_and_parallel_training_are_read(
    rename: Callable[[str], str], tmp_path: Path
) -> None:
    model = Plain()
    handle = peft_lite.attach(model, LoraConfig(["out"], r=2, bias="all"))
    perturb(handle)
    handle.save(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({rename(n): t for n, t in load_file(file).items()}, file)
    loaded = peft_lite.load(Plain(), tmp_path)
    assert all(torch.equal(t, loaded.state()[n]) for n, t in handle.state().items())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_a_compiled_or_parallel_model_writes_plain_names(tmp_path: Path) -> None:
    for i, around in enumerate((torch.compile, nn.DataParallel)):
        handle = peft_lite.attach(around(fresh("gpt-neo")), LoraConfig(["query"], r=2))  # type: ignore[operator]
        perturb(handle)
        handle.save(tmp_path / str(i))
        loaded = peft_lite.load(fresh("gpt-neo"), tmp_path / str(i))
        assert all("h.0.attn" in n or "h.1.attn" in n for n in handle.state())
        assert all(torch.equal(t, loaded.state()[n]) for n, t in handle.state().items())


class TwoClassifiers(nn.Module):
    """As DistilBERT: PEFT's `classifier` is the end of both names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.pre_classifier, self.classifier = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.pre_classifier(self.q(x)).tanh())
        return y


def test_modules_to_save_are_the_ends_of_names_as_in_peft(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q"], modules_to_save=["classifier"])
    written = peft.get_peft_model(TwoClassifiers(), config)
    shake(p for p in written.parameters() if p.requires_grad)
    written.save_pretrained(tmp_path / "theirs")
    model = TwoClassifiers()
    peft_lite.load(model, tmp_path / "theirs")
    torch.testing.assert_close(model(X), written(X), rtol=0, atol=1e-6)
    for config in (
        LoraConfig(["pre_classifier"], r=2, modules_to_save=["classifier"]),
        LoraConfig(["q"], r=2, bias="all", modules_to_save=["classifier"]),
    ):
        model = TwoClassifiers()
        handle = peft_lite.attach(model, config)
        perturb(handle)
        handle.save(tmp_path / "ours")
        other = TwoClassifiers()
        peft_lite.load(other, tmp_path / "ours")
        assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("listed", [None, ["pooler"]])
def test_a_classifier_that_older_files_do_not_list_is_read(
    listed: list[str] | None, tmp_path: Path
) -> None:
    ours, theirs = pair("bert", tmp_path / "base")
    config = peft.LoraConfig(
        r=2, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=listed
    )
    written = peft.get_peft_model(theirs, config).eval()
    shake(p for p in written.parameters() if p.requires_grad)
    written.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    raw = json.loads(file.read_text())
    assert {"classifier", "score"} <= {*raw["modules_to_save"]}
    file.write_text(json.dumps(raw | {"modules_to_save": listed}))
    peft_lite.load(ours, tmp_path / "adapter")
    torch.testing.assert_close(of(ours, tokens()), output(written, tokens()), rtol=0, atol=1e-4)


def test_a_tied_bias_that_peft_writes_twice_is_read_once(tmp_path: Path) -> None:
    ours, theirs = pair("bert masked", tmp_path / "base")
    config = peft.LoraConfig(r=3, target_modules=["query"], bias="all")
    written = peft.get_peft_model(theirs, config).eval()
    shake(p for p in written.parameters() if p.requires_grad)
    written.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    twice = "base_model.model.cls.predictions.decoder.bias"
    tensors[twice] = tensors["base_model.model.cls.predictions.bias"].clone()
    save_file(tensors, file)
    for model in (ours, fresh("transformers bert masked")):
        peft_lite.load(model, tmp_path / "adapter")
        torch.testing.assert_close(
            of(model, tokens()), output(written, tokens()), rtol=0, atol=1e-4
        )
    tensors[twice] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match="differs from the tensor that it is tied to"):
        peft_lite.load(fresh("bert masked"), tmp_path / "adapter")


def test_the_auto_classes_of_peft_find_the_model(tmp_path: Path) -> None:
    for kind, auto in (
        ("gpt-neo", peft.AutoPeftModelForCausalLM),
        ("bert", peft.AutoPeftModelForSequenceClassification),
    ):
        pair(kind, tmp_path / f"{kind} base")
        model = minigpt.load(tmp_path / f"{kind} base")
        minigpt.save(model, tmp_path / kind)
        model = minigpt.load(tmp_path / kind)
        saved = ["classifier"] if kind == "bert" else None
        handle = peft_lite.attach(model, LoraConfig(["query"], r=2, modules_to_save=saved))
        perturb(handle)
        handle.save(tmp_path / f"{kind} adapter")
        opened = auto.from_pretrained(tmp_path / f"{kind} adapter").eval()
        torch.testing.assert_close(output(opened, tokens()), of(model, tokens()), rtol=0, atol=1e-5)


# bounded reading


class Long(Plain):
    """A layer of a name on which some expressions take years."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a" * 60, nn.Linear(5, 5))


def saved(folder: Path, **changes: Any) -> Path:
    peft_lite.attach(Long(), LoraConfig(["out"], r=2)).save(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def refuse(folder: Path, reason: str) -> str:
    model = Long()
    before = Picture(model)
    with pytest.raises(ValueError, match=reason) as caught:
        peft_lite.load(model, folder)
    assert Picture(model) == before
    assert str(caught.value).isprintable()
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (
            "r",
            5_000_000,
            r"adapter_model\.safetensors: .*is \[2, 5\], this model wants \[5000000, 5",
        ),
        ("r", 10**30, r"adapter_config\.json: lora cannot be built"),
        ("r", 2.0, r"adapter_config\.json: r is 2\.0, must be a whole number"),
        ("r", None, r"adapter_config\.json: r is null, must be a whole number"),
        ("lora_alpha", None, r"lora_alpha is null, must be a number"),
        ("lora_alpha", 1e39, r"lora_alpha is 1e\+39, must be a positive number"),
        ("lora_alpha", True, r"lora_alpha is true, must be a number"),
        ("rank_pattern", {"out": 10**9}, r"this model wants \[1000000000, 5\]"),
        ("rank_pattern", {"out": "2"}, r"rank_pattern is {\"out\": \"2\"}, must be an object"),
        ("modules_to_save", "out", r"modules_to_save is \"out\", must be a list or null"),
        ("use_dora", "no", r"use_dora is \"no\", must be true or false"),
        ("target_modules", r"([a-z.]+)+\d$", r"adapter_config\.json: .*takes more than 1 seconds"),
        ("alpha_pattern", {"((a|a)*)*z|out": 3, "(([a-z]+)*)*!": 3}, r"takes more than 1 seconds"),
        ("target_modules", "a{99999999999}", r"is not a regular expression"),
        ("target_modules", "[", r"is not a regular expression"),
        ("\x1b[31mfield", 3, r"\\u001b\[31mfield = 3 is not supported"),
        ("bias", "x" * 5000, r"bias is 'xxx.*\.\.\.$"),
    ],
)
def test_a_setting_out_of_bounds_is_one_line(
    field: str, value: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_lite.select.SECONDS", 1)
    refuse(saved(tmp_path, **{field: value}), reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.fill_(torch.nan), r"lora_A\.weight holds NaN or an infinite number"),
        (
            lambda t: t.double().fill_(1e300),
            r"lora_A\.weight as torch\.float32 holds NaN or an inf",
        ),
        (lambda t: t.to(torch.complex64), r"lora_A\.weight holds C64, must be one of"),
        (lambda t: t.long(), r"lora_A\.weight is torch\.int64, this model wants torch\.float32"),
        (lambda t: torch.zeros(4, 5), r"lora_A\.weight is \[4, 5\], this model wants \[2, 5\]"),
    ],
)
def test_numbers_that_no_model_can_hold_are_refused(
    change: Callable[[Tensor], Tensor], reason: str, tmp_path: Path
) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.out.lora_A.weight"
    save_file({**tensors, name: change(tensors[name])}, file)
    refuse(tmp_path, reason)


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"inner\.0\.weight is on the meta device"):
        peft_lite.load(Long().to("meta"), tmp_path)


def test_half_precision_files_are_read_and_rounded_once(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = {n: t.bfloat16() for n, t in load_file(file).items()}
    save_file(tensors, file)
    state = peft_lite.load(Long(), tmp_path).state()
    assert all(torch.equal(state[n], t.float()) for n, t in tensors.items())


def test_no_control_character_of_a_tensors_name_is_shown(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    save_file({**load_file(file), "\x1b[2J\n": torch.zeros(1)}, file)
    assert r"\u001b[2J\n" in refuse(tmp_path, "1 tensors are unexpected")


def test_a_header_too_large_is_not_read(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    file.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    refuse(tmp_path, r"its header has 1,099,511,627,776 bytes, at most")


@pytest.mark.parametrize("read", [tensor_files.read_named_tensors, tensor_files.read_outline])
def test_a_header_is_read_up_to_its_largest_size(
    read: Callable[[Path], dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(2)}, path)
    size = int.from_bytes(path.read_bytes()[:8], "little")
    monkeypatch.setattr(tensor_files, "MAX_HEADER", size)
    assert read(path)["a"].shape == (2,)
    monkeypatch.setattr(tensor_files, "MAX_HEADER", size - 1)
    with pytest.raises(ValueError, match=f"its header has {size} bytes, at most {size - 1} are"):
        read(path)


def test_tensors_that_share_the_bytes_of_a_pickle_take_twice_as_many_at_most(
    tmp_path: Path,
) -> None:
    path, shared = tmp_path / "a.bin", torch.arange(1e5)
    torch.save({"a": shared, "b": shared}, path)
    assert all(torch.equal(t, shared) for t in tensor_files.read_named_tensors(path).values())
    torch.save({"a": shared, "b": shared, "c": shared}, path)
    with pytest.raises(ValueError, match="its tensors take more than twice its bytes"):
        tensor_files.read_named_tensors(path)


def test_no_advice_to_read_a_damaged_pickle_anyway(tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    for content in (b"\x80\x02", b"\x80\x02}q\x00(", b"cos\nsystem\n.", b"l\n.", b"\x80\x02K\x01."):
        (tmp_path / "adapter_model.bin").write_bytes(content)
        assert "weights_only" not in refuse(tmp_path, r"adapter_model\.bin: truncated or damaged")


def test_nan_is_neither_saved_nor_merged(tmp_path: Path) -> None:
    model = Plain()
    handle = peft_lite.attach(model, LoraConfig(["out"], r=2))
    live(handle)["base_model.model.out.lora_B.weight"][0, 0] = torch.nan
    weight = model.out.base.weight.clone()  # type: ignore[operator, union-attr]
    for action in (handle.merge, handle.fold, lambda: handle.save(tmp_path / "a")):
        with pytest.raises(ValueError, match=r"out\.lora_B\.weight holds NaN"):
            action()
    assert handle.active == ["default"]
    assert torch.equal(model.out.base.weight, weight)  # type: ignore[arg-type, union-attr]
    assert not (tmp_path / "a").exists()


def test_real_configs_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    configs = sorted((SHARED / "adapter_configs").glob("*.json"))
    if not configs:
        pytest.skip("the folder shared/data with real configs is absent")
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    for path in configs:
        (tmp_path / "adapter_config.json").write_bytes(path.read_bytes())
        refuse(tmp_path, r".")


# both files, or none


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("clean", [True, False])
def test_a_pair_is_old_or_new_at_every_moment(
    step: int, clean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the n-th call that changes the disk, with or without what runs after an error."""

    def adapter(alpha: float) -> peft_lite.Handle:
        torch.manual_seed(int(alpha))
        handle = peft_lite.attach(Long(), LoraConfig(["out"], r=2, lora_alpha=alpha))
        perturb(handle, alpha)
        return handle

    def read() -> float:
        method = peft_lite.load(Long(), tmp_path).methods["default"]
        (layer,) = method.wrappers.values()
        alpha = float(layer.alpha)  # type: ignore[arg-type]
        assert torch.equal(layer.lora_b, live(adapter(alpha))[B])  # type: ignore[arg-type]
        return alpha

    B = "base_model.model.out.lora_B.weight"
    adapter(1).save(tmp_path)
    for name in ("adapter_model.safetensors.partial", "adapter_config.json.partial"):
        (tmp_path / name).write_text("what an earlier kill left")
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            nonlocal count
            count += 1
            if count - 1 == step or (count > step and not clean):
                raise Killed
            return real(*args, **settings)

        return call

    with monkeypatch.context() as patch:
        for where, name in ((os, "replace"), (Path, "unlink"), (storage, "save_file")):
            patch.setattr(where, name, dying(getattr(where, name)))
        for where, name in ((Path, "write_text"), (storage, "flush"), (storage, "_create")):
            patch.setattr(where, name, dying(getattr(where, name)))
        try:
            adapter(2).save(tmp_path)
            assert count <= step
        except Killed:
            pass
    assert read() in (1, 2)
    adapter(3).save(tmp_path)
    assert read() == 3
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_over_an_interrupted_one_can_itself_be_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peft_lite.attach(Long(), LoraConfig(["out"], r=2, lora_alpha=1)).save(tmp_path)
    new = peft_lite.attach(Long(), LoraConfig(["out"], r=2, lora_alpha=2))
    replace = os.replace

    def once(source: Path, target: Path) -> None:
        if target.name == "adapter_config.json":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", once)
        with pytest.raises(Killed):
            new.save(tmp_path)
    assert (tmp_path / "adapter_config.json.partial").exists()
    loaded = peft_lite.load(Long(), tmp_path)
    assert loaded.methods["default"].config.lora_alpha == 2
    with monkeypatch.context() as patch:
        patch.setattr(storage, "save_file", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            peft_lite.attach(Long(), LoraConfig(["out"], r=2, lora_alpha=3)).save(tmp_path)
    again = peft_lite.load(Long(), tmp_path)
    assert again.methods["default"].config.lora_alpha == 2
    assert all(torch.equal(t, loaded.state()[n]) for n, t in again.state().items())
