"""The command in a process of its own that imports nothing again: it is forked from a server that
has imported PyTorch, and starts in hundredths of a second.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess
from types import TracebackType

ROOT = Path(__file__).parents[1]
PRELOADED = ["torch", "minigpt.commands.cli", "minigpt.commands.finetune"]


class Command:
    """`minigpt` with these arguments, started.

    Args:
        printed: a folder for what it prints.
        file_bytes: no file may grow beyond it.
        environment: variables that it gets besides.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        printed: Path,
        file_bytes: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        served = get_context("forkserver")
        served.set_forkserver_preload(PRELOADED)
        self.files = (printed / "stdout", printed / "stderr")
        given = (arguments, *self.files, file_bytes, environment or {})
        self.process = served.Process(target=run, args=given)
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


def torchrun(arguments: Sequence[str], cwd: Path) -> CompletedProcess[str]:
    """torchrun itself with these arguments, in the folder, to its end."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tools" / "path")])
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


class Torchrun:
    """Such processes as torchrun would start them: the command in each, with its rank.  As there,
    the store by which they meet is no process's of the run.

    Args:
        printed: a folder for what they print, RANK/stdout and RANK/stderr.
    """

    def __init__(self, size: int, arguments: Sequence[str], printed: Path) -> None:
        from torch.distributed import TCPStore

        self.store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.commands = []
        for rank in range(size):
            folder = printed / str(rank)
            folder.mkdir(parents=True, exist_ok=True)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            self.commands.append(Command(arguments, folder, environment=environment))

    def end(self, seconds: float = 120) -> tuple[list[int], str]:
        """Waits for all; their statuses, and what they have said on stderr, together."""
        ends = [command.end(seconds) for command in self.commands]
        return [status for status, _, _ in ends], "".join(err for _, _, err in ends)

    def __enter__(self) -> "Torchrun":
        return self

    def __exit__(self, *_: object) -> None:
        for command in self.commands:
            command.kill()
            command.process.join()


def run(
    arguments: Sequence[str],
    out: Path,
    err: Path,
    file_bytes: int | None,
    environment: Mapping[str, str],
) -> None:
    """In the process of the command."""
    os.environ.update(environment)
    from minigpt.commands.cli import main

    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), descriptor)
    if file_bytes is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    sys.exit(main(arguments))
