"""Progress bars: steps done, loss, speed and time left; characters of a long text."""

import sys
import time
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

PAUSE = 10  # seconds without a line, at most
LONG = 4_000_000  # characters of a text that takes some seconds
SHOWN = ("loss", "reward", "kl")  # columns of a row of metrics, where it has them


def say(text: str) -> None:
    """A line on stderr."""
    print(f"minigpt: {text}", file=sys.stderr, flush=True)


@contextmanager
def progress_bar(title: str, steps: int, tokens_a_step: int) -> Iterator[Callable[[Row], None]]:
    """Yields a function that shows a row of metrics on stderr: as a bar on a terminal, else as
    lines: of the first step, of every tenth of the steps, and of a step after 10 s of silence.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines(title, steps)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=steps, shown="", speed=0.0)

        def show(row: Row) -> None:
            speed = row.get("tokens", tokens_a_step) / row["seconds"]
            bar.update(task, completed=int(row["step"]), shown=_numbers(row), speed=speed)

        yield show


def _lines(title: str, steps: int) -> Callable[[Row], None]:
    last = time.monotonic()

    def show(row: Row) -> None:
        nonlocal last
        step, now = int(row["step"]), time.monotonic()
        if step in (1, steps) or step % max(1, steps // 10) == 0 or now - last > PAUSE:
            line = f"{title}: step {step}/{steps}, {_numbers(row)}"
            print(line, file=sys.stderr, flush=True)
            last = now

    return show


def _numbers(row: Row) -> str:
    return ", ".join(f"{name} {row[name]:.3f}" for name in SHOWN if name in row)


@contextmanager
def text_bar(title: str, characters: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many characters of a text are done, where there are so many
    that it takes more than a moment.
    """
    console = Console(stderr=True)
    if characters < LONG or not console.is_terminal:
        if characters >= LONG:
            say(f"{title}: {characters:,} characters")
        yield lambda done: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=characters)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def count_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many of `total` are done: as a bar on a terminal, else as
    lines, the last one and those after 10 s of silence.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last > PAUSE:
            print(f"{title}: {done:,} of {total:,}", file=sys.stderr, flush=True)
            last = now

    yield show
