"""One-file checkpoints of llama.cpp, `NAME.gguf`: a header of named values, then tensors.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

What is in the file is given as Hugging Face has it: the content of a config.json, tensors under
the names of its checkpoints, a tokenizer and a chat template.  Quantised tensors are expanded to
float32; the library `gguf` reads the file and knows the formats.

A block of a quantised tensor holds 32 numbers of a row, d (and m) in float16:

    Q8_0  x = d q,      q of 8 bits, signed         Q4_0  x = d (q - 8),  q of 4 bits
                                                    Q4_1  x = d q + m

In a Llama's query and key the rows of a head stand in pairs (0, N/2, 1, N/2 + 1, ...), as
llama.cpp's rotary positions want them; here they are put back in order (0, 1, ..., N - 1).
"""

import functools
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from minigpt.models.rotary import frequencies

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1")

# header -> config.json, each after the architecture's name
NEEDED = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
OPTIONAL = {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "rope.freq_base": "rope_theta",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

DIVISORS = "rope_freqs.weight"
LLAMA_3_FACTORS = (8.0, 32.0)  # of Llama 3.1 and 3.3, of Llama 3.2
LLAMA_3: dict[str, float | str] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

CONTROL, USER_DEFINED = 3, 4  # kinds of tokens
SPECIAL = {  # Hugging Face's name of a special token -> that of its id in the header
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
}
# how a text is cut before the merges of a byte-level BPE, by `tokenizer.ggml.pre`
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # noqa: E501
CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": lambda: _split(r"\p{N}{1,3}"),
    "qwen2": lambda: _split(r"\p{N}"),
}


