"""`minigpt info`: the table of parameters of a model under a method."""

from dataclasses import dataclass

import peft_lite
from minigpt.checkpoints.directory import outline
from minigpt.commands.command import Query
from minigpt.models.architecture import without_values
from minigpt.settings import methods
from minigpt.settings.methods import MethodOptions
from minigpt.settings.options import option, with_default


@dataclass(frozen=True, kw_only=True)
class Info(MethodOptions):
    """The command's settings."""

    model: str = option('a model directory, a hub id, "bundled" or "bundled-bert"')
    method: str = with_default(MethodOptions, "method", "full")


def info(settings: Info) -> None:
    """Prints the table; no weight is read."""
    model = outline(settings.model)
    with without_values():
        methods.attach(model, settings)
    print(peft_lite.report(model))


COMMAND = Query(Info, info)
