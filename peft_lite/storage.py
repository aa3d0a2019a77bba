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
    partial = _partial(final)
    partial.unlink(missing_ok=True)
    mode = _create(partial)
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


def append_text(path: Path, text: str) -> None:
    """Writes a text as UTF-8 after what the file holds; its bytes are on the disk then."""
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


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
        save_tensors(tensors, partial, {"format": "pt"} if metadata is None else dict(metadata))


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Writes the file itself.  Raises OSError where the library has a word of its own."""
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error), str(path)) from None  # a full disk


def write_pair(
    tensors: Path, named: Mapping[str, Tensor], config: Path, content: Mapping[str, Any]
) -> None:
    """Writes tensors and the config that belongs to them; `config_of_pair` finds the one to read.

    Both are on the disk under their partial names before the tensors are renamed, then the config.
    So a config's partial file without the tensors' is whole, and belongs to them.
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    new_tensors, new_config = _partial(tensors), _partial(config)
    if config_of_pair(tensors, config) == new_config:
        os.replace(new_config, config)  # an earlier writing was ended between its two renamings
    new_config.unlink(missing_ok=True)  # first, as it would count without the other
    new_tensors.unlink(missing_ok=True)
    try:
        mode = _create(new_tensors)
        save_tensors(named, new_tensors, {"format": "pt"})
        new_tensors.chmod(mode)
        flush(new_tensors)
        _create(new_config)
        new_config.write_text(text, encoding="utf-8")
        flush(new_config)
        flush(config.parent)
    except BaseException:
        new_config.unlink(missing_ok=True)
        new_tensors.unlink(missing_ok=True)
        raise
    os.replace(new_tensors, tensors)
    flush(config.parent)
    os.replace(new_config, config)
    flush(config.parent)


def config_of_pair(tensors: Path, config: Path) -> Path:
    """Where the config of `write_pair` stands, whichever moment ended the writing."""
    ended_between = _partial(config).exists() and not _partial(tensors).exists()
    return _partial(config) if ended_between else config


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


def _partial(final: Path) -> Path:
    return final.with_name(final.name + ".partial")


def _create(path: Path) -> int:
    """Makes an empty file, never through a link, and gives the mode that the umask allows.

    safetensors makes files of mode 600.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    return path.stat().st_mode
