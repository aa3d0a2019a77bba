"""JSON objects whose last field, `sha256`, is that of all other fields: damage is never read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_lite import storage
from peft_lite.json_files import read_object


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the object and its SHA-256."""
    storage.write_json(path, {**content, "sha256": _sha256(json.loads(json.dumps(content)))})


def read(path: Path) -> dict[str, Any]:
    """The object as it was written.

    Raises:
        ValueError: the file cannot be read, or is not as it was written.
    """
    content = read_object(path)
    if content.pop("sha256", None) != _sha256(content):
        raise ValueError(f"{path} is damaged or was edited: its SHA-256 is another")
    return content


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
