"""Hugging Face checkpoints in and out of the native models.

A checkpoint is a directory with `config.json` and its tensors in `model.safetensors`, in shards
with an index, or in an older `pytorch_model.bin`.  Every tensor finds its place or is known to
carry no weight; every place finds its tensor, or belongs to a head that the checkpoint lacks.
Anything else is an error that names the tensors.  Only plain tensors are ever unpickled.
"""

import json
import logging
import pickle
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minigpt import bert, gpt_neo
from minigpt.bert import Bert, BertConfig
from minigpt.config import nearest
from minigpt.gpt_neo import GPTNeo, GPTNeoConfig
from minigpt.names import Names
from minigpt.snapshot import publish

logger = logging.getLogger("minigpt")

Model = GPTNeo | Bert

BUNDLED = Path(__file__).parent / "assets" / "gpt-neo-tales"


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


def load(
    source: str | Path,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Model:
    """The native model of a Hugging Face checkpoint, in evaluation mode.

    Args:
        source: a directory, the id of a model on the hub, or "bundled".
        head: "causal-lm", "masked-lm", "classification" or "none"; None: what the checkpoint has.
            A head that the checkpoint lacks is freshly initialised, and a warning says so.
        num_labels: classes of a classification head; None: what the checkpoint has, else 2.

    Raises:
        ValueError: no such directory or hub id, an unknown architecture or setting, a broken file,
            or tensors that are missing, unexpected or of another shape.
    """
    directory = find(source)
    architecture, settings = read_config(directory)
    tensors = _rename(_read_tensors(directory), architecture)
    head = head or _head_of(tensors, architecture)
    labels = _labels(tensors, num_labels)
    with torch.device("meta"):
        model = build(architecture, settings, head, labels)
    if num_labels is not None and head == "classification":
        _drop_other_classifier(tensors, num_labels)
    _place(model, tensors, architecture, head, directory, dtype, torch.device(device))
    return model.eval()


def save(model: Model, directory: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` so that `transformers` opens them.

    Raises:
        ValueError: the model holds tensors that its architecture does not (an adapter, say).
    """
    kind, head = next(
        (kind, head)
        for kind, a in ARCHITECTURES.items()
        if type(model) is a.model
        for head in a.titles
        if head == head_of(model)
    )
    architecture = ARCHITECTURES[kind]
    with torch.device("meta"):
        expected = set(build(architecture, model.config, head, _classes(model)).state_dict())
    state = model.state_dict()
    if state.keys() != expected:
        raise ValueError(
            f"cannot save: {', '.join(sorted(state.keys() ^ expected)[:4])} make this no plain "
            f"{kind} model; merge or detach what was attached first"
        )
    settings = {k: v for k, v in asdict(model.config).items() if v is not None}
    if isinstance(model.config, GPTNeoConfig):
        settings["attention_layers"] = list(model.config.layers)
        settings["attention_types"] = [[[kind], 1] for kind in model.config.layers]
    settings |= {"model_type": kind, "architectures": [architecture.titles[head]]}
    settings["torch_dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    if head == "classification":
        settings["num_labels"] = _classes(model)
        settings["id2label"] = {str(i): f"LABEL_{i}" for i in range(_classes(model))}
        settings["label2id"] = {f"LABEL_{i}": i for i in range(_classes(model))}

    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:
            continue  # tied: transformers ties it again
        seen.add(tensor.data_ptr())
        tensors[model.names.to_hf(name)] = tensor.contiguous()

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.safetensors.partial"
    save_file(tensors, partial, metadata={"format": "pt"})
    publish(partial, folder / "model.safetensors")
    partial = folder / "config.json.partial"
    partial.write_text(json.dumps(settings, indent=2) + "\n")
    publish(partial, folder / "config.json")


def find(source: str | Path) -> Path:
    """The directory itself, that of the bundled model for "bundled", or a local copy of the hub's
    files for that id.
    """
    path = BUNDLED if source == "bundled" else Path(source)
    if path.is_dir():
        return path
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(source)) or path.exists():
        raise ValueError(f"no such model directory: {source}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    files = ["*.json", "*.safetensors", "vocab.txt", "merges.txt"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=files))
        if not list(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*files, "*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{source} is neither a directory nor a model the hub gives: {reason}"
        ) from None
    return found


def read_config(directory: Path) -> tuple[Architecture, Any]:
    """The architecture of a checkpoint and its settings; ValueError for what has no code."""
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
    if "attention_types" in raw:  # [[["global", "local"], 6]]: the pattern, how many times
        pattern = [kind for kinds, times in raw["attention_types"] for kind in kinds * times]
        settings["attention_layers"] = pattern
    if "attention_layers" in settings:
        settings["attention_layers"] = tuple(settings["attention_layers"])
    try:
        config = architecture.config(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return architecture, config


def build(architecture: Architecture, config: Any, head: str, num_labels: int) -> Model:
    """A freshly initialised model.  Raises ValueError for a head that it cannot have."""
    heads = architecture.model.heads
    if head not in heads:
        raise ValueError(
            f"head {head!r}: {architecture.model.__name__} has {', '.join(heads)}"
            f"{nearest(head, heads)}"
        )
    if head == "classification":
        return Bert(config, head, num_labels)
    return architecture.model(config, head)


def head_named(directory: Path, architecture: Architecture) -> str:
    """The head that config.json names under `architectures`, else the default one."""
    named = json.loads((directory / "config.json").read_text()).get("architectures") or []
    return next((h for h, t in architecture.titles.items() if t in named), architecture.default)


def head_of(model: Model) -> str:
    """Which head a model has."""
    if isinstance(model.head, nn.Identity):
        return "none"
    if isinstance(model, GPTNeo):
        return "causal-lm"
    return "classification" if hasattr(model.head, "classifier") else "masked-lm"


def _classes(model: Model) -> int:
    return getattr(getattr(model.head, "classifier", None), "out_features", 2)


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint under the names of its files."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = directory / f"{single}.index.json"
        if (directory / single).exists():
            return _read_file(directory / single)
        if index.exists():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, OSError) as error:
                raise ValueError(f"cannot read {index}: {error!r}") from None
            tensors: dict[str, Tensor] = {}
            for shard in shards:
                if Path(shard).name != shard:
                    raise ValueError(f"{index}: shard {shard!r} lies outside the directory")
                tensors |= _read_file(directory / shard)
            return tensors
    raise ValueError(
        f"no weights in {directory}: want model.safetensors or pytorch_model.bin, or their index"
    )


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except (SafetensorError, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot read {path}: truncated or damaged? ({reason})") from None


def _rename(tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Today's full checkpoint names, without what carries no weight."""
    names = architecture.names
    bare = not any(name.startswith(names.prefix) for name in tensors)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in names.renamed.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if bare and names.from_hf(name) == name:
            name = names.prefix + name
        if names.is_ignorable(name):
            continue
        if name in renamed and not torch.equal(renamed[name], tensor):
            raise ValueError(f"two different tensors of the checkpoint are both {name}")
        renamed[name] = tensor
    return renamed


def _head_of(tensors: Mapping[str, Tensor], architecture: Architecture) -> str:
    for head, sign in architecture.signs.items():
        if any(name.startswith(sign) for name in tensors):
            return head
    return architecture.default


def _labels(tensors: Mapping[str, Tensor], num_labels: int | None) -> int:
    if num_labels is not None:
        if num_labels < 1:
            raise ValueError(f"num_labels is {num_labels}, must be at least 1")
        return num_labels
    weight = tensors.get("classifier.weight")
    return 2 if weight is None else len(weight)


def _drop_other_classifier(tensors: dict[str, Tensor], num_labels: int) -> None:
    """A classifier of another number of classes is another task's: a fresh one takes its place."""
    weight = tensors.get("classifier.weight")
    if weight is not None and len(weight) != num_labels:
        del tensors["classifier.weight"]
        tensors.pop("classifier.bias", None)


def _place(
    model: Model,
    tensors: Mapping[str, Tensor],
    architecture: Architecture,
    head: str,
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Puts each tensor where it belongs in a model on the meta device, in place of nothing."""
    places = dict(model.state_dict())
    names = architecture.names
    found = {names.from_hf(name): tensor for name, tensor in tensors.items()}
    dropped = architecture.dropped[head]
    unexpected = [n for n in found if n not in places and not n.startswith(dropped or ("\0",))]
    if unexpected:
        known = ", ".join(names.to_hf(n) for n in unexpected[:4])
        raise ValueError(f"{directory}: {len(unexpected)} tensors have no place: {known}")
    state: dict[str, Tensor] = {}
    for name in places.keys() & found.keys():
        tensor, place = found[name], places[name]
        if tensor.shape != place.shape:
            raise ValueError(
                f"{directory}: {names.to_hf(name)} is {list(tensor.shape)}, "
                f"the config wants {list(place.shape)}"
            )
        state[name] = tensor.to(device=device, dtype=dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie()
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in state and not torch.equal(p, state[name]):
            raise ValueError(
                f"{directory}: {names.to_hf(name)} differs from the weight it is tied to"
            )
    fresh = [n for n, p in model.named_parameters() if p.is_meta]
    whole = tuple(
        part for part in ("head.", "pooler.") if not any(n.startswith(part) for n in state)
    )
    missing = [n for n in fresh if not n.startswith(whole or ("\0",))]
    if missing:
        known = ", ".join(names.to_hf(n) for n in missing[:4])
        raise ValueError(f"{directory}: {len(missing)} tensors are missing: {known}")
    if fresh:
        _initialize(model, dtype, device)
        logger.warning(
            "%s lacks %s: freshly initialised, to be trained", directory, ", ".join(fresh)
        )


def _initialize(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    """Gives fresh values to what is still on the meta device."""
    for module in model.modules():
        fresh = [n for n, p in module.named_parameters(recurse=False) if p.is_meta]
        for name in fresh:
            place = getattr(module, name)
            empty = torch.empty(place.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty))
        if fresh and isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif fresh:
            model.initialize(module)
