"""What a model offers to its callers, and what an architecture's file says of it at its end.

A new architecture is one file: its config, its model, and `ARCHITECTURE`, which holds the tensor
names, the heads and `config.json` in and out; plus one line in minigpt/models/architectures.py.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minigpt.models.attention import Cache, positions
from minigpt.models.config import nearest, short
from minigpt.models.names import Names

MAX_LABELS = 2**20


class Config(Protocol):
    """What every architecture's config has."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


class Model(nn.Module):
    """The attributes and methods that every architecture's model has.

    Attributes:
        config: shapes and constants.
        names: native names to the checkpoint's, for the head it has.
        head_kind: "causal-lm", "masked-lm", "classification" or "none".
        head: states to logits; nn.Identity for "none".
        num_labels: number of classes of a classification head; 0 where there is no such head.
        task_type: HF PEFT's name for what the head does.
        name_or_path: the folder or hub id it was loaded from, None where it was built.
        fresh: names of the parameters that its checkpoint lacks.
        embeddings: the embedding tables; `embeddings.token` is that of the vocabulary.
        blocks: the layers of the body, in order.
    """

    config: Config
    names: Names
    head_kind: str
    head: nn.Module
    num_labels: int = 0
    task_type: str
    name_or_path: str | None = None
    fresh: frozenset[str] = frozenset()
    embeddings: Any
    blocks: nn.ModuleList

    @property
    def architecture(self) -> "Architecture":
        """The description at the end of the model's file."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int:
        """Number of positions for tokens."""
        return self.config.max_position_embeddings - int(self.embeddings.prompt.shift)

    @property
    def unembedding(self) -> nn.Linear | None:
        """The layer that gives logits over the vocabulary; None where the head has none."""
        raise NotImplementedError

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Token ids (B, T) -> the states (B, T, D) that the head reads."""
        raise NotImplementedError

    def tie(self) -> None:
        """Makes the head's weight the token embedding's, one parameter under two names, where the
        config ties them.
        """
        if self.config.tie_word_embeddings and self.unembedding is not None:
            self.unembedding.weight = self.embeddings.token.weight

    def initialize(self, module: nn.Module) -> None:
        """Gives the parameters of one module their first values."""
        raise NotImplementedError


