"""`minigpt study`: rerun a published experiment and put its claims to the test."""

from argparse import SUPPRESS, ArgumentParser
from typing import Any

from minigpt import studies
from minigpt.commands.command import Run


class Study:
    """A command of commands: each study has settings of its own."""

    def add_to(self, parser: ArgumentParser) -> None:
        parser.add_argument("--list", action="store_true", default=False, help="name the studies")
        names = parser.add_subparsers(dest="name", metavar="NAME")
        parser.set_defaults(name=None)
        for name, about in studies.STUDIES.items():
            names.add_parser(
                name,
                help=about,
                description=about,
                argument_default=SUPPRESS,
                add_options=lambda parser, name=name: _add_options(parser, name),
            )

    def execute(self, name: str, given: dict[str, Any]) -> int:
        if given.pop("list") or given["name"] is None:
            for study, about in studies.STUDIES.items():
                print(f"{study:24} {about}")
            return 0
        study = given.pop("name")
        if given.pop("published"):
            given = studies.published(study, given)
        return Run(*studies.command(study)).execute(f"{name} {study}", given)


def _add_options(parser: ArgumentParser, study: str) -> None:
    Run(*studies.command(study)).add_to(parser)
    parser.add_argument(
        "--published", action="store_true", default=False, help="the write-up's settings"
    )


COMMAND = Study()
