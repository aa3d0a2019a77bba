"""Rows of any number of classes: their texts and labels, and which of them are held out.

A file is one of minigpt/data/labelled.py.  A label is a text or a number, and
its class is how it is written: 1 and "1" are the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from minigpt.data.labelled import BUNDLED, LABEL, checked_text, field, rows_of, text_of

REVIEWS = {
    "bundled-reviews": BUNDLED / "train.jsonl.gz",
    "bundled-test-reviews": BUNDLED / "test.jsonl.gz",
}

MOST = 2048  # classes


@dataclass(frozen=True)
class Row:
    """A text and its label, "" where it has none; `where` it stands, for messages."""

    where: str
    text: str
    label: str


def rows_file(source: str) -> Path:
    """The path of a file of rows, or of the bundled reviews."""
    return REVIEWS.get(source) or Path(source)


def read_rows(source: str, labelled: bool = False) -> list[Row]:
    """The rows of a file, in its order.

    Args:
        labelled: whether each has a label; else all have one, or none has.

    Raises:
        ValueError: the file cannot be read or holds no row; a row lacks a text or its label.
    """
    path = rows_file(source)
    rows = []
    for line, fields in rows_of(path):
        where = f"{path}, line {line}"
        label = _label(fields, where) if labelled or {*LABEL} & fields.keys() else ""
        if labelled and not label:
            raise ValueError(f"{where} has no label: got {field(fields, LABEL, where)!r}")
        rows.append(Row(where, text_of(fields, where), label))
    if not rows:
        raise ValueError(f"{path}: there is no row")
    bare = [row for row in rows if not row.label]
    if 0 < len(bare) < len(rows):
        raise ValueError(f"{bare[0].where} has no label, others have: want one in all rows or none")
    return rows


def given_rows(texts: Sequence[str]) -> list[Row]:
    """Texts of a command line as rows without labels."""
    places = [f"--text, number {i}" for i in range(1, len(texts) + 1)]
    return [Row(w, checked_text(t, w), "") for w, t in zip(places, texts, strict=True)]


def class_names(rows: Sequence[Row]) -> list[str]:
    """The classes: by value where all are numbers, else by their characters.

    Raises:
        ValueError: there is only one, or more than a confusion matrix can be written of.
    """
    names = sorted({row.label for row in rows})
    if len(names) < 2:
        raise ValueError(
            f"{rows[0].where}: all {len(rows)} rows have the label {names[0]!r}, "
            "want at least two classes"
        )
    if len(names) > MOST:
        raise ValueError(
            f"{rows[0].where}: the rows have {len(names):,} different labels, want at most {MOST:,}"
        )
    try:
        return sorted(names, key=float)
    except ValueError:
        return names


def class_numbers(rows: Sequence[Row], names: Sequence[str]) -> list[int]:
    """The place of each row's label among the names of the classes.

    Raises:
        ValueError: a label is none of them.
    """
    numbers = {name: i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in numbers:
            nearest = get_close_matches(row.label, names, n=1, cutoff=0)[0]
            raise ValueError(
                f"{row.where}: label {row.label!r:.80} must be one of {', '.join(names):.200}; "
                f"nearest: {nearest}"
            )
    return [numbers[row.label] for row in rows]


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows to learn from and those held out, in their order: of each class a share, at least
    one and not all, drawn at random.

    Raises:
        ValueError: a class has a single row.
    """
    random = np.random.default_rng(seed)
    of_class: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        of_class.setdefault(row.label, []).append(i)
    heldout: set[int] = set()
    for label, places in of_class.items():
        if len(places) < 2:
            raise ValueError(
                f"{rows[places[0]].where}: no other row has the label {label!r}, want at least "
                "two: one to learn from and one held out"
            )
        n = min(max(1, round(share * len(places))), len(places) - 1)
        heldout.update(random.permutation(places)[:n].tolist())
    return (
        [row for i, row in enumerate(rows) if i not in heldout],
        [row for i, row in enumerate(rows) if i in heldout],
    )


def _label(fields: dict[str, Any], where: str) -> str:
    value = field(fields, LABEL, where)
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ValueError(f"{where}: label {value!r:.80} must be a text or a number")
    label = normalize("NFC", value if isinstance(value, str) else json.dumps(value)).strip()
    if not label.isprintable():
        raise ValueError(f"{where}: label {label!r:.80} must be printable, in one line")
    return label
