"""The command in a process of its own that imports nothing again: it is forked from a server that
has imported PyTorch, and starts in hundredths of a second.
"""

import os
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType

PRELOADED = ["torch", "minigpt.commands.cli", "minigpt.commands.finetune"]


class Command:
    """`minigpt` with these arguments, started.

    Args:
        printed: a folder for what it prints.
        file_bytes: no file may grow beyond it.
    """

    def __init__(
        self, arguments: Sequence[str], printed: Path, file_bytes: int | None = None
    ) -> None:
        served = get_context("forkserver")
        served.set_forkserver_preload(PRELOADED)
        self.files = (printed / "stdout", printed / "stderr")
        self.process = served.Process(target=run, args=(arguments, *self.files, file_bytes))
        self.process.start()

    @property
    def status(self) -> int | None:
        """Of its exit; minus the signal that ended it; None: it runs."""
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()

    def end(self, seconds: float = 120) -> tuple[int, str, str]:
        """Waits for its end; its status, what it has printed and what it has said on stderr."""
        self.process.join(seconds)
        status = self.process.exitcode
        assert status is not None, f"it runs after {seconds} s"
        out, err = (file.read_text() if file.exists() else "" for file in self.files)
        return status, out, err

    def __enter__(self) -> "Command":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.kill()
        self.process.join()


def run(arguments: Sequence[str], out: Path, err: Path, file_bytes: int | None) -> None:
    """In the process of the command."""
    from minigpt.commands.cli import main

    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    if file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.exit(main(arguments))
