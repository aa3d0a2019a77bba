"""Prefix tuning: K keys and values of their own before the real ones, in every layer.
Li and Liang 2021, https://arxiv.org/abs/2101.00190

    attention(q, [P_k; K], [P_v; V]) = c attention(q, P_k, P_v) + (1 - c) attention(q, K, V)
    c = sum exp(s q P_k^T) / (sum exp(s q P_k^T) + sum exp(s q K^T))

Two forms:
    "fixed"  the positions of real tokens stay, and every query of every layer sees the prefix
    "peft"   HF PEFT's: real tokens move on by K positions, and where attention is local the prefix
             counts in the window

2 L K D parameters, or with the reparametrising MLP, of which only what it computes is saved,

    P = tanh(E W_1^T + b_1) W_2^T + b_2        E (K, D), W_1 (I, D), W_2 (L 2 D, I)

Shapes:  K prefix length   L layers   H key/value heads   N head width   D = H N
         B batch   T queries   S real keys
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peft_lite import fields, saved
from peft_lite.method import Method, MethodSpec
from peft_lite.options import option
from peft_lite.select import nearest
from peft_lite.wrapper import Wrapper, dense_weight, innermost, named_layers, without_autocast

FORMS = ("fixed", "peft")


@dataclass(frozen=True)
class PrefixConfig:
    """Fields of HF PEFT's PrefixTuningConfig, and which of the two forms.

    Attributes:
        num_virtual_tokens: K.
        prefix_projection: train E and an MLP instead of the keys and values themselves.
        encoder_hidden_size: I, the MLP's inner width; None: D.
        form: "fixed" or "peft".
        modules_to_save: modules that train whole, as copies, and are saved with the prefix.
    """

    num_virtual_tokens: int = field(default=20, metadata=option("virtual_tokens", "length", int))
    prefix_projection: bool = False
    encoder_hidden_size: int | None = field(
        default=None,
        metadata=option("projection", "inner width of a reparametrising MLP", int, shown="none"),
    )
    form: str = field(
        default="fixed",
        metadata=option(
            "form",
            "positions of real tokens stay, or move on as in HF PEFT",
            str,
            choices=FORMS,
        ),
    )
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self) -> None:
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.encoder_hidden_size is not None:
            check_count("encoder_hidden_size", self.encoder_hidden_size)
        if not isinstance(self.prefix_projection, bool):
            value = self.prefix_projection
            raise ValueError(f"prefix_projection is {value!r}, must be true or false")
        if self.form not in FORMS:
            near = nearest(self.form, FORMS)
            raise ValueError(f"form is {self.form!r}, must be 'fixed' or 'peft'{near}")
        saved.check(self.modules_to_save)


def check_count(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} is {value!r}, must be a whole number of at least 1 (an int)")


class PrefixTable(nn.Module):
    """The keys and values of all layers as they are, (K, L 2 D) in the order of HF PEFT."""

    def __init__(self, K: int, layers: int, width: int, like: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.table = nn.Parameter(like.new_empty(K, layers * 2 * width).normal_(std=0.02))

    def forward(self) -> Tensor:
        return self.table

    def of_layer(self, i: int) -> Tensor:
        """(K, 2 D): keys, then values."""
        return self.table.unflatten(1, (self.layers, -1))[:, i]


class PrefixMLP(nn.Module):
    """The keys and values of all layers, computed by an MLP."""

    def __init__(self, K: int, layers: int, width: int, inner: int, like: Tensor) -> None:
        super().__init__()
        self.layers = layers
        self.embedding = nn.Parameter(like.new_empty(K, width).normal_())
        self.up = nn.Linear(width, inner, device=like.device, dtype=like.dtype)
        self.down = nn.Linear(inner, layers * 2 * width, device=like.device, dtype=like.dtype)

    def forward(self) -> Tensor:
        """P = tanh(E W_1^T + b_1) W_2^T + b_2, (K, L 2 D)"""
        P: Tensor = self.down(self.up(self.embedding).tanh())
        return P

    def of_layer(self, i: int) -> Tensor:
        """(K, 2 D): the rows of W_2 for one layer, no others."""
        w, b = (p.unflatten(0, (self.layers, -1))[i] for p in (self.down.weight, self.down.bias))
        return nn.functional.linear(self.up(self.embedding).tanh(), w, b)


class Prefix(Wrapper):
    """Layer i's keys and values, in the slot that its attention has for them.

    Args:
        window: how many keys a local layer sees, in the form that counts the prefix among them.
    """

    cannot_merge = "keys and values before the real ones do not change weights"
    whole_model = True

    def __init__(
        self, base: nn.Module, source: PrefixTable | PrefixMLP, i: int, N: int, window: int | None
    ) -> None:
        super().__init__(base)
        self.source, self.i, self.N, self.window = source, i, N, window

    def changed(
        self, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, bool]:
        """k, v (B, H, S, N) -> (B, H, K + S, N), and the mask with K columns more."""
        P = self.source.of_layer(self.i).to(k.dtype)  # (K, 2 D)
        P_k, P_v = P.unflatten(1, (2, -1, self.N)).permute(1, 2, 0, 3)  # (H, K, N) each
        k, v = (torch.cat([p.expand(len(x), -1, -1, -1), x], -2) for p, x in ((P_k, k), (P_v, v)))
        return k, v, self.mask(mask, causal, len(P), k.size(-2), k.device), False

    def mask(
        self, mask: Tensor | None, causal: bool, K: int, slots: int, device: torch.device
    ) -> Tensor | None:
        """(B or 1, 1, T, K + S): all see the prefix, or those within the window."""
        if mask is None and not causal and (self.window is None or slots <= self.window):
            return None
        S = slots - K
        if mask is None:  # a triangle, or one query that sees everything
            T = S if causal else 1
            mask = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]
        T = mask.size(-2)
        columns = torch.ones(T, K, dtype=torch.bool, device=device)
        if self.window is not None:  # query t stands at slot K + S - T + t
            t = torch.arange(slots - T, slots, device=device)[:, None]
            columns = torch.arange(K, device=device) > t - self.window
        return torch.cat([columns.expand(len(mask), 1, T, K), mask], -1)

    def tensors(self) -> dict[str, Tensor]:
        with without_autocast(next(self.source.parameters())):
            return {"prompt_embeddings": self.source().detach()}


class Shift(Wrapper):
    """Moves real tokens on by K positions, in the slot that the embeddings have for prompts."""

    cannot_merge = Prefix.cannot_merge
    length = 0

    def __init__(self, base: nn.Module, K: int) -> None:
        super().__init__(base)
        self.K = K

    @property
    def shift(self) -> int:
        return self.K if self.active else int(self.base.shift)  # type: ignore[arg-type]

    def changed(self, x: Tensor, position_ids: Tensor, start: bool) -> tuple[Tensor, Tensor]:
        return x, position_ids + self.K

    def tensors(self) -> dict[str, Tensor]:
        return {}


def build(model: nn.Module, config: PrefixConfig) -> Method:
    """A prefix for each attention that has a slot for one."""
    slots = slots_named(model, "prefix")
    modules = dict(named_layers(model))
    attentions = [modules[name.rpartition(".")[0]] for name in slots]
    key, N = attentions[0].key, int(attentions[0].head_width)  # type: ignore[arg-type]
    weight = dense_weight(innermost(key))  # type: ignore[arg-type]
    K, L, D = config.num_virtual_tokens, len(slots), len(weight)
    source: PrefixTable | PrefixMLP = PrefixTable(K, L, D, weight)
    if config.prefix_projection:
        source = PrefixMLP(K, L, D, config.encoder_hidden_size or D, weight)
    wrappers: dict[str, Wrapper] = {}
    for i, (name, attention) in enumerate(zip(slots, attentions, strict=True)):
        window = getattr(attention, "window", None) if config.form == "peft" else None
        wrappers[name] = Prefix(slots[name], source, i, N, window)
    if config.form == "peft":
        for name, slot in slots_named(model, "prompt").items():
            wrappers[name] = Shift(slot, K)
    return Method("prefix", config, saved.add(model, config.modules_to_save, wrappers))


def slots_named(model: nn.Module, end: str) -> dict[str, nn.Module]:
    """The empty slots of the model of this name, in the order of its layers."""
    slots = {name: m for name, m in named_layers(model) if name.split(".")[-1] == end}
    if not slots:
        raise ValueError(
            f"{type(model).__name__} has no slot for a {end}: this method needs a model of minigpt"
        )
    return slots


# P itself is saved, not the network that computed it
HARMLESS = {"encoder_hidden_size", "init_weights", "prefix_projection"}


def to_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """Its lines of `adapter_config.json`, with the shape of the model."""
    config = method.config
    layers = [w for w in method.wrappers.values() if isinstance(w, Prefix)]
    width = layers[0].tensors()["prompt_embeddings"].size(1) // (2 * len(layers))
    return {
        "peft_type": "PREFIX_TUNING" if config.form == "peft" else "PREFIX",
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": width,
        "num_layers": len(layers),
        "num_attention_heads": width // layers[0].N,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.encoder_hidden_size or width,
        "prefix_projection": False,
    }


def from_json(raw: Mapping[str, Any]) -> PrefixConfig:
    """The config; the form is that of the `peft_type`."""
    known = fields.read(raw, PrefixConfig, HARMLESS | set(fields.SHAPES))
    known = {name: value for name, value in known.items() if name not in HARMLESS}
    return PrefixConfig(**known, form="fixed" if raw["peft_type"] == "PREFIX" else "peft")


def from_options(given: dict[str, Any]) -> PrefixConfig:
    """The config of a command's options: an inner width asks for the MLP."""
    return PrefixConfig(**given, prefix_projection="encoder_hidden_size" in given)


METHOD = MethodSpec(
    "prefix",
    PrefixConfig,
    build,
    1e-2,
    ("PREFIX_TUNING", "PREFIX"),
    to_json,
    from_json,
    from_options,
)
