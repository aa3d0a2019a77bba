"""Adapters on disk: what is written here opens in HF PEFT, what PEFT writes opens here."""

import json
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
from peft_lite import FreezeConfig, LoraConfig
from tests.peft_lite.peft_models import PROJECTIONS, Picture, Plain, output, pair, perturb, tokens

# what PEFT itself does with the `transformers` of today
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is dep:FutureWarning")

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
REAL = SHARED / "adapters" / "gptneo125m_lora_movies"

WRITTEN = {
    "causal": ("gpt-neo", LoraConfig(["query", "value"], r=3, lora_alpha=7)),
    "native names": ("gpt-neo", LoraConfig(PROJECTIONS, r=3, lora_alpha=7)),
    "expression": ("gpt-neo", LoraConfig(r"blocks\.1\..*(key|up)", r=2, lora_alpha=5)),
    "all-linear": ("gpt-neo", LoraConfig("all-linear", r=2, lora_alpha=0.5)),
    "patterns": (
        "gpt-neo",
        LoraConfig(
            ["query", "mlp.up"],
            r=4,
            rank_pattern={"mlp.up": 6, r"blocks\.1\.attention\.query": 2},
            alpha_pattern={"h.0.attn.attention.q_proj": 3},
        ),
    ),
    "rslora": ("gpt-neo", LoraConfig(["k_proj"], r=4, lora_alpha=6, use_rslora=True)),
    "bare decoder": ("gpt-neo bare", LoraConfig(["query"], r=3, lora_alpha=7)),
    "classification": ("bert", LoraConfig(["query", "attention.output"], r=3, lora_alpha=7)),
    "one of two ends": ("bert", LoraConfig(["mlp.down"], r=3, lora_alpha=7)),
    "classification patterns": (
        "bert",
        LoraConfig(["output.dense"], r=3, rank_pattern={"mlp.down": 5}, use_rslora=True),
    ),
    "bare encoder": ("bert bare", LoraConfig(["value", "pooler"], r=3, lora_alpha=7)),
    "masked": ("bert masked", LoraConfig(["dense"], r=3, lora_alpha=7)),
}


def close(ours: Tensor, oracle: Tensor) -> None:
    """Apart by at most 1e-5, or 1e-5 of the largest magnitude where that is above 1."""
    torch.testing.assert_close(ours, oracle, rtol=0, atol=1e-5 * max(1, oracle.abs().max().item()))


@pytest.mark.parametrize(("kind", "config"), WRITTEN.values(), ids=WRITTEN)
def test_an_adapter_written_here_opens_in_peft(
    kind: str, config: LoraConfig, tmp_path: Path
) -> None:
    ours, theirs = pair(kind, tmp_path / "base")
    before = output(theirs, tokens())
    handle: Any = peft_lite.attach(ours, config)
    perturb(handle)
    handle.save(tmp_path / "adapter")
    opened = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    after = output(opened, tokens())
    assert (after - before).abs().max() > 1e-2
    close(output(ours, tokens()), after)
    targeted = set(opened.base_model.targeted_module_names)
    assert targeted == {ours.names.to_hf(name) for name in handle.methods["default"].wrappers}


@pytest.mark.parametrize(("kind", "config"), WRITTEN.values(), ids=WRITTEN)
def test_an_adapter_written_here_loads_here(kind: str, config: LoraConfig, tmp_path: Path) -> None:
    ours, _ = pair(kind, tmp_path / "base")
    handle = peft_lite.attach(ours, config)
    perturb(handle)
    handle.save(tmp_path / "adapter")
    other, _ = pair(kind, tmp_path / "base")
    loaded = peft_lite.load(other, tmp_path / "adapter")
    assert torch.equal(output(other, tokens()), output(ours, tokens()))
    assert loaded.report() == handle.report()
    assert all(torch.equal(t, loaded.state()[n]) for n, t in handle.state().items())


FROM_PEFT: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("gpt-neo", {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}),
    "all-linear": ("gpt-neo", {"target_modules": "all-linear"}),
    "expression": ("gpt-neo", {"target_modules": r".*h\.1.*\.(k_proj|c_fc)"}),
    "patterns": (
        "gpt-neo",
        {
            "target_modules": ["q_proj", "c_fc"],
            "rank_pattern": {"c_fc": 5, "h.0.attn.attention.q_proj": 2},
            "alpha_pattern": {r"h\.1\..*": 9},
        },
    ),
    "rslora": ("gpt-neo", {"target_modules": ["out_proj"], "use_rslora": True}),
    "gaussian start": ("gpt-neo", {"target_modules": ["c_fc"], "init_lora_weights": "gaussian"}),
    "classification": ("bert", {"target_modules": ["query", "output.dense"]}),
    "bare encoder": ("bert bare", {"target_modules": ["value", "pooler.dense"]}),
}


