"""Methods on disk, in HF PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor of a layer is named `base_model.model.` + the layer's checkpoint name + an ending of the
method (`.lora_A.weight`, `.ia3_l`, ...).  Each method's file writes and reads its own lines of the
config; a setting that changes the mathematics and is not supported is an error.  Methods that PEFT
does not have are stored in the same way under a `peft_type` of their own.

Beside what the method trains a file holds what else the model needs to compute the same: buffers
that changed since the method was attached (statistics of a BatchNorm) and weights that `load` of
the model had to initialise freshly.  Of PEFT's files the copies of the model's own weights
(`base_layer.weight` of an embedding) are compared with the model, not loaded.

Nothing of a file is trusted: the config is typed and bounded, expressions run with a bound of time,
names, shapes and dtypes are compared before anything is allocated, and NaN is refused.
"""

import logging
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_lite import fields, joined, storage
from peft_lite.json_files import check_types, read_object
from peft_lite.method import InPlace, Method
from peft_lite.methods import METHODS, method_of
from peft_lite.outline import outline
from peft_lite.select import check_expressions, hf_name, uncompiled
from peft_lite.tensor_files import check_finite, read_named_tensors, read_outline
from peft_lite.wrapper import Copied, Wrapper, named_buffers, named_layers, named_weights

logger = logging.getLogger(__name__)

# what PEFT adds to `modules_to_save` of every classifier, there or not; older files do not list it
GUESSED = ("classifier", "score")
CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
MAX_CONFIG = 2**20  # bytes


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files, as one: a kill at any moment leaves the old pair or the new one.

    Raises:
        ValueError: a tensor holds NaN or an infinite number; nothing is written.
    """
    check_finite(tensors)
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_pair(
        directory / "adapter_model.safetensors", tensors, directory / "adapter_config.json", config
    )


def read(model: nn.Module, directory: Path) -> tuple[Any, dict[str, Tensor]]:
    """The config of a saved method and its tensors, checked against the model.

    Raises:
        ValueError: they do not fit.
    """
    if empty := [name for name, p in named_weights(model) if p.is_meta]:
        raise ValueError(f"{empty[0]} is on the meta device, without values: load the model first")
    safe, old = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    path = storage.config_of_pair(safe, directory / "adapter_config.json")
    raw = read_object(path, MAX_CONFIG)
    file = safe if safe.exists() or not old.exists() else old
    shapes = _without_copies(read_outline(file))
    with _naming(file):
        shapes = joined.split_tensors(model, shapes)
    with _naming(path):
        kind = raw.get("peft_type")
        known = dict.fromkeys(name for method in METHODS for name in method.peft_types)
        if not isinstance(kind, str) or kind not in known:
            raise ValueError(
                f"peft_type {kind!r} is not supported, must be one of {', '.join(known)}"
            )
        check_types(raw, {"modules_to_save": list[str] | None, "use_dora": bool | None})
        raw = joined.split_config(model, raw)
        check_expressions(model, fields.expressions(raw))
        named = [*(raw.get("modules_to_save") or ())]
        if raw.get("task_type") in CLASSIFIES:
            named += GUESSED
        listed = _modules_to_save(model, named, shapes)
        config = _read_config({**raw, "modules_to_save": listed or None})
        method = outline(model, method_of(config), config)
        _check_shape(model, method, raw)
    with _naming(file):
        match(model, method, shapes)
        tensors = joined.split_tensors(model, _without_copies(read_named_tensors(file)))
        _check_values(*match(model, method, tensors), tensors)
    return config, tensors


def fill(model: nn.Module, method: Method, tensors: Mapping[str, Tensor]) -> None:
    """Copies tensors that `read` has checked to their places: all of them, or none."""
    places, _ = match(model, method, tensors)
    filled = {place.data_ptr() for place in places.values()}
    left = [n for n, t in _untrained(model, method).items() if t.data_ptr() not in filled]
    before = [(place, place.clone()) for place in places.values()]
    try:
        for name, place in places.items():
            place.copy_(tensors[name])
    except BaseException:
        for place, values in before:
            place.copy_(values)
        raise
    if left:
        names = ", ".join(left)
        logger.warning("the file lacks %s, which this model has freshly initialised", names)


def match(
    model: nn.Module, method: Method, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The place of each tensor of a file by its name, and the weight of the model that it repeats.

    Raises:
        ValueError: tensors are missing, have no place, or are of another shape or kind.
    """
    begin = _beginning(method)
    trained = {_plain(name): place for name, place in trained_tensors(model, method).items()}
    untrained = {_plain(name): place for name, place in _untrained(model, method).items()}
    untrained |= {_plain(begin + hf_name(model, n)): b for n, b in named_buffers(model)}
    own = {_plain(begin + hf_name(model, n)): p for n, p in named_weights(model)}
    once = {id(w.parameter): _plain(begin + hf_name(model, n)) for n, w in _once(method)}
    tied = {name: trained[once[id(p)]] for name, p in own.items() if id(p) in once}
    places = {**untrained, **tied, **trained}
    filled: dict[str, Tensor] = {}
    repeated: dict[str, Tensor] = {}
    unexpected: list[str] = []
    for name in tensors:
        plain = _known(model, name, begin, places.keys() | own.keys())
        if plain in places:
            filled[name] = places[plain]
        elif plain in own:
            repeated[name] = own[plain]
        else:
            unexpected.append(name)
    there = {id(place) for place in filled.values()}
    missing = [name for name, place in trained.items() if id(place) not in there]
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            raise ValueError(f"{len(names)} tensors are {word}: {', '.join(sorted(names)[:4])}")
    for name, place in (filled | repeated).items():
        t = tensors[name]
        if t.shape != place.shape:
            want = list(place.shape)
            raise ValueError(f"{name} is {list(t.shape)}, this model wants {want}")
        if t.dtype != place.dtype and not (t.is_floating_point() and place.is_floating_point()):
            raise ValueError(f"{name} is {t.dtype}, this model wants {place.dtype}")
    return filled, repeated


