"""A folder of a run has one owner at a time.

The lock is the operating system's, on OUT/run.lock: it ends with the process that holds it, however
that process ends, so that a file left by a dead owner stops nobody.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "run.lock"


@contextmanager
def owned(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Makes the folder and owns it; at the end, folders that are made here and empty are removed.

    Raises:
        ValueError: another process owns it, after `wait` seconds still, or it cannot be made.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    path, end = folder / LOCK, time.monotonic() + wait
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while (descriptor := _locked(path)) is None:
            if time.monotonic() > end:
                raise ValueError(f"{folder} is in use by another process")
            time.sleep(0.05)
    except FileExistsError:
        raise ValueError(f"{folder} is not an empty folder: it is a file") from None
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        yield
    finally:
        try:
            if sys.platform != "win32":  # Windows removes no open file
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)
        with suppress(OSError):
            if sys.platform == "win32":
                path.unlink()
            for parent in made:
                parent.rmdir()


def _locked(path: Path) -> int | None:
    """The descriptor of the locked file; None while another process has it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        _lock(descriptor)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return descriptor
    except (BlockingIOError, PermissionError, FileNotFoundError):
        pass  # held, or removed by its last owner since it was opened
    os.close(descriptor)
    return None


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
