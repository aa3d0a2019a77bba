"""Llama, a decoder, and its relatives Mistral, Qwen2 and Qwen3.
Touvron et al. 2023, https://arxiv.org/abs/2302.13971

    x_0     = token[id]
    x      <- x + attention(norm(x))        causal, rotary positions, H query heads on G of keys
    x      <- x + mlp(norm(x))              W_down (silu(W_gate x) * W_up x)
    logits  = norm(x_L) W^T                 W may be tied to the token embedding

norm is RMSNorm (minigpt/models/norms.py); positions are rotary (minigpt/models/rotary.py).  Each
relative differs in one thing:

    Mistral   query t sees the last `sliding_window` keys only      https://arxiv.org/abs/2310.06825
    Qwen2     query, key and value have a bias                      https://arxiv.org/abs/2407.10671
    Qwen3     norms on each head's query and key                    https://arxiv.org/abs/2505.09388

Shapes:  B batch   T time   S slots (cached and new)
         D width   H query heads   G key/value heads   N head width   V vocabulary
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from minigpt.models.architecture import Architecture, Decoder
from minigpt.models.attention import Cache, block_mask, fast_attention
from minigpt.models.config import MAX_LAYERS, between, one_of, probability, short, size
from minigpt.models.linear import Linear
from minigpt.models.mlp import ACTIVATIONS, GatedMLP
from minigpt.models.names import Names
from minigpt.models.norms import RMSNorm
from minigpt.models.rotary import check_scaling, frequencies, rotate, rotation
from minigpt.models.slots import NoPrefix, NoPrompt

FULL, SLIDING = "full_attention", "sliding_attention"
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants, under the names of Hugging Face's config.json."""

    model_type: str = "llama"
    vocab_size: int = 32000
    max_position_embeddings: int = 2048
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as queries
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    intermediate_size: int = 11008
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping[str, float | str] | None = None
    attention_bias: bool = False  # on all four projections
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None  # None: all slide where there is a window
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        one_of(self, "model_type", FAMILY)
        size(self, "vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size")
        size(self, "num_hidden_layers", at_most=MAX_LAYERS)
        size(self, "num_attention_heads", "kv_heads", "head_width")
        probability(self, "attention_dropout")
        between(self, 0, 1, "rms_norm_eps")
        between(self, 0, 100, "initializer_range")
        one_of(self, "hidden_act", ACTIVATIONS)
        if not 0 < self.rope_theta < 1e30:
            raise ValueError(f"rope_theta is {self.rope_theta}, must be positive")
        check_scaling(self.rope_scaling or {})
        D, H, G = self.hidden_size, self.num_attention_heads, self.kv_heads
        if self.head_dim is None and D % H:
            raise ValueError(f"hidden_size {D} is no multiple of num_attention_heads {H}")
        if H % G:
            raise ValueError(f"num_attention_heads {H} is no multiple of num_key_value_heads {G}")
        if self.head_width % 2:
            raise ValueError(f"head_dim is {self.head_width}, must be even: rotary pairs")
        if self.sliding_window is not None:
            size(self, "sliding_window")
            if self.model_type == "llama":
                raise ValueError("sliding_window: a llama has none, model_type mistral does")
        for name in ("attention_bias", "mlp_bias"):
            if name in LACKING[self.model_type] and getattr(self, name):
                raise ValueError(f"{name} is True, a {self.model_type} has no such bias")
        if len(self.layers) != self.num_hidden_layers or not {*self.layers} <= {FULL, SLIDING}:
            raise ValueError(
                f"layer_types {short(list(self.layers))}: want num_hidden_layers = "
                f"{self.num_hidden_layers} entries, each {FULL!r} or {SLIDING!r}"
            )
        if SLIDING in self.layers and self.sliding_window is None:
            raise ValueError(f"layer_types has {SLIDING!r}, but sliding_window is None")

    @property
    def kv_heads(self) -> int:
        """G."""
        given = self.num_key_value_heads
        return self.num_attention_heads if given is None else given

    @property
    def head_width(self) -> int:
        """N."""
        given = self.head_dim
        return self.hidden_size // self.num_attention_heads if given is None else given

    @property
    def layers(self) -> tuple[str, ...]:
        """The kind of attention of each block."""
        kind = FULL if self.sliding_window is None else SLIDING
        return (kind,) * self.num_hidden_layers if self.layer_types is None else self.layer_types