def state(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """All that a file holds of a method, by the names of PEFT's files: no copies."""
    return {
        **trained_tensors(model, method),
        **_untrained(model, method),
        **{
            _beginning(method) + hf_name(model, name): b
            for name, b in named_buffers(model)
            if name in method.buffers and not torch.equal(b, method.buffers[name].to(b))
        },
    }


def trained_tensors(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """What the method trains, by the names of PEFT's files."""
    begin = _beginning(method)
    tensors: dict[str, Tensor] = {}
    for name, wrapper in method.wrappers.items():
        for end, tensor in wrapper.tensors().items():
            full = end if wrapper.whole_model else begin + hf_name(model, f"{name}.{end}")
            turned = isinstance(wrapper, Copied) and joined.is_turned(model, full, tensor)
            tensors[full] = tensor.T if turned else tensor
    for name, weight in _once(method):
        tensors[begin + _weight_name(model, method, name)] = weight.tuned(method.active)
    return tensors


def config_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """`adapter_config.json`, with the layers under their checkpoint names."""
    spec = method_of(method.config)
    copied = [part for n, w in method.wrappers.items() for part in _copied_names(model, n, w)]
    if spec.to_json is None:
        lines = {"peft_type": spec.peft_types[0], **fields.write_all(method.config)}
        return {**lines, "modules_to_save": copied} if copied else lines
    task = getattr(model, "task_type", None)
    # PEFT wants a classifier in the file of every classifier; for a prompt it must know the task
    untrained_head = (
        task == "SEQ_CLS"
        and not any(name.endswith(GUESSED) for name in copied)
        and not any(w.whole_model for w in method.wrappers.values())
    )
    return {
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "task_type": None if untrained_head else task,
        "modules_to_save": copied or None,
        **spec.to_json(model, method),
    }


def content(model: nn.Module, method: Method) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The lines and the tensors of a method's two files.

    Raises:
        ValueError: PEFT's files have no form for them.
    """
    lines, tensors = config_json(model, method), state(model, method)
    if method_of(method.config).to_json is None:  # not PEFT's
        return lines, tensors
    begin = _beginning(method)
    scalings = {
        begin + hf_name(model, name): wrapper.scaling
        for name, wrapper in method.wrappers.items()
        if hasattr(type(wrapper), "delta")
    }
    return joined.join(model, lines, tensors, scalings)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file before the message of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _beginning(method: Method) -> str:
    whole = any(w.whole_model for w in method.wrappers.values())
    return "base_model." if whole else "base_model.model."


def _once(method: Method) -> Iterable[tuple[str, InPlace]]:
    return method.weights_once().items()


def _weight_name(model: nn.Module, method: Method, name: str) -> str:
    """The file's name of a weight of the model."""
    layer, _, end = name.rpartition(".")
    below = layer in method.wrappers and not isinstance(method.wrappers[layer], Copied)
    return hf_name(model, layer) + f".base_layer.{end}" if below else hf_name(model, name)


def _untrained(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """Weights that the checkpoint of the model lacks and that the method does not train."""
    copied = tuple(f"{n}." for n, w in method.wrappers.items() if isinstance(w, Copied))
    return {
        _beginning(method) + _weight_name(model, method, name): p.data
        for name, p in named_weights(model)
        if name in getattr(model, "fresh", ())
        and name not in method.weights
        and not name.startswith(copied)
    }


def _plain(name: str) -> str:
    """A tensor's name without what compiling adds, and what only some versions of PEFT write."""
    return uncompiled(name).replace(".base_layer.", ".")


def _known(model: nn.Module, name: str, begin: str, known: Container[str]) -> str:
    """The plain name of a file's tensor, as this model has it if it has it."""
    plain = _plain(name)
    for old, new in getattr(getattr(model, "names", None), "renamed", {}).items():
        if plain.endswith(f".{old}"):
            plain = plain.removesuffix(old) + new
    if plain in known:
        return plain
    plain = plain.removeprefix("module.")  # data parallel training around all, or around the base
    return plain if plain in known else plain.replace(f"{begin}module.", begin, 1)


def _without_copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the biases of a module that is saved whole, which PEFT repeats."""
    return {
        name: t
        for name, t in tensors.items()
        if ".modules_to_save." not in name and ".original_module." not in name
    }


def _check_shape(model: nn.Module, method: Method, raw: Mapping[str, Any]) -> None:
    """Refuses a prefix or prompt that was trained for a model of another shape."""
    expected = config_json(model, method)
    for name in fields.SHAPES:
        if name in expected and raw.get(name, expected[name]) not in (None, expected[name]):
            raise ValueError(f"{name} is {raw[name]!r}, this model's {expected[name]}")


def _check_values(
    filled: Mapping[str, Tensor], repeated: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Refuses numbers that are not finite in their place, and weights that are not the model's."""
    first: dict[int, Tensor] = {}
    for name, place in filled.items():
        check_finite({name: tensors[name]})
        check_finite({f"{name} as {place.dtype}": tensors[name].to(place.dtype)})
        if not torch.equal(first.setdefault(id(place), tensors[name]), tensors[name]):
            raise ValueError(f"{name} differs from the tensor that it is tied to")
    for name, weight in repeated.items():
        if not torch.equal(tensors[name], weight.to("cpu", tensors[name].dtype)):
            raise ValueError(f"{name} is a weight of the model, and this model's differs")


def _copied_names(model: nn.Module, name: str, wrapper: Wrapper) -> list[str]:
    """The checkpoint's names of a copied module, those of its parts where it has no name there."""
    if not isinstance(wrapper, Copied):
        return []
    natives = [f"{name}.{end}" for end in wrapper.tensors()]
    whole = hf_name(model, name)
    if all(hf_name(model, native).startswith(f"{whole}.") for native in natives):
        return [whole]
    return list(dict.fromkeys(hf_name(model, n.rpartition(".")[0]) for n in natives))


def _modules_to_save(model: nn.Module, listed: Sequence[str], tensors: Iterable[str]) -> list[str]:
    """The model's modules, by whole name, that a file holds whole and `modules_to_save` names.

    PEFT's rule is the end of a name, with no dot before it: `classifier` is `pre_classifier` too.
    A name that PEFT only guessed may have no tensors.
    """
    there = {
        _plain(n).removeprefix("base_model.").removeprefix("model.")
        for n in tensors
        if ".base_layer." not in n
    }
    there |= {_plain(n).removeprefix("base_model.") for n in tensors if ".base_layer." not in n}
    weights = {n: (hf_name(model, n), id(p)) for n, p in named_weights(model)}
    whole: list[str] = []
    for place, _ in named_layers(model):
        inside = [w for n, w in weights.items() if place and n.startswith(f"{place}.")]
        if inside and {p for hf, p in inside if hf in there} == {p for _, p in inside}:
            whole.append(place)
    chosen: list[str] = []
    for name in dict.fromkeys(listed):
        named = [p for p in whole if p.endswith(name) or hf_name(model, p).endswith(name)]
        named += [
            p for p in whole if f".{name}." in f".{p}" or f".{name}." in f".{hf_name(model, p)}"
        ]
        if not named and name not in GUESSED:
            raise ValueError(f"modules_to_save: the file does not hold {name!r} whole")
        chosen += named
    tops = tuple(f"{place}." for place in chosen)
    return [f"^{place}" for place in dict.fromkeys(chosen) if not place.startswith(tops)]


def _read_config(raw: Mapping[str, Any]) -> Any:
    """The config of the method that wrote these lines."""
    for method in METHODS:
        if raw["peft_type"] in method.peft_types:
            if method.from_json is None:
                return method.config(**fields.read(raw, method.config))
            if (config := method.from_json(raw)) is not None:
                return config
    raise ValueError(f"no method reads this {raw['peft_type']}")
