"""Methods on disk, in HF PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

A tensor of a layer is called `base_model.model.` + the layer's checkpoint name + an ending of the
method (`.lora_A.weight`, `.ia3_l`, ...).  A setting that changes the mathematics and has no code
here is an error.  Methods that PEFT does not have are kept the same way under a `peft_type` of
their own, with the fields of their config.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from peft_lite.bias import BiasConfig
from peft_lite.bottleneck import BottleneckConfig
from peft_lite.dora import DoraConfig
from peft_lite.freeze import FreezeConfig
from peft_lite.ia3 import IA3Config, IA3Input
from peft_lite.lora import LoraConfig, LoraLayer
from peft_lite.method import Method
from peft_lite.prefix import Prefix, PrefixConfig
from peft_lite.prompt import Prompt, PromptConfig
from peft_lite.select import ends_with, hf_name, nearest
from peft_lite.tensor_files import read_named_tensors
from peft_lite.wrapper import Copied, named_layers

# fields of PEFT's configs that say nothing about the mathematics of a trained adapter
HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}
LORA_HARMLESS = {"ensure_weight_tying", "eva_config", "megatron_core", "qalora_group_size"}
# what prefix and prompt say of the model they are for, compared with it by `check_shape`
SHAPES = {"num_attention_heads", "num_layers", "num_transformer_submodules", "token_dim"}
PROMPT_HARMLESS = {"prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path"}
PREFIX_HARMLESS = {"encoder_hidden_size", "init_weights", "prefix_projection"}  # P itself is saved
# ways to begin: those that leave W as it was, so that W + s B A is right however B and A began
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# what PEFT adds to `modules_to_save` of every classifier, there or not
GUESSED = ("classifier", "score")


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files, each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / "adapter.partial"
    contiguous = {name: t.contiguous() for name, t in tensors.items()}
    save_file(contiguous, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # safetensors makes files that only their owner may read
    os.replace(partial, directory / "adapter_model.safetensors")
    partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, directory / "adapter_config.json")


def read(directory: Path) -> tuple[Any, dict[str, Any], dict[str, Tensor]]:
    """The config of a saved method, its file's fields as they are, and its tensors."""
    path = directory / "adapter_config.json"
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if kind not in READERS:
        known = ", ".join(READERS)
        raise ValueError(f"{path}: peft_type {kind!r} has no code here, must be one of {known}")
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
        return READERS[kind](raw), raw, tensors
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
    """Prefix and prompt say for what model they are: it must be this one."""
    expected = config_json(model, method)
    for name in ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
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
        layer, _, own = name.rpartition(".")
        below = layer in method.wrappers and not isinstance(method.wrappers[layer], Copied)
        full = hf_name(model, layer) + f".base_layer.{own}" if below else hf_name(model, name)
        tensors[beginning + full] = weight.tuned(method.active)
    return tensors


def config_json(model: nn.Module, method: Method) -> dict[str, Any]:
    """What PEFT needs to build the same method, with the layers under their checkpoint names."""
    config = method.config
    if isinstance(config, LoraConfig):
        own = _lora(model, method, config)
    elif isinstance(config, IA3Config):
        own = _ia3(model, method)
    elif isinstance(config, PrefixConfig):
        own = _prefix(model, method, config)
    elif isinstance(config, PromptConfig):
        own = _prompt(model, method)
    else:
        own = {"peft_type": OWN[type(config)], **asdict(config)}
        return {name: _plain(value) for name, value in own.items()}
    copied = [hf_name(model, n) for n, w in method.wrappers.items() if isinstance(w, Copied)]
    return {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "task_type": None,
        "modules_to_save": copied or None,
        **own,
    }


def _lora(model: nn.Module, method: Method, config: LoraConfig) -> dict[str, Any]:
    layers = {hf_name(model, n): w for n, w in method.wrappers.items() if isinstance(w, LoraLayer)}
    ranks = {name: len(layer.lora_a) for name, layer in layers.items()}
    alphas = {name: layer.alpha for name, layer in layers.items()}
    dora = isinstance(config, DoraConfig)
    attached = {} if getattr(config, "detach_norm", True) else {"detach_norm": False}
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": dora,
        "target_modules": _shortest_ends(model, set(layers)),
        "rank_pattern": {n: r for n, r in ranks.items() if r != config.r},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != config.lora_alpha},
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        **attached,
    }


def _ia3(model: nn.Module, method: Method) -> dict[str, Any]:
    layers = {n: w for n, w in method.wrappers.items() if not isinstance(w, Copied)}
    before = {hf_name(model, n) for n, w in layers.items() if isinstance(w, IA3Input)}
    return {
        "peft_type": "IA3",
        "target_modules": _shortest_ends(model, {hf_name(model, n) for n in layers}),
        "feedforward_modules": _shortest_ends(model, before) if before else [],
        "fan_in_fan_out": False,
        "init_ia3_weights": True,
    }