class Decoder(Model):
    """A model that generates: each state depends on the tokens before it, and caches hold them."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """`attention_mask` (B, T): 0 for padding, or the numbers of packed rows, as in
        minigpt/data/packing.py.  `position_ids` (B or 1, T): 0, 1, 2, ... unless given.
        -> logits (B, T, V), or states (B, T, D) without a head
        """
        logits: Tensor = self.head(self.hidden(input_ids, attention_mask, position_ids))
        return logits

    @property
    def unembedding(self) -> nn.Linear | None:
        """The head, for "causal-lm"."""
        return self.head if isinstance(self.head, nn.Linear) else None

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        caches: list[Cache] | None = None,
    ) -> Tensor:
        """Token ids (B, T) -> the states (B, T, D) that the head reads.

        With `caches` the T tokens follow those cached: S = cached + T, and `attention_mask` is
        (B, S).
        """
        raise NotImplementedError

    def start(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        caches: list[Cache] | None,
    ) -> tuple[Tensor, Tensor | None, int]:
        """What a forward pass begins with: the positions of the tokens, (B or 1, T), the mask with
        the columns of a prompt, and the number of slots cached.
        """
        prompt = self.embeddings.prompt
        cached = caches[0].length if caches else 0
        T = input_ids.size(1)
        S = T + (cached - prompt.length if cached else 0)
        if position_ids is None:
            position_ids = positions(T, S, self.max_tokens, input_ids.device)
        if attention_mask is not None:
            if prompt.shift and int(attention_mask.max()) > 1:
                raise ValueError(
                    "packed rows have no prompt each, and no positions after it: with a prompt, or "
                    "a prefix that moves positions, a window holds one row (--no-packing)"
                )
            attention_mask = F.pad(attention_mask, (prompt.length, 0), value=1)
        return position_ids, attention_mask, cached

    def new_caches(self, batch: int, slots: int) -> list[Cache]:
        """Empty caches, one a block, for `slots` tokens of each of `batch` rows."""
        raise NotImplementedError


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint of one `model_type` is made of.

    Attributes:
        model_type: the architecture's name in config.json.
        model, config: the native classes.  `model(config, head)` builds a model; one that has a
            classification head takes the number of classes as a third argument.
        names: the table of tensor names.
        heads: head -> Hugging Face's class name, for `architectures` in config.json.
        also: other classes there, with several heads -> the head of theirs there is code for.
        default: the head of a checkpoint that shows no other.
        signs: head -> beginning of the tensor names that only a checkpoint with that head has.
        dropped: head -> beginnings of native names that a checkpoint may have and the model lacks.
        fresh: beginnings of native names that a checkpoint may lack as a whole, each with those
            before it, which read it.
        copies: checkpoint name -> second name of the same tensor where embeddings are not tied.
        fixed: fields of config.json that change the mathematics, with the only value supported.
        absent: config fields whose default in transformers is not ours -> its default, which a
            config.json without the field means.
        aliases: second names that a field of config.json may have.
        hints: types of the fields that `read` reads.
        read: content of config.json -> config fields that are written in another form there.
        write: model -> fields of config.json in that form.
        lacking: config fields that config.json does not have.
        unpack: a checkpoint's tensors -> the same, each that of one layer, as (out, in).
        pack: the inverse of `unpack`.
    """

    model_type: str
    model: type[Any]
    config: type[Any]
    names: Names
    heads: Mapping[str, str]
    default: str
    also: Mapping[str, str] = field(default_factory=dict)
    signs: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fresh: tuple[str, ...] = ("head.",)
    copies: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, Any] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    write: Callable[[Any], dict[str, Any]] = _nothing
    lacking: tuple[str, ...] = ()
    unpack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    pack: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict

    def build(self, config: Config, head: str, num_labels: int = 2) -> Model:
        """A freshly initialised model.  Raises ValueError for a head that it cannot have."""
        if head not in self.heads:
            raise ValueError(
                f"head {head!r}: {self.model.__name__} has {', '.join(self.heads)}"
                f"{nearest(head, self.heads)}"
            )
        if head == "classification":
            if not 1 <= num_labels <= MAX_LABELS:
                raise ValueError(f"num_labels is {short(num_labels)}, must be 1 to {MAX_LABELS:,}")
            return self.model(config, head, num_labels)
        return self.model(config, head)

    def outline(self, config: Config, head: str, num_labels: int = 2) -> Model:
        """A model on the meta device: names and shapes without values."""
        with without_values():
            return self.build(config, head, num_labels)

    def config_from(self, raw: Mapping[str, Any]) -> Config:
        """The content of config.json -> the config; other models' fields are left out.

        Raises:
            ValueError: it asks for what is not supported, or a value makes no sense.
        """
        for name, value in self.fixed.items():
            if raw.get(name, value) != value:
                raise ValueError(f"{name} {short(raw[name])} is not supported, only {value!r}")
        known = {f.name for f in fields(self.config)}
        settings = {name: value for name, value in raw.items() if name in known}
        for alias, name in self.aliases.items():
            if alias in raw and settings.setdefault(name, raw[alias]) != raw[alias]:
                raise ValueError(f"{alias} {raw[alias]} contradicts {name} {settings[name]}")
        try:
            return self.config(**{**self.absent, **settings, **self.read(raw)})
        except TypeError as error:
            raise ValueError(str(error)) from None

    def head_from(self, raw: Mapping[str, Any]) -> str:
        """The head that the content of config.json names, else the default."""
        named = raw.get("architectures") or []
        heads = {name: head for head, name in self.heads.items()} | dict(self.also)
        return next((heads[name] for name in named if name in heads), self.default)

    def other_class(self, raw: Mapping[str, Any]) -> str | None:
        """The class that config.json names, where there is no code for its head."""
        named = raw.get("architectures") or []
        return None if {*named} & {*self.heads.values(), *self.also} else next(iter(named), None)


def num_labels_from(raw: Mapping[str, Any]) -> int:
    """The number of classes that the content of config.json names, else 2."""
    number = raw.get("num_labels")
    return len(raw.get("id2label") or (0, 1)) if number is None else number


def config_json(model: Model) -> dict[str, Any]:
    """The settings of a model as Hugging Face's config.json has them."""
    architecture = model.architecture
    settings = asdict(model.config)  # type: ignore[call-overload]
    settings = {n: value for n, value in settings.items() if n not in architecture.lacking}
    settings |= {
        "model_type": architecture.model_type,
        "architectures": [architecture.heads[model.head_kind]],
    }
    layer = model.unembedding
    if layer is not None and layer.weight is not model.embeddings.token.weight:
        settings["tie_word_embeddings"] = False  # a folded adapter untied them
    settings["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    names = settings.pop("id2label", None) or {}
    if model.head_kind == "classification":
        if len(names) != model.num_labels:  # of another head, or none were given
            names = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        settings["id2label"] = names
        settings["label2id"] = {name: int(i) for i, name in names.items()}
    return settings | architecture.write(model)


@contextmanager
def without_values() -> Iterator[None]:
    """New parameters have a name and a shape but no values: they lie on the meta device."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Skips the drawing of random numbers: on the meta device it would draw nothing, but import a
    compiler first, which takes more than a second.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))
