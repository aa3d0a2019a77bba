"""The `minigpt` command: it parses its arguments and calls the command that they name.

A command's module is imported once its name is given, so that help and mistakes come at once.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from minigpt import __version__
from minigpt.commands.command import Command
from minigpt.training.interrupt import terminable

COMMANDS = {
    "finetune": "fine-tune a pretrained decoder on a text",
    "generate": "continue a prompt",
    "pretrain": "train a tokenizer and a model from texts",
    "info": "table of parameters for a model and a method",
    "study": "rerun a published experiment and put its claims to the test",
    "verify": "check every file of a run",
}


def command(name: str) -> Command:
    """The command that the module of that name holds."""
    return import_module(f"minigpt.commands.{name}").COMMAND


class Parser(argparse.ArgumentParser):
    """Prints a mistake in one line, exits with status 2, and adds its options when it is used.

    Args:
        add_options: called with the parser before it parses for the first time.
    """

    def __init__(
        self, *args: Any, add_options: Callable[["Parser"], None] | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.add_options = add_options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.add_options is not None:
            self.add_options(self)
            self.add_options = None
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        print(f"minigpt: error: {' '.join(message.split())}", file=sys.stderr)
        sys.exit(2)


def parser() -> Parser:
    """The parser of all commands."""
    whole = Parser(prog="minigpt", description="transformers: train, fine-tune, generate")
    whole.add_argument("--version", action="version", version=f"minigpt {__version__}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, about in COMMANDS.items():
        commands.add_parser(
            name,
            help=about,
            description=about,
            argument_default=argparse.SUPPRESS,
            add_options=lambda parser, name=name: command(name).add_to(parser),
        )
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    logging.basicConfig(format="minigpt: %(message)s")
    whole = parser()
    try:
        with terminable():
            given: dict[str, Any] = vars(whole.parse_args(arguments))
            name = given.pop("command")
            return command(name).execute(name, given)
    except KeyboardInterrupt:
        print("minigpt: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        whole.error(str(error))
