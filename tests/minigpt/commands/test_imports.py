"""A command imports what it needs: help and mistakes come at once, and generation stays light."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from minigpt.commands.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print("modules:", *sys.modules)
print("status:", status)
"""


def modules(*arguments: str) -> tuple[set[str], int]:
    """What a process of its own has imported after the command, and the command's status."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    *_, listed, status = run.stdout.splitlines()
    return set(listed.split()[1:]), int(status.split()[1])


@pytest.mark.parametrize("arguments", [["--help"], ["tune"], []])
def test_help_and_an_unknown_command_import_no_torch(arguments: list[str]) -> None:
    imported, status = modules(*arguments)
    assert status == (0 if arguments == ["--help"] else 2)
    assert "minigpt.commands.cli" in imported
    assert not imported & {"torch", "numpy", "peft_lite"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--model", "bundled", "--prompt", "Alice", "--max-new-tokens", "2"],
        ["info", "--model", "bundled-bert"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_prints_imports_nothing_that_draws(arguments: list[str], tmp_path: Path) -> None:
    imported, status = modules(*arguments)
    assert status == 0
    assert "torch" in imported
    assert not imported & {"rich", "matplotlib", "jinja2", "transformers", "minigpt.studies"}