def _prefix(model: nn.Module, method: Method, config: PrefixConfig) -> dict[str, Any]:
    layers = [w for w in method.wrappers.values() if isinstance(w, Prefix)]
    width = layers[0].tensors()["prompt_embeddings"].size(1) // (2 * len(layers))
    return {
        "peft_type": "PREFIX_TUNING" if config.form == "peft" else "PREFIX",
        "task_type": getattr(model, "task_type", None),
        "num_virtual_tokens": config.num_virtual_tokens,
        "token_dim": width,
        "num_layers": len(layers),
        "num_attention_heads": width // layers[0].N,
        "num_transformer_submodules": 1,
        "encoder_hidden_size": config.encoder_hidden_size or width,
        "prefix_projection": False,  # P itself is saved, not the network that computed it
    }


def _prompt(model: nn.Module, method: Method) -> dict[str, Any]:
    (prompt,) = (w for w in method.wrappers.values() if isinstance(w, Prompt))
    attentions = [m for _, m in named_layers(model) if hasattr(m, "head_width")]
    width = prompt.prompt.size(1)
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": getattr(model, "task_type", None),
        "num_virtual_tokens": len(prompt.prompt),
        "token_dim": width,
        "num_layers": len(attentions),
        "num_attention_heads": width // int(attentions[0].head_width),  # type: ignore[arg-type]
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
    }


def _shortest_ends(model: nn.Module, chosen: set[str]) -> list[str]:
    """The shortest ends of names that name these layers and no other: `["q_proj", "v_proj"]`."""
    # containers as well: PEFT refuses to target one
    every = {hf_name(model, name) for name, _ in named_layers(model)}
    longest = max(name.count(".") for name in chosen) + 1
    for parts in range(1, longest + 1):
        ends = {".".join(name.split(".")[-parts:]) for name in chosen}
        if {name for name in every for end in ends if ends_with(name, end)} == chosen:
            return sorted(ends)
    return sorted(chosen)


def _plain(value: Any) -> Any:
    """A value that JSON knows."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _saved(listed: Any, tensors: Iterable[str]) -> list[str] | None:
    """`modules_to_save` without the names that PEFT only guessed."""
    found = []
    for name in listed or []:
        if any(f".{name}." in f".{tensor}" for tensor in tensors):
            found.append(name)
        elif name not in GUESSED:
            raise ValueError(f"modules_to_save: the file holds no tensor of {name!r}")
    return list(dict.fromkeys(found)) or None


def _read_lora(raw: Mapping[str, Any]) -> LoraConfig:
    kind = DoraConfig if raw.get("use_dora") else LoraConfig
    if (start := raw.get("init_lora_weights")) not in STARTS:
        raise ValueError(f"init_lora_weights = {start!r} has no code here")
    known = LORA_HARMLESS | {"init_lora_weights", "use_dora"}
    return kind(**_targeted(raw, kind, known))


def _read_ia3(raw: Mapping[str, Any]) -> IA3Config:
    return IA3Config(**_targeted(raw, IA3Config, {"init_ia3_weights"}))


def _read_prefix(raw: Mapping[str, Any]) -> PrefixConfig:
    settings = _settings(raw, PrefixConfig, SHAPES | PREFIX_HARMLESS)
    settings = {name: settings[name] for name in settings.keys() - PREFIX_HARMLESS}
    return PrefixConfig(**settings, form="fixed" if raw["peft_type"] == "PREFIX" else "peft")


def _read_prompt(raw: Mapping[str, Any]) -> PromptConfig:
    settings = _settings(raw, PromptConfig, SHAPES | PROMPT_HARMLESS)
    return PromptConfig(**{**settings, "prompt_tuning_init": "RANDOM"})


def _targeted(raw: Mapping[str, Any], kind: type, harmless: set[str]) -> dict[str, Any]:
    if not raw.get("target_modules"):
        raise ValueError("no target_modules")
    return _settings(raw, kind, harmless)


def _settings(raw: Mapping[str, Any], kind: type, harmless: set[str]) -> dict[str, Any]:
    """The fields of `kind` that are set.  A field without code here must not say anything."""
    known = {f.name for f in fields(kind)}
    for name, value in raw.items():
        if not (name in known | HARMLESS | harmless or _is_unset(value)):
            raise ValueError(f"{name} = {value!r} has no code here{nearest(name, known)}")
    return {name: raw[name] for name in known if raw.get(name) is not None}


def _is_unset(value: object) -> bool:
    """Whether a field says that its feature is off; 0 does not: it may be the number of a layer."""
    return value is None or value is False or value in ("none", [], {})


OWN = {BiasConfig: "BIAS", BottleneckConfig: "BOTTLENECK", FreezeConfig: "FREEZE"}
READERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "LORA": _read_lora,
    "IA3": _read_ia3,
    "PREFIX_TUNING": _read_prefix,
    "PREFIX": _read_prefix,
    "PROMPT_TUNING": _read_prompt,
    "BIAS": lambda raw: BiasConfig(**_settings(raw, BiasConfig, set())),
    "BOTTLENECK": lambda raw: BottleneckConfig(**_settings(raw, BottleneckConfig, set())),
    "FREEZE": lambda raw: FreezeConfig(**_settings(raw, FreezeConfig, set())),
}
