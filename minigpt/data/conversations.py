"""Rows of a file -> conversations:  read_rows("mine.jsonl").

A conversation is a list of {"role": "system", "user" or "assistant", "content": a text}, and its
last message is the assistant's.  A row says it in one of three ways:

    messages                                  the list itself
    prompt, completion                        a user's message, the assistant's
    instruction, input (or none), output      the same; an input follows its instruction after an
                                              empty line (Alpaca,
                                              https://crfm.stanford.edu/2023/03/13/alpaca.html)

A file has one object a line, or is one list of objects; both may be packed by gzip.  No row is left
out: all faults of a file are counted, and the first are named.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minigpt.data.labelled import checked_text, unpacked_text
from peft_lite.json_files import parse, parse_object, short
from peft_lite.select import nearest

Message = dict[str, str]
Conversation = list[Message]
X = TypeVar("X")
Y = TypeVar("Y")

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
ROLES = ("system", "user", "assistant")
PROMPTS = ("prompt", "instruction")  # names of the fields, as published rows have them
INPUTS = ("input", "context")
ANSWERS = ("completion", "output", "answer", "response")
SHOWN = 3  # faults that a message names
BUNDLED = {"bundled-answers": Path(__file__).parents[1] / "assets" / "answers" / "answers.jsonl"}


@dataclass(frozen=True)
class Row:
    """A conversation, the line or the place in the list `where` it stands, and the names of the
    row's other fields, which nobody reads.
    """

    where: str
    messages: Conversation
    unread: tuple[str, ...] = ()


def rows_file(source: str | Path) -> Path:
    """The path of a file of rows, or of those in the package."""
    return BUNDLED.get(str(source)) or Path(source)


def read_rows(source: str | Path) -> list[Conversation]:
    """The conversations of a file, in its order.

    Raises:
        ValueError: as `numbered_rows`.
    """
    return [row.messages for row in numbered_rows(source)]


def numbered_rows(source: str | Path) -> list[Row]:
    """The same, each with the place where it stands.

    Raises:
        ValueError: the file cannot be read or holds no row; or rows are no conversations: the
            message has their number and the first of them.
    """
    path = rows_file(source)
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    text = unpacked_text(path)
    entries = _listed(text, path) if text.lstrip().startswith("[") else _lines(text)
    rows = all_or_faults(_row, entries, f"{path}: ", "are no conversations")
    if not rows:
        raise ValueError(f"{path}: there is no row")
    return rows


def all_or_faults(
    function: Callable[[X], Y], items: Iterable[X], where: str, reason: str
) -> list[Y]:
    """`function` of each item; each ValueError is the fault of its item.

    Raises:
        ValueError: there are faults: how many, and the first `SHOWN` of them, in one line.
    """
    results, faults = [], []
    for item in items:
        try:
            results.append(function(item))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        n = len(results) + len(faults)
        raise ValueError(f"{where}{len(faults):,} of {n:,} rows {reason}: {first_of(faults)}")
    return results


def first_of(faults: Sequence[str]) -> str:
    """The first faults, and how many more there are."""
    more = f"; and {len(faults) - SHOWN:,} more" if len(faults) > SHOWN else ""
    return "; ".join(faults[:SHOWN]) + more


def split_rows(rows: Sequence[X], share: float, seed: int) -> tuple[list[X], list[X]]:
    """The rows to learn from and those held out, in their order: a share of them, at least one and
    not all, drawn at random.

    Raises:
        ValueError: there is a single row.
    """
    n = len(rows)
    if n < 2:
        raise ValueError("there is 1 row, at least 2 are needed: one is held out")
    count = min(max(1, round(share * n)), n - 1)
    heldout = {*np.random.default_rng(seed).permutation(n)[:count].tolist()}
    return (
        [row for i, row in enumerate(rows) if i not in heldout],
        [row for i, row in enumerate(rows) if i in heldout],
    )


def unread(rows: Iterable[Row], path: Path) -> str | None:
    """What to say of fields that nobody reads: each with the first place where it stands."""
    first = {name: row.where for row in [*rows][::-1] for name in row.unread}
    fields = ", ".join(f"{name} ({where})" for name, where in sorted(first.items()))
    return f"{path}: fields that are not read: {fields:.300}" if fields else None


def _lines(text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}", line


def _listed(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    for number, entry in enumerate(parse(text, str(path)), 1):
        yield f"row {number}", entry


def _row(entry: tuple[str, Any]) -> Row:
    where, value = entry
    fields = parse_object(value, where) if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise ValueError(f"{where} is {short(fields)}, must be an object")
    if "messages" in fields:
        read, messages = {"messages"}, _messages(fields["messages"], where)
    else:
        read, messages = _pair(fields, where)
    return Row(where, messages, tuple(name for name in fields if name not in read))


def _messages(value: object, where: str) -> Conversation:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: messages is {short(value)}, must be a list of messages")
    messages = [_message(m, f"{where}, message {i}") for i, m in enumerate(value, 1)]
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{where} has no assistant's message")
    if (role := messages[-1]["role"]) != "assistant":
        raise ValueError(f"{where} ends with the {role}'s message, must end with the assistant's")
    if len(messages) < 2:
        raise ValueError(f"{where} has no message before the assistant's")
    return messages


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {short(value)}, must be an object of role and content")
    if other := [n for n, x in value.items() if n not in ("role", "content") and x]:
        raise ValueError(f"{where} has {short(other[0])}, only role and content are read")
    role = value.get("role")
    if role not in ROLES:
        near = nearest(role, ROLES)
        raise ValueError(f"{where}: role {short(role)} must be one of {', '.join(ROLES)}{near}")
    return {"role": role, "content": _text(value, "content", where)}


def _pair(fields: dict[str, Any], where: str) -> tuple[set[str], Conversation]:
    """The names of the fields that are read, and their conversation."""
    prompt, answer = (_named(fields, names, where) for names in (PROMPTS, ANSWERS))
    question = _text(fields, prompt, where)
    extra = next((name for name in INPUTS if fields.get(name)), None)
    if extra is not None:
        question += "\n\n" + _text(fields, extra, where)
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _text(fields, answer, where)},
    ]
    empty = {name for name in INPUTS if not fields.get(name)}
    return {prompt, answer, extra or prompt, *empty}, messages


def _named(fields: dict[str, Any], names: Sequence[str], where: str) -> str:
    """The first of the names that the row has."""
    for name in names:
        if name in fields:
            return name
    present = ", ".join(map(short, fields)) or "none"
    raise ValueError(
        f"{where} has no {names[0]} (or {', '.join(names[1:])}, or messages); it has {present:.100}"
    )


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    return checked_text(fields.get(name), f"{where}, {name}")
