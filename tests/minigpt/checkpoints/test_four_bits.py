"""Checkpoints of 4 bits: ours opened by transformers and bitsandbytes, and theirs here."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minigpt
import peft_lite
from minigpt.checkpoints import four_bits
from minigpt.checkpoints.directory import outline
from minigpt_kernels import nf4
from peft_lite import report
from peft_lite.quantized import is_quantized
from tests.live_bytes import LiveBytes

transformers = pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

IDS = torch.arange(18).view(2, 9) % 50
SIZES = {"vocab_size": 50, "hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 72}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False
    ),
    "mistral": lambda: transformers.MistralConfig(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, sliding_window=5
    ),
    "qwen2, tied": lambda: transformers.Qwen2Config(
        **SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=50, hidden_size=40, num_layers=2, num_heads=4, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=16,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """bitsandbytes' CPU code compiles itself for each shape otherwise."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense checkpoint of each architecture, with biases that are not zero."""
    folders = {}
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config())
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)
        folders[name] = tmp_path_factory.mktemp(name.partition(",")[0])
        model.save_pretrained(folders[name])
    return folders


def theirs(folder: Path, **settings: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def quantised(folder: Path, double: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return theirs(folder, quantization_config=how, dtype=dtype)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out = model(IDS)
    return out if isinstance(out, Tensor) else out.logits


def close(ours: Tensor, others: Tensor) -> None:
    torch.testing.assert_close(ours, others, rtol=1e-5, atol=2e-5 * others.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_ours_opens_there(name: str, dense: dict[str, Path], tmp_path: Path) -> None:
    model = minigpt.load(dense[name], quantize="nf4")
    minigpt.save(model, tmp_path)
    other = theirs(tmp_path)
    packed = {n for n, m in other.named_modules() if type(m).__name__ == "Linear4bit"}
    ours = {model.names.to_hf(n) for n, m in model.named_modules() if is_quantized(m)}
    assert packed == ours
    assert report(outline(tmp_path)) == report(model)
    close(logits(model), logits(other))
    assert torch.equal(logits(minigpt.load(tmp_path)), logits(model))


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_theirs_opens_here(name: str, double: bool, dense: dict[str, Path], tmp_path: Path) -> None:
    other = quantised(dense[name], double)
    other.save_pretrained(tmp_path)
    model = minigpt.load(tmp_path)
    close(logits(model), logits(other))
    assert report(outline(tmp_path)) == report(model)  # of config.json alone
    if not double:
        close(logits(model), logits(without_double(minigpt.load(dense[name]))))


def without_double(model: Any) -> Any:
    peft_lite.quantize(model, double=False)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, dense: dict[str, Path], tmp_path: Path) -> None:
    other = quantised(dense["llama"], dtype=dtype)
    other.save_pretrained(tmp_path)
    model = minigpt.load(tmp_path, dtype=dtype)
    scale = logits(other).float().abs().max().item()
    gap = (logits(model).float() - logits(other).float()).abs().max().item()
    assert gap < 8 * torch.finfo(dtype).eps * scale
    half = minigpt.load(dense["llama"], dtype=dtype)
    minigpt.save(half, tmp_path / "half")
    again = minigpt.load(tmp_path / "half", quantize="nf4", dtype=dtype)
    minigpt.save(again, tmp_path / "again")
    gap = (
        (logits(again).float() - logits(theirs(tmp_path / "again", dtype=dtype)).float())
        .abs()
        .max()
    )
    assert gap < 8 * torch.finfo(dtype).eps * scale


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_on_four_bits_opens_in_peft(dense: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = minigpt.load(dense["llama"], quantize="nf4")
    minigpt.save(model, tmp_path / "model")
    handle = peft_lite.attach(model, peft_lite.LoraConfig("all-linear", r=3, lora_alpha=5))
    for p in handle.methods["default"].trained():
        p.data += 0.1 * torch.randn_like(p)
    handle.save(tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(theirs(tmp_path / "model"), tmp_path / "adapter")
    close(logits(model), logits(other))


def test_shards_of_which_one_tensor_is_mapped_at_a_time(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    model = theirs(dense["llama"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    a, b = (minigpt.load(folder, quantize="nf4") for folder in (tmp_path, dense["llama"]))
    assert torch.equal(logits(a), logits(b))


def test_loading_holds_no_dense_layer(tmp_path: Path) -> None:
    """Live bytes: of eight layers of 1 MB, each read, packed and dropped."""
    width = 512
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=width, num_hidden_layers=8,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    nf4.dequantize(nf4.quantize(torch.randn(64, 64)))  # makes the tables
    live = LiveBytes()
    with live:
        model = minigpt.load(tmp_path, quantize="nf4")
    kept = sum(m.quantized.nbytes for m in model.modules() if is_quantized(m))
    dense = width * width * 4
    assert kept > 7 * dense
    assert live.most < kept + 5 * dense  # of a piece: numbers, scaled, codes of 32 bits, masks


def test_a_weight_that_is_not_finite_is_named(dense: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(dense["llama"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight: .* NaN or an infinite"):
        minigpt.load(tmp_path, quantize="nf4")


def test_gpt2_is_quantised_here_and_refused_as_a_file(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=50, n_embd=40, n_layer=1, n_head=4, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = minigpt.load(tmp_path, quantize="nf4")
    assert sum(is_quantized(m) for m in model.modules()) == 6
    with pytest.raises(ValueError, match="gpt2 has no file format for weights of 4 bits"):
        minigpt.save(model, tmp_path / "out")


STATE = "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def encoded(**changes: Any) -> Tensor:
    weight = nf4.quantize(torch.randn(72, 40))
    state = json.loads(bytes(four_bits.scatter("x", weight)[f"x{four_bits.STATE}nf4"].tolist()))
    return torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


FAULTS: dict[str, tuple[str, Any]] = {
    "quant_type is .fp4., must be one of nf4": (STATE, lambda _: encoded(quant_type="fp4")),
    "blocksize is 63": (STATE, lambda _: encoded(blocksize=63)),
    "blocksize is .a., must be a whole number": (STATE, lambda _: encoded(blocksize="a")),
    "dtype is .float8.": (STATE, lambda _: encoded(dtype="float8")),
    r"shape is \[72, 40, 1\]": (STATE, lambda _: encoded(shape=[72, 40, 1])),
    r"shape is \[-72, -40\]": (STATE, lambda _: encoded(shape=[-72, -40])),
    "weight is 1440 of torch.uint8, must be 2880": (STATE, lambda _: encoded(shape=[72, 80])),
    r"is \[40, 72\], the config wants \[72, 40\]": (STATE, lambda _: encoded(shape=[40, 72])),
    "nested_blocksize is 64": (STATE, lambda _: encoded(nested_blocksize=64)),
    "nested_offset is None|absmax is 45 of torch.uint8": (
        STATE, lambda _: encoded(nested_offset=None)
    ),
    "cannot read quant_state": (STATE, lambda _: torch.zeros(4, dtype=torch.uint8)),
    "quant_state is 4 of torch.float32": (STATE, lambda _: torch.zeros(4)),
    "absmax is missing": (f"{WEIGHT}.absmax", lambda _: None),
    "nested_absmax is 2 of": (f"{WEIGHT}.nested_absmax", lambda _: torch.ones(2)),
    "quant_map holds other numbers": (f"{WEIGHT}.quant_map", lambda t: t + 1e-3),
    "a scale is not finite": (f"{WEIGHT}.nested_absmax", lambda t: t * float("nan")),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_file_is_refused_by_name(
    fault: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    minigpt.save(minigpt.load(dense["llama"], quantize="nf4"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key, change = FAULTS[fault]
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=fault) as error:
        minigpt.load(tmp_path)
    assert "up_proj.weight" in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        "nf4",
    ],
)
def test_another_way_to_pack_is_refused(
    settings: Any, dense: dict[str, Path], tmp_path: Path
) -> None:
    minigpt.save(minigpt.load(dense["llama"], quantize="nf4"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = settings
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantization_config"):
        minigpt.load(tmp_path)
