"""The `minigpt` command: it parses its arguments and calls the command that they name.

A command's module is imported once its name is given, so that help and mistakes come at once.

Exit status, with one line on stderr unless it is 0, 1 or 141:

    0     done
    1     `verify` has found a damaged file
    2     a mistake in the arguments or the files, a full disk, too little memory
    70    a fault of this program; the line names the file with its trace
    130   interrupted
    141   whoever read the output, such as `head`, has closed it
"""

import argparse
import io
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from minigpt import __version__
from minigpt.commands.command import Command
from minigpt.training.interrupt import terminable

COMMANDS = {
    "finetune": "fine-tune a pretrained model on a text or on conversations",
    "classify": "train an encoder to classify rows, and label rows with it",
    "align": "train a model on preferences, or on rewards of what it writes",
    "generate": "continue a prompt",
    "evaluate": "answer the prompts of rows, and score the answers",
    "pretrain": "train a tokenizer and a model from texts",
    "quantize": "put a model's linear layers into 4 bits",
    "info": "table of parameters for a model and a method",
    "plan": "what memory and time a training step will take",
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
        print(f"minigpt: error: {one_line(message)}", file=sys.stderr)
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot show is escaped
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(format="minigpt: %(message)s")
    whole = parser()
    try:
        with terminable():
            given: dict[str, Any] = vars(whole.parse_args(arguments))
            name = given.pop("command")
            status = command(name).execute(name, given)
            print(end="", flush=True)
            return status
    except KeyboardInterrupt:
        print("minigpt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        whole.error(str(error))
    except Exception as error:
        if memory_is_short(error):
            whole.error(f"not enough memory: {error}")
        return crashed(error)
    finally:
        drop_output()


def one_line(message: str) -> str:
    """The message without line ends and without what a terminal would obey."""
    words = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def memory_is_short(error: Exception) -> bool:
    """Whether Python, NumPy or PyTorch found no memory; PyTorch has no class for the CPU's."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
    )


def crashed(error: Exception) -> int:
    """Writes the trace of an error that nobody foresaw to a file, and says where."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="minigpt-", suffix=".txt", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            traceback.print_exception(error, file=file)
        place = f"its trace is in {file.name}"
    except OSError as full:
        place = f"its trace could not be written: {full}"
    text = f"{type(error).__name__}: {error}"
    print(f"minigpt: fault of the program: {one_line(text):.500}; {place}", file=sys.stderr)
    return 70


def drop_output() -> None:
    """Where stdout takes nothing more, lets the interpreter end without a word about it."""
    try:
        print(end="", flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
