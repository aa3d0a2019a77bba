"""Methods on disk, in HF PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor of a layer is named `base_model.model.` + the layer's checkpoint name + an ending of the
method (`.lora_A.weight`, `.ia3_l`, ...).  Each method's file writes and reads its own lines of the
config; a setting that changes the mathematics and is not supported is an error.  Methods that PEFT
does not have are stored in the same way under a `peft_type` of their own.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peft_lite import fields, storage
from peft_lite.method import Method
from peft_lite.methods import METHODS, method_of
from peft_lite.select import hf_name
from peft_lite.tensor_files import read_named_tensors
from peft_lite.wrapper import Copied

# what PEFT adds to `modules_to_save` of every classifier, there or not
GUESSED = ("classifier", "score")


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    storage.write_tensors(directory / "adapter_model.safetensors", tensors)
    storage.write_json(directory / "adapter_config.json", config, sort_keys=True)


def read(directory: Path) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """The config of a saved method, its file's fields as they are, and its tensors."""
    path = directory / "adapter_config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    known = dict.fromkeys(name for method in METHODS for name in method.peft_types)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(
            f"{path}: peft_type {kind!r} is not supported, must be one of {', '.join(known)}"
        )
    safe, old = directory / "adapter_model.safetensors", directory / "adapter_model.bin"
    tensors = read_named_tensors(safe if safe.exists() or not old.exists() else old)
    # PEFT repeats the biases of a module that it saves whole
    tensors = {
        name: t
        for name, t in tensors.items()
        if ".modules_to_save." not in name and ".original_module." not in name
    }
    raw = {**raw, "modules_to_save": _saved(raw.get("modules_to_save"), tensors)}
    try:
        return _read_config(raw), raw, tensors
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def fill(places: Mapping[str, Tensor], tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Copies the tensors to their places, all or none."""
    # older versions of PEFT do not say that a bias is that of the layer below
    places = {name.replace(".base_layer.", "."): place for name, place in places.items()}
    tensors = {name.replace(".base_layer.", "."): t for name, t in tensors.items()}
    for word, names in (
        ("missing", places.keys() - tensors.keys()),
        ("unexpected", tensors.keys() - places.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:4])
            raise ValueError(f"{directory}: {len(names)} tensors are {word}: {some}")
    for name, place in places.items():
        if tensors[name].shape != place.shape:
            raise ValueError(
                f"{directory}: {name} is {list(tensors[name].shape)}, "
                f"this model wants {list(place.shape)}"
            )
    for name, place in places.items():
        place.copy_(tensors[name])


def check_shape(model: nn.Module, method: Method, raw: Mapping[str, Any], directory: Path) -> None:
    """Refuses a prefix or prompt that was trained for a model of another shape."""
    expected = config_json(model, method)
    for name in fields.SHAPES:
        if name in expected and raw.get(name, expected[name]) not in (None, expected[name]):
            raise ValueError(f"{directory}: {name} is {raw[name]}, this model's {expected[name]}")


def state(model: nn.Module, method: Method) -> dict[str, Tensor]:
    """The method's tensors by their names in PEFT's files."""
    whole = any(w.whole_model for w in method.wrappers.values())
    beginning = "base_model." if whole else "base_model.model."
    tensors: dict[str, Tensor] = {}
    for name, wrapper in method.wrappers.items():
        for end, tensor in wrapper.tensors().items():
            full = end if wrapper.whole_model else beginning + hf_name(model, f"{name}.{end}")
            tensors[full] = tensor
    for name, weight in method.weights_once().items():
        layer, _, end = name.rpartition(".")
        below = layer in method.wrappers and not isinstance(method.wrappers[layer], Copied)
        full = hf_name(model, layer) + f".base_layer.{end}" if below else hf_name(model, name)
        tensors[beginning + full] = weight.tuned(method.active)
    return tensors


def config_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """`adapter_config.json`, with the layers under their checkpoint names."""
    spec = method_of(method.config)
    if spec.to_json is None:
        return {"peft_type": spec.peft_types[0], **fields.write_all(method.config)}
    copied = [hf_name(model, n) for n, w in method.wrappers.items() if isinstance(w, Copied)]
    return {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": copied or None,
        **spec.to_json(model, method),
    }


def _saved(listed: Any, tensors: Iterable[str]) -> list[str] | None:
    """`modules_to_save` without the names that PEFT only guessed."""
    saved = []
    for name in listed or []:
        if any(f".{name}." in f".{tensor}" for tensor in tensors):
            saved.append(name)
        elif name not in GUESSED:
            raise ValueError(f"modules_to_save: the file holds no tensor of {name!r}")
    return list(dict.fromkeys(saved)) or None


def _read_config(raw: Mapping[str, Any]) -> Any:
    """The config of the method that wrote these lines."""
    for method in METHODS:
        if raw["peft_type"] in method.peft_types:
            if method.from_json is None:
                return method.config(**fields.read(raw, method.config))
            if (config := method.from_json(raw)) is not None:
                return config
    raise ValueError(f"no method reads this {raw['peft_type']}")
