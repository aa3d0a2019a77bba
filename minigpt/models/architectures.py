"""The architectures there is code for, and `config.json` in and out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from minigpt.models import bert, gpt_neo
from minigpt.models.bert import Bert, BertConfig
from minigpt.models.config import nearest
from minigpt.models.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.models.names import Names

Model = GPTNeo | Bert
Config = GPTNeoConfig | BertConfig


@dataclass(frozen=True)
class Architecture:
    """What a checkpoint of one `model_type` is made of.

    Attributes:
        model, config: the native classes.
        names: the table of tensor names.
        titles: head -> Hugging Face's class name, for `architectures` in config.json.
        signs: head -> beginning of the tensor names that only a checkpoint with that head has.
        default: the head of a checkpoint without any sign.
        dropped: head -> beginnings of native names that a checkpoint may have and that model lacks.
        fixed: config fields that change the mathematics, with the only value there is code for.
    """

    model: type[GPTNeo] | type[Bert]
    config: type[GPTNeoConfig] | type[BertConfig]
    names: Names
    titles: Mapping[str, str]
    signs: Mapping[str, str]
    default: str
    dropped: Mapping[str, tuple[str, ...]]
    fixed: Mapping[str, Any]


ARCHITECTURES = {
    "gpt_neo": Architecture(
        model=GPTNeo,
        config=GPTNeoConfig,
        names=gpt_neo.NAMES,
        titles={"causal-lm": "GPTNeoForCausalLM", "none": "GPTNeoModel"},
        signs={},
        default="causal-lm",
        dropped={"causal-lm": (), "none": ("head.",)},
        fixed={},
    ),
    "bert": Architecture(
        model=Bert,
        config=BertConfig,
        names=bert.NAMES,
        titles={
            "masked-lm": "BertForMaskedLM",
            "classification": "BertForSequenceClassification",
            "none": "BertModel",
        },
        signs={"classification": "classifier.", "masked-lm": "cls.predictions."},
        default="none",
        dropped={
            "masked-lm": ("pooler.", "head.classifier."),
            "classification": ("head.",),
            "none": ("head.",),
        },
        fixed={
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        },
    ),
}


def build(architecture: Architecture, config: Any, head: str, num_labels: int = 2) -> Model:
    """A freshly initialised model.  Raises ValueError for a head that it cannot have."""
    heads = architecture.model.heads
    if head not in heads:
        raise ValueError(
            f"head {head!r}: {architecture.model.__name__} has {', '.join(heads)}"
            f"{nearest(head, heads)}"
        )
    if architecture.model is Bert:
        return Bert(config, head, num_labels)
    return GPTNeo(config, head)


class _NoDraws(TorchFunctionMode):
    """Leaves out the drawing of random numbers, which on the meta device would draw nothing but
    import a compiler first, more than a second's work.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def outline(architecture: Architecture, config: Any, head: str, num_labels: int = 2) -> Model:
    """A model on the meta device: names and shapes without values."""
    with torch.device("meta"), _NoDraws():
        return build(architecture, config, head, num_labels)


def architecture_of(model: Model) -> tuple[str, Architecture, str, int]:
    """A model's `model_type`, architecture, head and number of classes."""
    kind = "bert" if isinstance(model, Bert) else "gpt_neo"
    classifier = getattr(model.head, "classifier", None)
    if isinstance(model.head, nn.Identity):
        head = "none"
    elif kind == "gpt_neo":
        head = "causal-lm"
    else:
        head = "masked-lm" if classifier is None else "classification"
    return kind, ARCHITECTURES[kind], head, getattr(classifier, "out_features", 2)


def read_config(directory: Path) -> tuple[Architecture, Config, str]:
    """Architecture, settings and the head that a checkpoint's config.json names.

    Raises:
        ValueError: no such file, or one that asks for what there is no code for.
    """
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no config.json in {directory}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type {kind!r} is unknown, must be one of {', '.join(ARCHITECTURES)}"
            f"{nearest(str(kind), ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    for field, value in architecture.fixed.items():
        if raw.get(field, value) != value:
            raise ValueError(f"{path}: {field} {raw[field]!r} is not supported, only {value!r}")
    known = {f.name for f in fields(architecture.config)}
    settings = {name: value for name, value in raw.items() if name in known}
    try:
        if "attention_types" in raw:  # [[["global", "local"], 6]]: a pattern and how many times
            types = raw["attention_types"]
            settings["attention_layers"] = [k for kinds, times in types for k in kinds * times]
        if settings.get("attention_layers") is not None:
            settings["attention_layers"] = tuple(settings["attention_layers"])
        config = architecture.config(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    named = raw.get("architectures") or []
    head = next((h for h, t in architecture.titles.items() if t in named), architecture.default)
    return architecture, config, head


def classes_named(directory: Path) -> int:
    """Number of classes that a checkpoint's config.json names, else 2."""
    raw = json.loads((directory / "config.json").read_text())
    return int(raw.get("num_labels") or len(raw.get("id2label") or (0, 1)))


def config_json(model: Model) -> dict[str, Any]:
    """The settings of a model as Hugging Face's config.json has them."""
    kind, architecture, head, classes = architecture_of(model)
    settings = asdict(model.config)
    if isinstance(model.config, GPTNeoConfig):
        settings["attention_layers"] = list(model.config.layers)
        settings["attention_types"] = [[[layer], 1] for layer in model.config.layers]
    settings |= {"model_type": kind, "architectures": [architecture.titles[head]]}
    logits = getattr(model.head, "decoder", model.head)
    if isinstance(logits, nn.Linear) and logits.weight is not model.embeddings.token.weight:
        settings["tie_word_embeddings"] = False  # a folded adapter untied them
    settings["torch_dtype"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    names = settings.pop("id2label", None) or {}
    if head == "classification":
        if len(names) != classes:  # of another head, or none were given
            names = {str(i): f"LABEL_{i}" for i in range(classes)}
        settings["id2label"] = names
        settings["label2id"] = {name: int(i) for i, name in names.items()}
    return settings
