"""Progress bars: steps done, loss, speed and time left; characters of a long text."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from minigpt.training.train import Row

LONG = 4_000_000  # characters of a text that takes some seconds


@contextmanager
def progress_bar(title: str, steps: int, tokens_a_step: int) -> Iterator[Callable[[Row], None]]:
    """Yields a function that shows a row of metrics on stderr: as a bar on a terminal, else as a
    line for every tenth of the steps.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda row: _line(title, steps, row)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, loss=float("nan"), speed=0.0)

        def show(row: Row) -> None:
            speed = tokens_a_step / row["seconds"]
            bar.update(task, completed=int(row["step"]), loss=row["loss"], speed=speed)

        yield show


@contextmanager
def text_bar(title: str, characters: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many characters of a text are done, where there are so many
    that it takes more than a moment.
    """
    console = Console(stderr=True)
    if characters < LONG or not console.is_terminal:
        if characters >= LONG:
            print(f"{title}: {characters:,} characters", file=sys.stderr, flush=True)
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=characters)
        yield lambda done: bar.update(task, completed=done)


def _line(title: str, steps: int, row: Row) -> None:
    step = int(row["step"])
    if step == steps or step % max(1, steps // 10) == 0:
        print(f"{title}: step {step}/{steps}, loss {row['loss']:.3f}", file=sys.stderr, flush=True)
