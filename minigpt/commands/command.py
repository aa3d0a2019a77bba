"""The kinds of commands: one that prints, one whose run fills a folder and can be resumed, and a
group of commands.

A command is one file that ends with `COMMAND`, and one line in minigpt/commands/cli.py.
"""

import json
import shlex
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
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
    """A command that fills a folder: `function(settings, out, resume)` -> the summary.  `shown` is
    the file of the folder that is printed after it.
    """

    settings: type
    function: Callable[[Any, Path, bool], dict[str, object]]
    shown: str = "sample.txt"

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
        from minigpt.training.processes import Processes, joined

        out, resume, accepted = (given.pop(option) for option in ("out", "resume", "accept"))
        shared = any(f.name == "parallel" for f in fields(self.settings))
        try:
            with (
                joined() if shared else nullcontext(Processes()) as processes,
                owned(out) if processes.first else nullcontext(),
            ):
                processes.sum(0)  # the first one owns the folder
                settings: Any = runs.settle(self.settings, name, given, out, resume)
                summary = runs.summary(out)
                processes.check_same("the run", json.dumps([asdict(settings), summary]))
                if summary is not None:
                    print(f"minigpt: the run in {out} is complete", file=sys.stderr)
                    if given.get("track") and processes.first:
                        _replay(settings, out)
                else:
                    runs.check_environment(out, accepted, settings)
                    summary = self.function(settings, out, resume)
                if processes.first:
                    _print_summary(summary, out, out / self.shown)
        except Interrupted as stop:
            again = f"minigpt {name} --resume --out {shlex.quote(str(out))}"
            print(f"minigpt: {stop}; continue with: {again}", file=sys.stderr)
            return 130
        except OSError as error:
            if error.filename is not None:
                raise
            raise ValueError(f"cannot write to {out}: {error.strerror or error}") from None
        return 0


@dataclass(frozen=True)
class Group:
    """A command of commands, as `minigpt classify train`: name -> what it does, and the command."""

    commands: Mapping[str, tuple[str, Command]]

    def add_to(self, parser: ArgumentParser) -> None:
        names: Any = parser.add_subparsers(
            dest="name", required=True, metavar="|".join(self.commands)
        )
        for name, (about, command) in self.commands.items():
            names.add_parser(
                name,
                help=about,
                description=about,
                argument_default=SUPPRESS,
                add_options=command.add_to,
            )

    def execute(self, name: str, given: dict[str, Any]) -> int:
        part = given.pop("name")
        _, command = self.commands[part]
        return command.execute(f"{name} {part}", given)


def _replay(settings: Any, out: Path) -> None:
    """Gives the metrics of a complete run to trackers."""
    from minigpt.training.trackers.follow import tracked

    with tracked(settings.track, out, asdict(settings)):
        pass


def _print_summary(summary: dict[str, object], out: Path, shown: Path) -> None:
    """The numbers and words of a summary, a text, and the files there are."""
    for name, value in summary.items():
        if not isinstance(value, dict):
            print(
                f"{name:26} {value:,}" if isinstance(value, int | float) else f"{name:26} {value}"
            )
    if shown.exists():
        print(shown.read_text(encoding="utf-8"))
    print(f"in {out}: {', '.join(sorted(p.name for p in out.iterdir()))}")
