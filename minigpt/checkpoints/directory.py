"""Hugging Face checkpoints in and out of the native models.

Loading is strict: every tensor of a checkpoint has a place in the model or is known to carry no
weight, and every parameter of the model gets a tensor or belongs to a head that the checkpoint
lacks.  Anything else is an error that names the tensors.
"""

import logging
from collections.abc import Iterable, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from minigpt.checkpoints import four_bits
from minigpt.checkpoints.config import read_config
from minigpt.checkpoints.source import find, is_local, read_tensors
from minigpt.models.architecture import (
    Architecture,
    Decoder,
    Model,
    config_json,
    num_labels_from,
)
from minigpt.models.names import Names
from minigpt_kernels import nf4
from minigpt_kernels.nf4 import Quantized
from peft_lite import storage
from peft_lite.json_files import printable
from peft_lite.quantized import QuantizedLinear, is_quantized, quantizable, replace

logger = logging.getLogger("minigpt")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@overload
def load(
    source: str | Path,
    head: Literal["causal-lm"],
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> Decoder: ...
@overload
def load(
    source: str | Path,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> Model: ...
def load(
    source: str | Path,
    head: str | None = None,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    quantize: str | None = None,
) -> Model:
    """The native model of a Hugging Face checkpoint, in evaluation mode.

    Args:
        source: a directory, the id of a model on the hub, "bundled" or "bundled-bert".
        head: "causal-lm", "masked-lm", "classification" or "none"; None: what the checkpoint has.
            A head that the checkpoint lacks is freshly initialised, and a warning says so.
        num_labels: classes of a classification head; None: what the checkpoint has, else 2.
        dtype: of all weights that are not in 4 bits.
        quantize: "nf4" puts the linear layers but the head into 4 bits, each as it is read, so that
            no more than one is dense at a time.  A checkpoint of 4 bits stays so without it.

    Raises:
        ValueError: no such directory or hub id, an unknown architecture or setting, a broken file,
            or tensors that are missing, unexpected or of another shape.
    """
    directory = find(source)
    architecture, config, raw = read_config(directory)
    one_by_one = quantize is not None or "quantization_config" in raw
    tensors: dict[str, Any] = read_tensors(directory, apart=one_by_one)
    names = architecture.names
    try:
        four_bits.check(raw)
        four_bits.gather(tensors)
        if architecture.names.joined and any(isinstance(t, Quantized) for t in tensors.values()):
            raise ValueError(f"weights of {architecture.model_type} in 4 bits are not supported")
        tensors = _rename(architecture.unpack(tensors), names)
        if architecture.other_class(raw):
            tensors = {n: t for n, t in tensors.items() if n.startswith(names.prefix)}
            head = head or "none"
        head = head or _head_of(tensors, architecture)
        classifier_name = names.to_hf("head.classifier.weight")
        classifier = tensors.get(classifier_name)
        classes = None if classifier is None else classifier.shape[:1].numel()
        if num_labels is None:
            num_labels = 2 if classes is None else classes
        elif classes not in (None, num_labels):
            # another task's classifier: a fresh one takes its place
            layer = classifier_name.removesuffix("weight")
            tensors = {n: t for n, t in tensors.items() if not n.startswith(layer)}
        model = architecture.outline(config, head, num_labels)
        state = _match(model, tensors, architecture, head)
        del tensors
        packed = _pack(model, state, quantize, dtype, device)
        state = {name: t.to(device=device, dtype=dtype) for name, t in state.items()}
        _check_finite(state, names)
        model.load_state_dict(state, strict=False, assign=True)
        model.tie()
        _check_tied(model, state, names)
        fresh = _missing(model, {*state, *packed}, architecture)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    model.name_or_path = str(directory.resolve() if is_local(source) else source)
    model.fresh = frozenset(fresh)
    if fresh:
        _initialize(model, dtype, torch.device(device))
        logger.warning(
            "%s lacks %s: freshly initialised, to be trained", directory, ", ".join(fresh)
        )
    return model.eval()


def outline(source: str | Path, head: str | None = None) -> Model:
    """The model of a checkpoint without values, on the meta device: only config.json is read.

    Raises:
        ValueError: as `load`, as far as config.json tells; None is the head that it names.
    """
    directory = find(source, weights=False)
    architecture, config, raw = read_config(directory)
    try:
        head = head or architecture.head_from(raw)
        model = architecture.outline(config, head, num_labels_from(raw))
        if raw.get("quantization_config"):
            layers = {model.names.to_hf(name): name for name in quantizable(model, "nf4")}
            packed, double = four_bits.described(raw, layers)
            for name in packed:
                weight = model.get_submodule(layers[name]).get_parameter("weight")
                replace(model, layers[name], nf4.outline(weight.shape, weight.dtype, double=double))
        return model
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def save(model: Model, directory: str | Path) -> None:
    """Writes `config.json` and `model.safetensors` so that `transformers` opens them.

    Raises:
        ValueError: the model holds tensors that its architecture does not (an adapter, say).
    """
    architecture = model.architecture
    plain = architecture.outline(model.config, model.head_kind, model.num_labels).state_dict()
    packed = {name: m for name, m in model.named_modules() if is_quantized(m)}
    if packed and architecture.names.joined:
        raise ValueError(f"{architecture.model_type} has no file format for weights of 4 bits")
    parts = {f"{name}.{part}" for name, m in packed.items() for part in m._buffers}
    state = model.state_dict().keys() - parts
    if foreign := state ^ plain.keys():
        raise ValueError(
            f"cannot save: {_some(foreign)} make this no plain {architecture.model_type} model; "
            "fold or detach what was attached first"
        )
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():  # a tied one once: transformers ties it again
        tensors[model.names.to_hf(name)] = p.detach().contiguous()
    settings = config_json(model)
    if packed:
        for name, layer in packed.items():
            tensors |= four_bits.scatter(model.names.to_hf(f"{name}.weight"), layer.quantized)
        settings["quantization_config"] = _quantization_config(model, packed)
    if not settings["tie_word_embeddings"]:
        for name, second in architecture.copies.items():
            if name in tensors:
                tensors[second] = tensors[name].clone()
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    storage.write_tensors(folder / "model.safetensors", architecture.pack(tensors))
    storage.write_json(folder / "config.json", settings)


def _quantization_config(model: Model, packed: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    first = next(iter(packed.values()))
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    dense = sorted(model.names.to_hf(name) for name in linear - packed.keys())
    double = first.scales_of_scales is not None
    return four_bits.quantization_config(double, first.dense_dtype, dense)


def _rename(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """The tensors under today's full checkpoint names, without those that hold no weight."""
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
        if name in renamed and not _equal(renamed[name], tensor):
            raise ValueError(f"two different tensors of the checkpoint are both {printable(name)}")
        renamed[name] = tensor
    return renamed


def _equal(a: Tensor | Quantized, b: Tensor | Quantized) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)


def _head_of(tensors: Iterable[str], architecture: Architecture) -> str:
    for head, sign in architecture.signs.items():
        if any(name.startswith(sign) for name in tensors):
            return head
    return architecture.default


def _match(
    model: Model, tensors: Mapping[str, Tensor], architecture: Architecture, head: str
) -> dict[str, Tensor]:
    """The checkpoint's tensors under native names, each of the shape of its place."""
    places = model.state_dict()
    names = architecture.names
    state: dict[str, Tensor] = {}
    unexpected = []
    for hf, tensor in tensors.items():
        name = names.from_hf(hf)
        if name in places:
            if tensor.dtype not in DTYPES:
                allowed = ", ".join(map(str, DTYPES))
                raise ValueError(f"{hf} is {tensor.dtype}, must be one of {allowed}")
            if tensor.shape != places[name].shape:
                want = list(places[name].shape)
                raise ValueError(f"{hf} is {list(tensor.shape)}, the config wants {want}")
            state[name] = tensor
        elif not name.startswith(architecture.dropped.get(head, ())):
            unexpected.append(hf)
    if unexpected:
        raise ValueError(f"{len(unexpected)} tensors have no place: {_some(unexpected)}")
    return state


def _pack(
    model: Model,
    state: dict[str, Any],
    codec: str | None,
    dtype: torch.dtype,
    device: str | torch.device,
) -> list[str]:
    """Takes the weights that are or shall be in 4 bits out of `state`, one after the other, and
    puts layers that hold them into the model.  Returns their names.
    """
    chosen = set() if codec is None else {f"{n}.weight" for n in quantizable(model, codec)}
    packed = [name for name, t in state.items() if name in chosen or isinstance(t, Quantized)]
    for name in packed:
        weight, layer = state.pop(name), name.removesuffix(".weight")
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise ValueError(f"{model.names.to_hf(name)} is in 4 bits, and no linear layer")
        if isinstance(weight, Tensor):
            single = weight.float() if weight.dtype == torch.float64 else weight
            try:
                weight = nf4.quantize(single.to(device))
            except ValueError as error:
                raise ValueError(f"{model.names.to_hf(name)}: {error}") from None
        replace(model, layer, weight.to(device, dtype))
    return packed


def _check_finite(state: Mapping[str, Tensor], names: Names) -> None:
    """One pass that keeps nothing: 0.04 s for 500 MB, where isfinite().all() takes seconds."""
    for name, tensor in state.items():
        if not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{names.to_hf(name)} holds what is no finite {tensor.dtype}")


def _check_tied(model: Model, state: Mapping[str, Tensor], names: Names) -> None:
    for name, p in model.named_parameters(remove_duplicate=False):
        given = state.get(name)
        if given is not None and given.data_ptr() != p.data_ptr() and not torch.equal(given, p):
            raise ValueError(f"{names.to_hf(name)} differs from the weight it is tied to")


def _missing(model: Model, state: Iterable[str], architecture: Architecture) -> list[str]:
    """Native names that got no tensor: none, or those of a whole head."""
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    absent = tuple(
        takewhile(lambda part: not any(n.startswith(part) for n in state), architecture.fresh)
    )
    lost = [architecture.names.to_hf(name) for name in missing if not name.startswith(absent)]
    if lost:
        raise ValueError(f"{len(lost)} tensors are missing: {_some(lost)}")
    return missing


def _initialize(model: Model, dtype: torch.dtype, device: torch.device) -> None:
    """Initialises the parameters that are still on the meta device."""
    for module in model.modules():
        parameters = dict(module.named_parameters(recurse=False))
        fresh = {name for name, p in parameters.items() if p.is_meta}
        if not fresh:
            continue
        for name, p in parameters.items():
            empty = torch.empty(p.shape, dtype=dtype, device=device)
            setattr(module, name, nn.Parameter(empty))
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        else:
            model.initialize(module)
        for name in parameters.keys() - fresh:  # a tied weight beside a fresh bias stays
            setattr(module, name, parameters[name])


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    shown = [printable(name) for name in sorted(names)]
    return ", ".join(shown[:4]) + (", ..." if len(shown) > 4 else "")
