"""Files that are written whole or not at all: under another name first, flushed, then renamed.

A kill, a full disk or a crash at any moment leaves the old file or the new one, and at most a
`NAME.partial` beside it.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def writing(final: Path) -> Iterator[Path]:
    """The path to write to; at the end its bytes are on the disk under the final name.

        with writing(folder / "page.html") as partial:
            partial.write_text(page)

    A file of that name that is there already, or a link, is removed and never followed.
    """
    partial = final.with_name(final.name + ".partial")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    mode = partial.stat().st_mode  # what the umask allows; safetensors makes files of mode 600
    try:
        yield partial
        partial.chmod(mode)
        flush(partial)
        os.replace(partial, final)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(final.parent)


def write_text(final: Path, text: str) -> None:
    """Writes a text as UTF-8."""
    with writing(final) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(final: Path, content: Mapping[str, Any], sort_keys: bool = False) -> None:
    """Writes a JSON object.

    Raises:
        ValueError: a number is not finite; JSON has no word for it.
    """
    text = json.dumps(content, indent=2, sort_keys=sort_keys, allow_nan=False)
    write_text(final, text + "\n")


def write_tensors(
    final: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes named tensors as safetensors."""
    with writing(final) as partial:
        try:
            save_file(
                {name: t.contiguous() for name, t in tensors.items()},
                partial,
                metadata={"format": "pt"} if metadata is None else dict(metadata),
            )
        except SafetensorError as error:  # a full disk
            raise OSError(errno.EIO, str(error), str(final)) from None


def replace_folder(written: Path, final: Path) -> None:
    """Renames a folder whose files are on the disk to its final name."""
    if final.exists():
        shutil.rmtree(final)
    written.rename(final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