class Embeddings(nn.Module):
    """ids (B, T) and their positions (B or 1, T) -> x_0 (B, T, D) and the positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.hidden_size)
        self.prompt = NoPrompt()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, start: bool
    ) -> tuple[Tensor, Tensor]:
        x, position_ids = self.prompt(self.token(input_ids), position_ids, start)
        return x, position_ids


class Attention(nn.Module):
    """x (B, T, D) -> (B, T, D)."""

    def __init__(self, config: LlamaConfig, kind: str) -> None:
        super().__init__()
        D, N = config.hidden_size, config.head_width
        queries, keys = config.num_attention_heads * N, config.kv_heads * N
        bias = config.attention_bias or config.model_type == "qwen2"
        self.query = Linear(D, queries, bias=bias)
        self.key = Linear(D, keys, bias=bias)
        self.value = Linear(D, keys, bias=bias)
        self.output = Linear(queries, D, bias=config.attention_bias)
        self.query_norm: nn.Module = nn.Identity()
        self.key_norm: nn.Module = nn.Identity()
        if config.model_type == "qwen3":
            self.query_norm = RMSNorm(N, config.rms_norm_eps)
            self.key_norm = RMSNorm(N, config.rms_norm_eps)
        self.prefix = NoPrefix()
        self.attend = fast_attention
        self.head_width = N
        self.scale = N**-0.5
        self.window = config.sliding_window if kind == SLIDING else None
        self.dropout = config.attention_dropout

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: Cache | None,
    ) -> Tensor:
        """`turn`: cosines and sines of the positions.  `mask` and `causal` as in
        minigpt/models/attention.py.
        """
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)  # (B, T, H N) -> (B, H, T, N)
            for y in (self.query(x), self.key(x), self.value(x))
        )
        q, k = rotate(self.query_norm(q), *turn), rotate(self.key_norm(k), *turn)
        if cache is not None:
            k, v = cache.append(k, v)
        k, v, mask, causal = self.prefix(k, v, mask, causal)
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, mask, causal, self.scale, dropout)
        return self.output(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, kind: str) -> None:
        super().__init__()
        width, epsilon = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(width, epsilon)
        self.attention = Attention(config, kind)
        self.mlp_norm = RMSNorm(width, epsilon)
        self.mlp = GatedMLP(width, config.intermediate_size, config.hidden_act, config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        causal: bool,
        cache: Cache | None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, mask, causal, cache)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Llama(Decoder):
    """Token ids (B, T) -> logits (B, T, V) of the next token at every position.

    Args:
        config: shapes and constants, and which of the family it is.
        head: "causal-lm", or "none" for the states (B, T, D) that the head would read.
    """

    config: LlamaConfig

    def __init__(self, config: LlamaConfig, head: str = "causal-lm") -> None:
        super().__init__()
        self.config = config
        self.head_kind = head
        self.names = NAMES.bare() if head == "none" else NAMES
        self.task_type = "FEATURE_EXTRACTION" if head == "none" else "CAUSAL_LM"  # for HF PEFT
        self.embeddings = Embeddings(config)
        self.blocks = nn.ModuleList(Block(config, kind) for kind in config.layers)
        self.final_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
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
        c, device = self.config, input_ids.device
        position_ids, padding, cached = self.start(input_ids, attention_mask, position_ids, caches)
        x, position_ids = self.embeddings(input_ids, position_ids, start=cached == 0)
        T, S = x.size(1), cached + x.size(1)  # with the prompt
        f = frequencies(c.head_width, c.rope_theta, c.rope_scaling or {}, device)
        turn = rotation(position_ids, f, x.dtype)
        windows = {FULL: None, SLIDING: c.sliding_window}
        masks = {kind: block_mask(T, S, windows[kind], padding, device) for kind in {*c.layers}}
        for i, (block, kind) in enumerate(zip(self.blocks, c.layers, strict=True)):
            x = block(x, turn, *masks[kind], caches[i] if caches else None)
        return self.final_norm(x[:, T - input_ids.size(1) :])

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.config.model_type]

    def new_caches(self, batch: int, slots: int) -> list[Cache]:
        """Empty caches for `slots` tokens of each of `batch` rows."""
        c, like = self.config, self.final_norm.weight
        slots += self.embeddings.prompt.length
        return [Cache(batch, c.kv_heads, slots, c.head_width, like) for _ in self.blocks]

    def initialize(self, module: nn.Module) -> None:
        """Weights from N(0, initializer_range^2), biases 0, norms 1."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


