"""What `minigpt finetune` learns from: a text, or conversations.

Each is read at once, so that a mistake in a file is told before a model is loaded, and becomes a
`Lesson` when the tokenizer is there: batches, what is held out, a sample.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch

from minigpt.commands.tuning import TuningOptions
from minigpt.data.chat import TEMPLATES, ChatTemplate
from minigpt.data.conversations import (
    Conversation,
    Row,
    all_or_faults,
    numbered_rows,
    rows_file,
    split_rows,
    unread,
)
from minigpt.data.packing import Arrange, Example, Grouping, Packing, ShuffledRows, all_rows
from minigpt.data.tales import text_file, text_of
from minigpt.data.text import IGNORED, Batch, split_text
from minigpt.data.tokenizer import Tokenizer
from minigpt.models.architecture import Model
from minigpt.objectives.objective import Windows
from minigpt.objectives.registry import OBJECTIVES
from minigpt.objectives.supervised import answer, ends_of, example
from minigpt.settings.options import option, with_default
from minigpt.training.progress import say, text_bar

PROMPT = 24  # tokens
OF_CHAT = ("chat_template", "no_packing", "drop_long_rows")  # settings

Pairs = list[tuple[Row, Example]]


@dataclass(frozen=True, kw_only=True)
class LessonOptions(TuningOptions):
    """What a run learns from.

    Attributes:
        day: the date that a chat template gets which asks for it; a run keeps that of its start.
    """

    text: str | None = option(
        "the text to learn from, UTF-8, or bundled-carroll or bundled-poe", None
    )
    chat: str | None = option(
        "in its place: conversations, .jsonl or .json, or bundled-answers", None
    )
    chat_template: str | None = option(
        f"of --chat: {', '.join(TEMPLATES)}, or a file (default: the model's)", None
    )
    no_packing: bool = option("of --chat: a window holds one conversation", False)
    drop_long_rows: bool = option(
        "of --chat: leave out what has more than --sequence-length tokens, and count it", False
    )
    objective: str = option(
        "clm: a decoder predicts the next token; mlm: an encoder predicts masked tokens",
        "clm",
        choices=tuple(OBJECTIVES),
    )
    heldout: float = with_default(
        TuningOptions,
        "heldout",
        0.1,
        "share of the text, at its end, or of the conversations, held out for evaluation",
    )
    day: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.text is None) == (self.chat is None):
            raise ValueError("give either --text or --chat")
        if self.chat is not None and self.objective != "clm":
            raise ValueError(f"--chat has --objective clm, not {self.objective}")
        for name in OF_CHAT:
            if self.chat is None and getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} belongs to --chat")

    def dated(self) -> Self:
        """The settings with the day of a run on conversations: today, unless it has one."""
        day = date.today().isoformat() if self.day is None else self.day
        return self if self.chat is None else replace(self, day=day)


@dataclass(frozen=True)
class Lesson:
    """What a run learns from.

    Attributes:
        batches: a pure function of the batch's number.
        heldout: batches to evaluate on.
        sample: what a model makes of the beginning of something held out.
        inputs: the files it was read from, by what they are.
        counts: for the summary.
        files: texts that belong beside the model or adapter, by their names.
        rows: the conversations held out, for `minigpt evaluate`.
        check: raises ValueError for a model that cannot learn from such batches.
    """

    batches: Callable[[int], Batch]
    heldout: Sequence[Batch]
    sample: Callable[[Any], str]
    inputs: Mapping[str, Iterable[Path]]
    counts: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[Conversation] = ()
    check: Callable[[Model], None] = lambda model: None


def read_lesson(settings: LessonOptions) -> Callable[[Path, Tokenizer], Lesson]:
    """Reads the file, and returns what makes a lesson of it for a checkpoint and its tokenizer.

    Raises:
        ValueError: there is no such file, or it is no text or holds no conversations.
    """
    if settings.text is not None:
        return partial(text_lesson, settings, text_of(settings.text))
    return partial(chat_lesson, settings, numbered_rows(settings.chat or ""))


def text_lesson(
    settings: LessonOptions, text: str, directory: Path, tokenizer: Tokenizer
) -> Lesson:
    """Windows of a text; its end is held out."""
    objective = OBJECTIVES[settings.objective]
    with text_bar("tokens of the text", len(text)) as show:
        learned, rest = split_text(text, settings.heldout)
        train_ids = tokenizer.ids(learned, show)
        heldout_ids = tokenizer.ids(rest, lambda done: show(len(learned) + done))

    def windows(ids: torch.Tensor) -> Windows:
        length, size = settings.sequence_length, settings.batch_size
        return Windows(ids, tokenizer, length, size, settings.seed)

    def sample(model: Model) -> str:
        limit = min(PROMPT, model.max_tokens // 2)
        prompt = heldout_ids[None, :limit].to(next(model.parameters()).device)
        return objective.sample(model, tokenizer, prompt, settings.seed)

    return Lesson(
        objective.batches(windows(train_ids)),
        list(objective.heldout(windows(heldout_ids))),
        sample,
        {"text": [text_file(settings.text or "")]},
    )


def chat_lesson(
    settings: LessonOptions, rows: Sequence[Row], directory: Path, tokenizer: Tokenizer
) -> Lesson:
    """Conversations, several to a window; a share of them is held out."""
    path = rows_file(settings.chat or "")
    moment = datetime.fromisoformat(settings.day or "")
    template = ChatTemplate.choose(settings.chat_template, directory, tokenizer, moment)
    examples = all_or_faults(
        lambda row: (row, example(row, template, tokenizer)), rows, f"{path}: ", "are not learned"
    )
    kept = fitting(examples, settings.sequence_length, settings.drop_long_rows, path)
    learned, heldout = split_rows(kept, settings.heldout, settings.seed)
    ends = ends_of(directory, tokenizer)
    say_of_rows(kept, ends, path)
    size = settings.batch_size
    arrange: Arrange = (
        Grouping(size) if settings.no_packing else Packing(settings.sequence_length, size)
    )
    asked = heldout[0][0].messages[:-1]

    def sample(model: Any) -> str:
        told = answer(model, template, tokenizer, asked, ends)
        return f"{asked[-1]['content']}\n\n> {told}"

    train_examples = [example for _, example in learned]
    given = settings.chat_template is not None
    return Lesson(
        ShuffledRows(train_examples, arrange, settings.seed),
        list(all_rows([example for _, example in heldout], arrange)),
        sample,
        {"rows": [path], "chat template": [template.file] if template.file else []},
        {
            "train_rows": len(learned),
            "heldout_rows": len(heldout),
            "dropped_rows": len(examples) - len(kept),
            "train_tokens": sum(map(len, train_examples)),
            "labelled_tokens": sum(int((e.labels != IGNORED).sum()) for e in train_examples),
        },
        {"chat_template.jinja": template.source} if given else {},
        [row.messages for row, _ in heldout],
        lambda model: None if settings.no_packing else check_packing(model),
    )


def fitting(examples: Pairs, length: int, drop: bool, path: Path) -> Pairs:
    """The conversations that fit a window.

    Raises:
        ValueError: others are not to be dropped, or nothing is left.
    """
    kept = [(row, example) for row, example in examples if len(example) <= length]
    if len(kept) < len(examples):
        row, first = next(pair for pair in examples if len(pair[1]) > length)
        longest = max(len(example) for _, example in examples)
        many = len(examples) - len(kept)
        words = (
            f"{path}: {many:,} of {len(examples):,} rows have more tokens than "
            f"--sequence-length {length}: {row.where} has {len(first):,}, the longest {longest:,}"
        )
        if not drop or not kept:
            raise ValueError(f"{words}; raise it, or leave such rows out with --drop-long-rows")
        say(f"{words}; they are left out")
    return kept


def say_of_rows(pairs: Pairs, ends: set[int], path: Path) -> None:
    """Says which fields nobody reads, and if the model cannot learn where an answer ends."""
    if fields := unread((row for row, _ in pairs), path):
        say(fields)
    if not any(ends & {*example.labels.tolist()} for _, example in pairs):
        say(
            "the chat template ends no answer with a token that ends a text for this model: "
            "generation will not know where to stop"
        )


def check_packing(model: Model) -> None:
    """Raises ValueError where rows cannot share a window: vectors before the tokens stand before
    the first row alone.
    """
    if model.embeddings.prompt.shift:
        raise ValueError(
            "a prompt, or a prefix that moves positions, stands before the first conversation of a "
            "window alone: add --no-packing, with which each has a window"
        )