class Gguf:
    """An opened file.

    Raises:
        ValueError: the library is not installed, or the file is broken.
    """

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise ValueError(
                f"{path}: files of this kind need the library gguf: pip install gguf"
            ) from None
        self.path = path
        try:
            self.reader: GGUFReader = GGUFReader(path)
        except Exception as error:  # the library raises whatever a damaged file leads to
            raise ValueError(f"cannot read {path}: no GGUF file, or damaged ({error})") from None
        self.architecture = str(self.value("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: general.architecture is {self.architecture!r}, must be one of "
                f"{', '.join(ARCHITECTURES)}"
            )
        self.shapes = {t.name: [int(n) for n in reversed(t.shape)] for t in self.reader.tensors}

    def value(self, name: str, default: Any = None) -> Any:
        """A value of the header."""
        field = self.reader.fields.get(name)
        if field is None:
            return default
        try:
            return field.contents()
        except Exception as error:
            raise ValueError(f"cannot read {self.path}: {name} is damaged ({error})") from None

    def most(self) -> str:
        """The type of most of its numbers, "Q4_1" for example."""
        numbers: Counter[str] = Counter()
        for t in self.reader.tensors:
            numbers[t.tensor_type.name] += prod(self.shapes[t.name])
        return max(numbers, key=lambda kind: numbers[kind])

    def config(self) -> dict[str, Any]:
        """What a config.json says.

        Raises:
            ValueError: the file asks for what is not supported.
        """
        kind = self.architecture
        fields = {**NEEDED, **OPTIONAL}
        given = {key: self.value(f"{kind}.{key}") for key in fields}
        raw = {fields[key]: value for key, value in given.items() if value is not None}
        if missing := [f"{kind}.{key}" for key in NEEDED if given[key] is None]:
            raise ValueError(f"{self.path}: {', '.join(missing)} is missing")
        raw.setdefault("num_key_value_heads", raw["num_attention_heads"])
        if kind == "llama" and "sliding_window" in raw:
            kind = "mistral"
        if DIVISORS in self.shapes:
            raw["rope_scaling"] = self._scaling(raw)
        scaling = self.value(f"{self.architecture}.rope.scaling.type", "none")
        if scaling != "none":
            factor = self.value(f"{self.architecture}.rope.scaling.factor", 1.0)
            raw["rope_scaling"] = {"rope_type": scaling, "factor": factor}
        for token in ("bos", "eos"):
            raw[f"{token}_token_id"] = self.value(f"tokenizer.ggml.{token}_token_id")
        table = self.shapes.get("token_embd.weight")
        if table is None or len(table) != 2:
            raise ValueError(f"{self.path}: token_embd.weight is missing, or no table")
        return raw | {
            "model_type": kind,
            "vocab_size": table[0],
            "tie_word_embeddings": "output.weight" not in self.shapes,
            "attention_bias": kind != "qwen2" and "blk.0.attn_q.bias" in self.shapes,
            "mlp_bias": "blk.0.ffn_up.bias" in self.shapes,
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tensors in float32, under the names of Hugging Face's checkpoints.

        Raises:
            ValueError: a tensor is of a type that is not supported, or its name is unknown.
        """
        from gguf.quants import dequantize

        config = self.config()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        tensors = {}
        for t in self.reader.tensors:
            if t.name == DIVISORS:  # the config has them
                continue
            if t.tensor_type.name not in TYPES:
                raise ValueError(
                    f"{self.path}: {t.name} is of type {t.tensor_type.name}, must be one of "
                    f"{', '.join(TYPES)}"
                )
            name = self.hf_name(t.name)
            try:
                numbers = dequantize(t.data, t.tensor_type).reshape(self.shapes[t.name])
                x = torch.tensor(numbers)  # a copy: those of the file cannot be written
                if self.architecture == "llama" and (layer := name.split(".")[-2]) in heads:
                    x = in_order(x, config[heads[layer]])
            except (ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"cannot read {self.path}: {t.name} ({reason})") from None
            tensors[name] = x
        return tensors

    def _scaling(self, raw: dict[str, Any]) -> dict[str, Any]:
        """Llama 3's scaling, which the file holds as what each rotary frequency is divided by."""
        (data,) = (t.data for t in self.reader.tensors if t.name == DIVISORS)
        divisors = torch.tensor(data, dtype=torch.float32)
        N = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
        theta, device = raw.get("rope_theta", 10000.0), divisors.device
        for factor in LLAMA_3_FACTORS:
            scaling: dict[str, float | str] = {**LLAMA_3, "factor": factor}
            ratio = frequencies(N, theta, {}, device) / frequencies(N, theta, scaling, device)
            if divisors.shape == ratio.shape and torch.allclose(divisors, ratio, rtol=1e-4):
                return scaling
        raise ValueError(
            f"{self.path}: {DIVISORS} is no published scaling of Llama 3, factor "
            f"{' or '.join(f'{x:g}' for x in LLAMA_3_FACTORS)}"
        )

    def hf_name(self, name: str) -> str:
        """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
        parts = name.split(".")
        block = f"model.layers.{parts[1]}." if parts[0] == "blk" and len(parts) == 4 else ""
        module = parts[2] if block else parts[0]
        if module not in NAMES or len(parts) != (4 if block else 2):
            raise ValueError(f"{self.path}: no place for the tensor {name!r}")
        return f"{block}{NAMES[module]}.{parts[-1]}"

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Its tokenizer.

        Raises:
            ValueError: the file has none, or one of a kind that is not supported.
        """
        kind, tokens = self.value("tokenizer.ggml.model"), self.value("tokenizer.ggml.tokens")
        if kind not in ("gpt2", "llama") or not tokens:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.model is {kind!r}, must be 'gpt2' or 'llama', "
                "with its tokens"
            )
        vocabulary = {token: i for i, token in enumerate(tokens)}
        if len(vocabulary) < len(tokens):
            raise ValueError(f"{self.path}: tokenizer.ggml.tokens names a token twice")
        backend = self._byte_level(vocabulary) if kind == "gpt2" else self._pieces(tokens)
        kinds = self.value("tokenizer.ggml.token_type") or []
        for token, its_kind in zip(tokens, kinds, strict=False):
            if its_kind == CONTROL:
                backend.add_special_tokens([token])
            elif its_kind == USER_DEFINED:
                backend.add_tokens([token])
        start = self.special_tokens().get("bos_token")
        if start is not None and self.value("tokenizer.ggml.add_bos_token", kind == "llama"):
            marks = [(start, vocabulary[start])]
            backend.post_processor = processors.TemplateProcessing(f"{start} $A", None, marks)
        return backend

    def chat_template(self) -> str | None:
        """The Jinja template of a conversation, where the file has one."""
        template = self.value("tokenizer.chat_template")
        return None if template is None else str(template)

    def special_tokens(self) -> dict[str, str]:
        """Hugging Face's name of a special token, such as "bos_token" -> the token."""
        tokens = self.value("tokenizer.ggml.tokens") or []
        ids = {name: self.value(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
        return {n: tokens[i] for n, i in ids.items() if isinstance(i, int) and i < len(tokens)}

    def _byte_level(self, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
        """Byte-level BPE."""
        pre = self.value("tokenizer.ggml.pre", "gpt-2")
        if pre not in CUTS:
            raise ValueError(
                f"{self.path}: tokenizer.ggml.pre is {pre!r}, must be one of {', '.join(CUTS)}"
            )
        pairs = [tuple(merge.split(" ")) for merge in self.value("tokenizer.ggml.merges") or []]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"{self.path}: a line of tokenizer.ggml.merges is no pair")
        backend = tokenizers.Tokenizer(models.BPE(vocabulary, pairs))
        backend.pre_tokenizer = CUTS[pre]()
        backend.decoder = decoders.ByteLevel()
        return backend

    def _pieces(self, tokens: list[str]) -> tokenizers.Tokenizer:
        """SentencePiece's BPE: spaces are `▁`, what is unknown falls to its bytes, and the pair
        whose union has the highest score merges first.
        """
        scores = self.value("tokenizer.ggml.scores")
        if scores is None or len(scores) != len(tokens):
            raise ValueError(f"{self.path}: tokenizer.ggml.scores does not fit the tokens")
        ids = {token: i for i, token in enumerate(tokens)}
        merges = [
            (-scores[i], ids[token[:cut]], ids[token[cut:]], (token[:cut], token[cut:]))
            for i, token in enumerate(tokens)
            for cut in range(1, len(token))
            if token[:cut] in ids and token[cut:] in ids
        ]
        merges.sort(key=lambda merge: merge[:3])
        unknown = tokens[int(self.value("tokenizer.ggml.unknown_token_id", 0))]
        pairs = [pair for *_, pair in merges]
        model = models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        backend = tokenizers.Tokenizer(model)
        prefix = self.value("tokenizer.ggml.add_space_prefix", True)
        first = [normalizers.Prepend("▁")] if prefix else []
        backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        last = [decoders.Strip(" ", 1, 0)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
        return backend


@functools.lru_cache(maxsize=1)
def _open(path: Path, modified: int, size: int) -> Gguf:
    return Gguf(path)


def opened(path: Path) -> Gguf:
    """The file, opened once: its tokens alone take a second."""
    status = path.stat()
    return _open(path, status.st_mtime_ns, status.st_size)


def in_order(x: Tensor, heads: int) -> Tensor:
    """Rows of each head (0, N/2, 1, N/2 + 1, ...) -> (0, 1, ..., N - 1); x (heads N, ...)."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _split(number: str) -> Any:
    """Words, numbers as this expression has them, and punctuation apart; then bytes."""
    pattern = tokenizers.Regex(WORDS % number)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