NAMES = Names(
    {
        "embeddings.token": "model.embed_tokens",
        "blocks.{}": "model.layers.{}",
        "blocks.{}.attention_norm": "model.layers.{}.input_layernorm",
        "blocks.{}.attention": "model.layers.{}.self_attn",
        "blocks.{}.attention.query": "model.layers.{}.self_attn.q_proj",
        "blocks.{}.attention.key": "model.layers.{}.self_attn.k_proj",
        "blocks.{}.attention.value": "model.layers.{}.self_attn.v_proj",
        "blocks.{}.attention.output": "model.layers.{}.self_attn.o_proj",
        "blocks.{}.attention.query_norm": "model.layers.{}.self_attn.q_norm",
        "blocks.{}.attention.key_norm": "model.layers.{}.self_attn.k_norm",
        "blocks.{}.mlp_norm": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp": "model.layers.{}.mlp",
        "blocks.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
        "blocks.{}.mlp.up": "model.layers.{}.mlp.up_proj",
        "blocks.{}.mlp.down": "model.layers.{}.mlp.down_proj",
        "final_norm": "model.norm",
        "head": "lm_head",
    },
    prefix="model.",
    ignorable=[r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"],
)

# what transformers takes where a config.json does not say, beside LlamaConfig's own
QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
}
ABSENT: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}
HINTS = {  # of the fields that `read_settings` reads
    "rope_parameters": Mapping[str, float | str] | None,
    "use_sliding_window": bool,
    "max_window_layers": int,
}


def read_settings(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that config.json writes in another way: rotary positions, windows, tokens."""
    kind = raw["model_type"]
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    if "type" in rope:  # as it was called first
        rope.setdefault("rope_type", rope.pop("type"))
    settings: dict[str, Any] = {
        "rope_theta": rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
    }
    plain = rope.get("rope_type", "default") == "default"
    settings["rope_scaling"] = None if plain else rope
    if isinstance(raw.get("eos_token_id"), list):
        settings["eos_token_id"] = tuple(raw["eos_token_id"])
    if kind == "llama":
        settings["sliding_window"] = settings["layer_types"] = None
    elif kind == "mistral":
        settings["layer_types"] = None
    else:
        settings |= read_windows(raw)
    return settings


def read_windows(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen's: the blocks from `max_window_layers` on slide, where `use_sliding_window` says so."""
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    layers = raw.get("layer_types")
    if layers is None and window is not None:
        count = min(raw.get("num_hidden_layers", 32), MAX_LAYERS + 1)
        full = raw.get("max_window_layers", 28)
        layers = [FULL if i < full else SLIDING for i in range(count)]
    return {"sliding_window": window, "layer_types": None if layers is None else tuple(layers)}


def write_settings(model: Llama) -> dict[str, Any]:
    """The sizes that the config leaves open, and Qwen's way to say which blocks slide."""
    c = model.config
    written: dict[str, Any] = {"num_key_value_heads": c.kv_heads, "head_dim": c.head_width}
    if c.model_type in ("qwen2", "qwen3"):
        written["use_sliding_window"] = c.sliding_window is not None
        written["layer_types"] = list(c.layers)
    return written


# fields that a relative's config.json lacks: transformers takes one that has `layer_types` for
# another architecture than Mistral
LACKING = {
    "llama": ("sliding_window", "layer_types"),
    "mistral": ("layer_types", "attention_bias", "mlp_bias"),
    "qwen2": ("attention_bias", "mlp_bias"),
    "qwen3": ("mlp_bias",),
}


def _architecture(model_type: str, name: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        model=Llama,
        config=LlamaConfig,
        names=NAMES,
        heads={"causal-lm": f"{name}ForCausalLM", "none": f"{name}Model"},
        default="causal-lm",
        dropped={"none": ("head.",)},
        fixed={"partial_rotary_factor": 1.0},
        absent=ABSENT[model_type],
        hints=HINTS,
        read=read_settings,
        write=write_settings,
        lacking=LACKING[model_type],
    )


ARCHITECTURES = {
    kind: _architecture(kind, name)
    for kind, name in zip(FAMILY, ("Llama", "Mistral", "Qwen2", "Qwen3"), strict=True)
}