def write_with_peft(theirs: Any, settings: dict[str, Any], folder: Path) -> Any:
    config = {"r": 3, "lora_alpha": 7, "lora_dropout": 0.1, **settings}
    torch.manual_seed(5)
    model = peft.get_peft_model(theirs, peft.LoraConfig(**config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(("kind", "settings"), FROM_PEFT.values(), ids=FROM_PEFT)
def test_an_adapter_written_by_peft_loads_here(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    ours, theirs = pair(kind, tmp_path / "base")
    before = output(ours, tokens())
    written = write_with_peft(theirs, settings, tmp_path / "adapter")
    handle: Any = peft_lite.load(ours, tmp_path / "adapter")
    after = output(ours, tokens())
    assert (after - before).abs().max() > 1e-2
    close(after, output(written, tokens()))
    handle.merge()
    close(output(ours, tokens()), output(written, tokens()))
    assert all(layer.dropout == 0.1 for layer in handle.methods["default"].wrappers.values())


def test_an_adapter_loads_on_a_model_of_transformers(tmp_path: Path) -> None:
    _, theirs = pair("gpt-neo", tmp_path / "base")
    _, plain = pair("gpt-neo", tmp_path / "base")
    written = write_with_peft(theirs, {"target_modules": ["q_proj"]}, tmp_path / "adapter")
    peft_lite.load(plain, tmp_path / "adapter")
    close(output(plain, tokens()), output(written, tokens()))


@pytest.fixture(scope="session")
def gpt_neo_125m(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ours, its twin) at the size of GPT-Neo-125M, from a checkpoint of `transformers`."""
    folder = tmp_path_factory.mktemp("gpt-neo-125m")
    torch.manual_seed(0)
    theirs = transformers.GPTNeoForCausalLM(
        transformers.GPTNeoConfig(
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            attention_types=[[["global", "local"], 6]],
        )
    ).eval()
    theirs.save_pretrained(folder)
    ours = minigpt.load(folder)
    (folder / "model.safetensors").unlink()
    return ours, theirs


@pytest.mark.skipif(
    not REAL.exists(), reason="the folder shared/data with a real adapter is absent"
)
def test_a_real_adapter_computes_here_what_it_computes_in_peft(
    gpt_neo_125m: tuple[Any, Any],
) -> None:
    ours, theirs = gpt_neo_125m
    ids = torch.randint(0, 50257, (2, 7))
    with torch.no_grad():
        before = ours(ids)
        handle = peft_lite.load(ours, REAL)
        after = ours(ids)
        opened = peft.PeftModel.from_pretrained(theirs, REAL).eval()
        expected = opened(ids).logits
        handle.merge()
        merged = ours(ids)
        assert sum(t.numel() for t in handle.state().values()) == 294_912
        handle.detach()
        assert torch.equal(ours(ids), before)
    assert (after - before).abs().max() > 1e-2
    close(after, expected)
    close(merged, expected)


def saved(folder: Path, config: LoraConfig | FreezeConfig | None = None) -> Path:
    """An adapter of `Plain`, at a perturbed point."""
    handle = peft_lite.attach(Plain(), config or LoraConfig(["inner.0", "out"], r=2, lora_alpha=3))
    perturb(handle)
    handle.save(folder)
    return folder


def rewrite(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refuse(folder: Path, reason: str, model: nn.Module | None = None) -> None:
    """Loading is refused with a reason, and the model stays as it was and free for another."""
    model = model or Plain()
    before = Picture(model)
    with pytest.raises(ValueError, match=reason):
        peft_lite.load(model, folder)
    assert Picture(model) == before
    peft_lite.attach(model, LoraConfig(["out"]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["inner.2"]),
        ("layers_to_transform", [1]),
        ("layers_to_transform", 0),
        ("layers_pattern", "inner"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "loftq"),
        ("lora_bias", True),
        ("exclude_modules", ["out"]),
        ("target_parameters", ["out.weight"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("use_qalora", True),
        ("from_the_future", 0.5),
    ],
)
def test_a_setting_without_code_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    rewrite(saved(tmp_path), **{field: value})
    refuse(tmp_path, field)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("from_the_future", None),
        ("from_the_future", False),
        ("from_the_future", []),
        ("loftq_config", {}),
        ("init_lora_weights", "gaussian"),
        ("base_model_name_or_path", "some/model"),
        ("inference_mode", False),
        ("fan_in_fan_out", True),
    ],
)
def test_a_setting_that_changes_nothing_is_read_over(
    tmp_path: Path, field: str, value: Any
) -> None:
    rewrite(saved(tmp_path), **{field: value})
    model = Plain()
    assert len(peft_lite.load(model, tmp_path).state()) == 4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "8"),
        ("r", 0),
        ("lora_alpha", "16"),
        ("lora_dropout", "0.1"),
        ("rank_pattern", ["out"]),
        ("alpha_pattern", {"out": "4"}),
        ("target_modules", 5),
        ("target_modules", None),
        ("target_modules", ["nowhere"]),
        ("use_rslora", "no"),
        ("peft_type", "IA3"),
        ("peft_type", None),
    ],
)
def test_a_setting_of_the_wrong_kind_is_refused(tmp_path: Path, field: str, value: Any) -> None:
    rewrite(saved(tmp_path), **{field: value})
    refuse(tmp_path, r".+")


PREFIX = "base_model.model"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("drop", rf"1 tensors are missing: {PREFIX}\.out\.lora_B\.weight"),
        ("add", r"1 tensors are unexpected: other\.lora_A\.weight"),
        ("rename", rf"2 tensors are missing: {PREFIX}\.inner\.0\.lora_A"),
        ("reshape", rf"{PREFIX}\.out\.lora_A\.weight is \[3, 5\], this model wants \[2, 5\]"),
        ("transpose", rf"{PREFIX}\.out\.lora_A\.weight is \[5, 2\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change: str, reason: str) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    a = f"{PREFIX}.out.lora_A.weight"
    if change == "drop":
        del tensors[f"{PREFIX}.out.lora_B.weight"]
    elif change == "add":
        tensors["other.lora_A.weight"] = torch.zeros(2, 2)
    elif change == "rename":
        tensors = {n.replace("inner.0", "inner.9"): t for n, t in tensors.items()}
    elif change == "reshape":
        tensors[a] = torch.zeros(3, 5)
    else:
        tensors[a] = tensors[a].T.contiguous()
    save_file(tensors, file)
    refuse(tmp_path, reason)


@pytest.mark.parametrize("content", [b"", b"\x00\x01", b"PK\x03\x04 cut"])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    saved(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path, f"cannot read .*{name}")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    refuse(tmp_path, "cannot read .*adapter_model.safetensors")


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"LORA"'])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    (saved(tmp_path) / "adapter_config.json").write_text(content)
    refuse(tmp_path, r"adapter_config.json")


def test_missing_files_are_named(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", r"adapter_config\.json")
    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    refuse(tmp_path, r"adapter_model\.safetensors")


def test_an_older_adapter_model_bin_is_read(tmp_path: Path) -> None:
    file = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    state = peft_lite.load(Plain(), tmp_path).state()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[n], t) for n, t in tensors.items())


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_nothing_but_tensors_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    torch.save({"x": Trap()}, tmp_path / "adapter_model.bin")
    refuse(tmp_path, r"cannot read .*adapter_model\.bin")
    assert not (tmp_path / "sprung").exists()


def test_a_bin_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_model.safetensors").unlink()
    torch.save(torch.zeros(3, 2), tmp_path / "adapter_model.bin")
    refuse(tmp_path, r"adapter_model\.bin")


def test_a_merged_adapter_is_not_saved(tmp_path: Path) -> None:
    handle = peft_lite.attach(Plain(), LoraConfig(["out"]))
    perturb(handle)
    handle.merge()
    with pytest.raises(ValueError, match="unmerge"):
        handle.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    handle.unmerge()
    handle.save(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_loading_onto_a_model_with_a_method_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    model = Plain()
    peft_lite.attach(model, LoraConfig(["out"]))
    attached = Picture(model)
    with pytest.raises(ValueError, match="detach it first"):
        peft_lite.load(model, tmp_path)
    assert Picture(model) == attached


def test_saving_and_loading_leave_everything_trainable(tmp_path: Path) -> None:
    model, x = Plain(), torch.randn(4, 7)
    peft_lite.load(model, saved(tmp_path)).save(tmp_path / "again")
    model(x).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora" in name)
        assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad


def test_target_names_single_out_the_layers_among_modules_of_every_kind(tmp_path: Path) -> None:
    class Model(nn.Module):
        """`first.out` is a linear layer, `out` a container that PEFT would refuse to target."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.ModuleDict({"out": nn.Linear(4, 6)})
            self.out = nn.Sequential(nn.Tanh(), nn.Linear(6, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.first["out"](x))

    model, twin = Model(), Model()
    twin.load_state_dict(model.state_dict())
    handle = peft_lite.attach(model, LoraConfig(["first.out"], r=2))
    perturb(handle)
    handle.save(tmp_path)
    x = torch.randn(3, 4)
    close(peft.PeftModel.from_pretrained(twin, tmp_path)(x), model(x))


@pytest.mark.parametrize("train", [["inner.2"], "inner.*weight"])
def test_freezing_saves_what_trains_and_loads_it(tmp_path: Path, train: Any) -> None:
    model = Plain()
    handle = peft_lite.attach(model, FreezeConfig(train=train))
    perturb(handle)
    handle.save(tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert kept.keys() == {f"{PREFIX}.{n}" for n in trained}
    other = Plain()
    rest = {n: p.detach().clone() for n, p in other.named_parameters() if n not in trained}
    peft_lite.load(other, tmp_path)
    now = dict(other.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in {**trained, **rest}.items())
