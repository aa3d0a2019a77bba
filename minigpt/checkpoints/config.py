"""A checkpoint's config.json: which architecture it is, and its settings, each of its type."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from minigpt.checkpoints import gguf
from minigpt.models.architecture import Architecture, Config
from minigpt.models.architectures import ARCHITECTURES
from minigpt.models.config import nearest, short
from peft_lite.json_files import check_types, read_object, read_optional

logger = logging.getLogger("minigpt")

EOS = int | list[int] | None
COMMON: dict[str, Any] = {  # fields that are no settings of the model itself
    "architectures": list[str] | None,
    "num_labels": int | None,
    "id2label": Mapping[str, str] | None,
    "eos_token_id": EOS,
}


def read_config(directory: Path) -> tuple[Architecture, Config, dict[str, Any]]:
    """Architecture, config and the whole content of a checkpoint's config.json, or of a file that
    is one under another name.

    Raises:
        ValueError: no such file, or one that asks for what is not supported.
    """
    path = directory if directory.is_file() else directory / "config.json"
    if not path.exists():
        raise ValueError(f"no config.json in {directory}")
    raw = gguf.opened(path).config() if path.suffix == ".gguf" else read_object(path)
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type {short(kind)} is unknown, must be one of "
            f"{', '.join(ARCHITECTURES)}{nearest(short(kind), ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[kind]
    hints = {**COMMON, **get_type_hints(architecture.config), **architecture.hints}
    hints |= {alias: hints[name] for alias, name in architecture.aliases.items()}
    check_types(raw, hints, f"{path}: ")
    try:
        config = architecture.config_from(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if other := architecture.other_class(raw):
        logger.warning("%s: there is no code for the head of %s: left out", path, short(other))
    return architecture, config, raw


def end_ids(directory: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json, else of config.json; none that
    the vocabulary lacks, since the model cannot produce it.

    Raises:
        ValueError: the field is no id and no list of ids.
    """
    path = directory / "generation_config.json"
    raw = read_optional(path)
    check_types(raw, {"eos_token_id": EOS}, f"{path}: ")
    if raw.get("eos_token_id") is None:
        raw = read_config(directory)[2]
    given = raw.get("eos_token_id")
    ids = [given] if isinstance(given, int) else given or []
    return tuple(i for i in ids if 0 <= i < vocab_size)
