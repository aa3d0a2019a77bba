"""Files that are written whole or not at all: under another name first, then renamed."""

import os
from pathlib import Path


def publish(written: Path, final: Path) -> None:
    """Renames a finished file to its final name, once its bytes are on the disk."""
    written.chmod(0o644)  # safetensors makes files that only their owner may read
    _flush(written)
    os.replace(written, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
