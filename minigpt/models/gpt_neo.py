"""GPT-Neo, a decoder.  Black et al. 2021, https://doi.org/10.5281/zenodo.5297715

    x_0     = token[id] + position[t]
    x      <- x + attention(norm(x))        causal, unscaled: softmax(Q K^T) V, no q/k/v bias
    x      <- x + mlp(norm(x))              gelu_new, inner width 4 D
    logits  = norm(x_L) token^T             the head is tied to the token embedding

Odd blocks attend locally: query t sees the last `window_size` keys only.

Shapes:  B batch   T time   S slots (cached and new)
         D width   H heads   N head width   V vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minigpt.models.architecture import Architecture, Decoder
from minigpt.models.attention import Attention, Cache, block_mask
from minigpt.models.config import MAX_LAYERS, between, one_of, probability, short, size
from minigpt.models.linear import Linear
from minigpt.models.mlp import ACTIVATIONS, MLP
from minigpt.models.names import Names
from minigpt.models.slots import NoPrompt


@dataclass(frozen=True)
class GPTNeoConfig:
    """Shapes and constants, under the names of Hugging Face's config.json."""

    vocab_size: int = 50257
    max_position_embeddings: int = 2048
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int | None = None  # None: 4 hidden_size
    attention_layers: tuple[str, ...] | None = None  # None: global, local, global, local, ...
    window_size: int = 256
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    embed_dropout: float = 0.0
    attention_dropout: float = 0.0
    resid_dropout: float = 0.0
    initializer_range: float = 0.02
    bos_token_id: int | None = 50256
    eos_token_id: int | list[int] | None = 50256
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        size(self, "vocab_size", "max_position_embeddings", "hidden_size", "num_heads")
        size(self, "num_layers", at_most=MAX_LAYERS)
        size(self, "window_size")
        if self.intermediate_size is not None:
            size(self, "intermediate_size")
        probability(self, "embed_dropout", "attention_dropout", "resid_dropout")
        between(self, 0, 1, "layer_norm_epsilon")
        between(self, 0, 100, "initializer_range")
        one_of(self, "activation_function", ACTIVATIONS)
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}"
            )
        if len(self.layers) != self.num_layers or not {*self.layers} <= {"global", "local"}:
            raise ValueError(
                f"attention_layers {short(list(self.layers))}: want num_layers = {self.num_layers} "
                "entries, each 'global' or 'local'"
            )

    # no 1 / sqrt(N), no bias of query, key and value
    attention_scale = 1.0
    attention_bias = False

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of attention of each block: 'global' or 'local'."""
        alternating = tuple(("global", "local")[i % 2] for i in range(self.num_layers))
        return alternating if self.attention_layers is None else self.attention_layers

    @property
    def inner(self) -> int:
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size


class Embeddings(nn.Module):
    """ids (B, T) and their positions (B or 1, T) -> x_0 (B, T, D)."""

    def __init__(self, config: GPTNeoConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.prompt = NoPrompt()
        self.dropout = nn.Dropout(config.embed_dropout)

    def forward(self, input_ids: Tensor, position_ids: Tensor, start: bool) -> Tensor:
        x, position_ids = self.prompt(self.token(input_ids), position_ids, start)
        return self.dropout(x + self.position(position_ids))


class Block(nn.Module):
    def __init__(self, config: GPTNeoConfig, kind: str) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.layer_norm_epsilon
        self.attention_norm = nn.LayerNorm(width, epsilon)
        self.attention = Attention(
            width,
            config.num_heads,
            scale=config.attention_scale,
            bias=config.attention_bias,
            dropout=config.attention_dropout,
            window=config.window_size if kind == "local" else None,
        )
        self.mlp_norm = nn.LayerNorm(width, epsilon)
        self.mlp = MLP(width, config.inner, config.activation_function)
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(self, x: Tensor, mask: Tensor | None, causal: bool, cache: Cache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, causal, cache))
        x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x


class GPTNeo(Decoder):
    """Token ids (B, T) -> logits (B, T, V) of the next token at every position.

    Args:
        config: shapes and constants.
        head: "causal-lm", or "none" for the states (B, T, D) that the head would read.
    """

    config: GPTNeoConfig

    def __init__(self, config: GPTNeoConfig, head: str = "causal-lm") -> None:
        super().__init__()
        self.config = config
        self.head_kind = head
        names = self.architecture.names
        self.names = names.bare() if head == "none" else names
        self.task_type = "FEATURE_EXTRACTION" if head == "none" else "CAUSAL_LM"  # for HF PEFT
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layers)
        self.final_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.head: nn.Module = nn.Identity()
        if head == "causal-lm":
            self.head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self.initialize)
        self.tie()

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        position_ids, padding, cached = self.start(input_ids, attention_mask, position_ids, caches)
        x = self.embeddings(input_ids, position_ids, start=cached == 0)
        T, S = x.size(1), cached + x.size(1)  # with the prompt
        windows = {"global": None, "local": self.config.window_size}
        masks = {
            kind: block_mask(T, S, windows[kind], padding, input_ids.device)
            for kind in {*self.config.layers}
        }
        for i, (block, kind) in enumerate(zip(self.blocks, self.config.layers, strict=True)):
            x = block(x, *masks[kind], caches[i] if caches else None)
        return self.final_norm(x[:, T - input_ids.size(1) :])

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURE

    def new_caches(self, batch: int, slots: int) -> list[Cache]:
        """Empty caches for `slots` tokens of each of `batch` rows."""
        c, like = self.config, self.final_norm.weight
        slots += self.embeddings.prompt.length
        return [
            Cache(batch, c.num_heads, slots, c.hidden_size // c.num_heads, like)
            for _ in self.blocks
        ]

    def initialize(self, module: nn.Module) -> None:
        """Weights from N(0, initializer_range^2), biases 0, norms 1."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


