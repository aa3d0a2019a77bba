"""GPT-2, a decoder.  Radford et al. 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf

GPT-Neo (minigpt/models/gpt_neo.py) was made after it.  Here every block sees all tokens before a
query, scores are divided by sqrt(N), and query, key and value have a bias:

    attention(x) = softmax(Q K^T / sqrt(N)) V W_o^T + b_o

Its checkpoints hold query, key and value as one matrix `c_attn`, and every matrix as (in, out).
They are split and transposed when they are read, so that every layer here is a plain nn.Linear, and
put together again when they are written.  An adapter that Hugging Face PEFT trained on `c_attn` has
one A for all three, and is read as three adapters with the same A (peft_lite/joined.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.models.architecture import Architecture
from minigpt.models.config import MAX_LAYERS, between, one_of, probability, size
from minigpt.models.gpt_neo import GPTNeo
from minigpt.models.mlp import ACTIVATIONS
from minigpt.models.names import Names


@dataclass(frozen=True)
class GPT2Config:
    """Shapes and constants, under the names of Hugging Face's config.json."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # None: 4 n_embd
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    scale_attn_weights: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        size(self, "vocab_size", "n_positions", "n_embd", "n_head", "inner")
        size(self, "n_layer", at_most=MAX_LAYERS)
        probability(self, "embd_pdrop", "attn_pdrop", "resid_pdrop")
        between(self, 0, 1, "layer_norm_epsilon")
        between(self, 0, 100, "initializer_range")
        one_of(self, "activation_function", ACTIVATIONS)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is no multiple of n_head {self.n_head}")

    # the same under the names of the other models

    window_size = None
    attention_bias = True

    @property
    def attention_scale(self) -> float:
        return (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0

    @property
    def layers(self) -> tuple[str, ...]:
        return ("global",) * self.n_layer

    @property
    def inner(self) -> int:
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def max_position_embeddings(self) -> int:
        return self.n_positions

    @property
    def hidden_size(self) -> int:
        return self.n_embd

    @property
    def num_heads(self) -> int:
        return self.n_head

    @property
    def embed_dropout(self) -> float:
        return self.embd_pdrop

    @property
    def attention_dropout(self) -> float:
        return self.attn_pdrop

    @property
    def resid_dropout(self) -> float:
        return self.resid_pdrop


class GPT2(GPTNeo):
    """Token ids (B, T) -> logits (B, T, V) of the next token at every position.

    Args:
        config: shapes and constants.
        head: "causal-lm", or "none" for the states (B, T, D) that the head would read.
    """

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURE


QKV = ("q_proj", "k_proj", "v_proj")  # the parts of c_attn, as GPT-Neo's checkpoints call them
TURNED = ("c_attn", "c_proj", "c_fc")  # their weights are (in, out)

NAMES = Names(
    {
        "embeddings.token": "transformer.wte",
        "embeddings.position": "transformer.wpe",
        "blocks.{}": "transformer.h.{}",
        "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
        "blocks.{}.attention": "transformer.h.{}.attn",
        "blocks.{}.attention.query": "transformer.h.{}.attn.q_proj",
        "blocks.{}.attention.key": "transformer.h.{}.attn.k_proj",
        "blocks.{}.attention.value": "transformer.h.{}.attn.v_proj",
        "blocks.{}.attention.output": "transformer.h.{}.attn.c_proj",
        "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
        "blocks.{}.mlp": "transformer.h.{}.mlp",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    prefix="transformer.",
    ignorable=[r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"],
    joined={"c_attn": QKV},
    turned=TURNED,
)


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint, with matrices as (out, in) and c_attn in its three parts."""
    unpacked = {}
    for name, x in tensors.items():
        layer, _, end = name.rpartition(".")
        kind = layer.rpartition(".")[2]
        if kind in TURNED and end == "weight" and x.dim() == 2:
            x = x.T.contiguous()
        if kind == "c_attn" and end in ("weight", "bias"):
            if len(x) % 3:
                raise ValueError(f"{name} has {len(x)} outputs, must be a multiple of 3")
            for part, piece in zip(QKV, x.chunk(3), strict=True):
                unpacked[f"{layer.removesuffix('c_attn')}{part}.{end}"] = piece.clone()
        else:
            unpacked[name] = x
    return unpacked


def pack(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `unpack`."""
    packed = {}
    for name, x in tensors.items():
        layer, _, end = name.rpartition(".")
        beginning, _, kind = layer.rpartition(".")
        if kind == QKV[0]:
            x = torch.cat([tensors[f"{beginning}.{part}.{end}"] for part in QKV])
            name, kind = f"{beginning}.c_attn.{end}", "c_attn"
        if kind in TURNED and end == "weight":
            x = x.T.contiguous()
        if kind not in QKV:
            packed[name] = x
    return packed


ARCHITECTURE = Architecture(
    model_type="gpt2",
    model=GPT2,
    config=GPT2Config,
    names=NAMES,
    heads={"causal-lm": "GPT2LMHeadModel", "none": "GPT2Model"},
    default="causal-lm",
    dropped={"none": ("head.",)},
    fixed={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    unpack=unpack,
    pack=pack,
)
