"""The architectures there is code for, by the `model_type` of config.json."""

import json
from pathlib import Path
from typing import Any

from minigpt.models import bert, gpt_neo, llama
from minigpt.models.architecture import Architecture, Config
from minigpt.models.config import nearest

ARCHITECTURES: dict[str, Architecture] = {
    "gpt_neo": gpt_neo.ARCHITECTURE,
    "bert": bert.ARCHITECTURE,
    **llama.ARCHITECTURES,
}


def read_config(directory: Path) -> tuple[Architecture, Config, dict[str, Any]]:
    """Architecture, config and the whole content of a checkpoint's config.json.

    Raises:
        ValueError: no such file, or one that asks for what is not supported.
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
    try:
        return architecture, architecture.config_from(raw), raw
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
