"""The two kinds of commands: one that prints, and one whose run fills a folder and can be resumed.

A command is one file that ends with `COMMAND`, and one line in minigpt/commands/cli.py.
"""

import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minigpt.settings import runs
from minigpt.settings.lock import owned
from minigpt.settings.options import add_options
from minigpt.training.interrupt import Interrupted


class Command(Protocol):
    """What the command line needs of a command."""

    def add_to(self, parser: ArgumentParser) -> None:
        """Adds the command's options."""

    def execute(self, name: str, given: dict[str, Any]) -> int:
        """Runs with the options given; returns the exit status."""


@dataclass(frozen=True)
class Query:
    """A command that prints: `function(settings)`."""

    settings: type
    function: Callable[[Any], None]

    def add_to(self, parser: ArgumentParser) -> None:
        add_options(parser, self.settings)

    def execute(self, name: str, given: dict[str, Any]) -> int:
        self.function(runs.fill(self.settings, given))
        return 0


@dataclass(frozen=True)
class Run:
    """A command that fills a folder: `function(settings, out, resume)` -> the summary."""

    settings: type
    function: Callable[[Any, Path, bool], dict[str, object]]

    def add_to(self, parser: ArgumentParser) -> None:
        add_options(parser, self.settings)
        parser.add_argument("--out", type=Path, required=True, help="folder of the run")
        parser.add_argument(
            "--resume", action="store_true", default=False, help="continue the run in --out"
        )
        parser.add_argument(
            "--accept",
            nargs="+",
            default=[],
            choices=runs.ENVIRONMENT,
            help="what may differ from the run that is continued: its last bits may differ then",
        )

    def execute(self, name: str, given: dict[str, Any]) -> int:
        out, resume, accepted = (given.pop(option) for option in ("out", "resume", "accept"))
        try:
            with owned(out):
                settings: Any = runs.settle(self.settings, name, given, out, resume)
                summary = runs.summary(out)
                if summary is not None:
                    print(f"minigpt: the run in {out} is complete", file=sys.stderr)
                else:
                    runs.check_environment(out, accepted)
                    summary = self.function(settings, out, resume)
            _print_summary(summary, out)
        except Interrupted as stop:
            again = f"minigpt {name} --resume --out {shlex.quote(str(out))}"
            print(f"minigpt: {stop}; continue with: {again}", file=sys.stderr)
            return 130
        except OSError as error:
            if error.filename is not None:
                raise
            raise ValueError(f"cannot write to {out}: {error.strerror or error}") from None
        return 0


def _print_summary(summary: dict[str, object], out: Path) -> None:
    for name, value in summary.items():
        if name != "config":
            print(
                f"{name:26} {value:,}" if isinstance(value, int | float) else f"{name:26} {value}"
            )
    sample = out / "sample.txt"
    if sample.exists():
        print(sample.read_text(encoding="utf-8"))
    print(f"in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