NAMES = Names(
    {
        "embeddings.token": "transformer.wte",
        "embeddings.position": "transformer.wpe",
        "blocks.{}": "transformer.h.{}",
        "blocks.{}.attention_norm": "transformer.h.{}.ln_1",
        "blocks.{}.attention": "transformer.h.{}.attn.attention",
        "blocks.{}.attention.query": "transformer.h.{}.attn.attention.q_proj",
        "blocks.{}.attention.key": "transformer.h.{}.attn.attention.k_proj",
        "blocks.{}.attention.value": "transformer.h.{}.attn.attention.v_proj",
        "blocks.{}.attention.output": "transformer.h.{}.attn.attention.out_proj",
        "blocks.{}.mlp_norm": "transformer.h.{}.ln_2",
        "blocks.{}.mlp": "transformer.h.{}.mlp",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    prefix="transformer.",
    ignorable=[r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)"],
)


def read_layers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`attention_types` [[["global", "local"], 6]], a pattern and how many times, or its result
    `attention_layers`.
    """
    layers, types = raw.get("attention_layers"), raw.get("attention_types")
    if types is not None:
        for pattern, times in types:
            if len(pattern) * times > MAX_LAYERS:
                raise ValueError(f"attention_types has more than {MAX_LAYERS:,} layers")
        expanded = [kind for pattern, times in types for kind in pattern * times]
        if layers not in (None, expanded):
            raise ValueError(
                f"attention_layers {short(layers)} contradicts attention_types {short(types)}"
            )
        layers = expanded
    return {} if layers is None else {"attention_layers": tuple(layers)}


def write_layers(model: GPTNeo) -> dict[str, Any]:
    """Both forms of it."""
    layers = model.config.layers
    return {
        "attention_layers": list(layers),
        "attention_types": [[[layer], 1] for layer in layers],
    }


ARCHITECTURE = Architecture(
    model_type="gpt_neo",
    model=GPTNeo,
    config=GPTNeoConfig,
    names=NAMES,
    heads={"causal-lm": "GPTNeoForCausalLM", "none": "GPTNeoModel"},
    default="causal-lm",
    dropped={"none": ("head.",)},
    absent={"hidden_size": 2048, "num_layers": 24, "num_heads": 16},
    aliases={"num_hidden_layers": "num_layers", "num_attention_heads": "num_heads"},
    hints={"attention_types": list[tuple[list[str], int]] | None},
    read=read_layers,
    write=write_layers,
)
