"""Texts with a label, 0 negative or 1 positive, from a file:  read_labelled("mine.csv").

`.jsonl` holds one object a line, `.csv` a header; both may end in `.gz` and have empty lines.  The
fields are `text` and `label`, or `review` and `sentiment`, as in copies of IMDB (Maas et al. 2011,
"Learning Word Vectors for Sentiment Analysis").
"""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from peft_lite.json_files import parse_object

Rows = list[tuple[str, int]]

LABELS = ("negative", "positive")
TEXT, LABEL = ("text", "review"), ("label", "sentiment")  # names of the fields
VALUES = {
    **{"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1},
    **{"false": 0, "true": 1, "0.0": 0, "1.0": 1},  # as other programs write 0 and 1
}
MAX_BYTES = 2**29  # of a file, unpacked: ten times the reviews of IMDB
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz")
BUNDLED = Path(__file__).parents[1] / "assets" / "reviews"


def read_parts(source: str | Path) -> tuple[Rows, Rows]:
    """The training and the test part: files `train.*` and `test.*` of a folder, or of the package
    for "bundled".

    Raises:
        ValueError: there is no such folder, or not one file for each part, or one cannot be read.
    """
    folder = BUNDLED if source == "bundled" else Path(source)
    if not folder.is_dir():
        raise ValueError(f'no such folder of labelled texts: {source}; "bundled" is the package\'s')
    return read_labelled(_part(folder, "train")), read_labelled(_part(folder, "test"))


def read_labelled(path: str | Path) -> Rows:
    """The texts of a file with their labels, in its order.

    Raises:
        ValueError: the suffix is unknown, the file cannot be read, a row lacks a text or
            a label, or all rows have one label.
    """
    path = Path(path)
    rows = [_row(fields, f"{path}, line {line}") for line, fields in rows_of(path)]
    labels = {label for _, label in rows}
    if len(labels) < 2:
        reason = f"all {len(rows)} rows are {LABELS[labels.pop()]}" if rows else "there is no row"
        raise ValueError(f"{path}: want texts of both labels, {' and '.join(LABELS)}, but {reason}")
    return rows


def rows_of(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """The rows of a file, each with the number of its line.

    Raises:
        ValueError: the suffix is unknown, or the file cannot be read.
    """
    if not path.name.endswith(SUFFIXES):
        nearest = get_close_matches("".join(path.suffixes[-2:]), SUFFIXES, n=1, cutoff=0)[0]
        raise ValueError(
            f"{path}: the name must end in one of {', '.join(SUFFIXES)}; nearest: {nearest}"
        )
    parsed = _csv if ".csv" in path.suffixes[-2:] else _jsonl
    return parsed(unpacked_text(path), path)


def text_of(fields: dict[str, Any], where: str) -> str:
    """The text of a row.  Raises ValueError where there is none."""
    return checked_text(field(fields, TEXT, where), where)


def checked_text(text: object, where: str) -> str:
    """Raises ValueError for what is empty, no text or no Unicode."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the text must not be empty, got {text!r:.80}")
    if broken := re.search("[\0\ud800-\udfff]", text):
        raise ValueError(f"{where}: {broken[0]!r} in the text is no character")
    return text


def field(fields: dict[str, Any], names: tuple[str, str], where: str) -> Any:
    """The value of the first of the two fields that the row has."""
    for name in names:
        if name in fields:
            return fields[name]
    first, other = names
    found = ", ".join(fields) or "none"
    raise ValueError(f"{where} has no field {first} (or {other}); found: {found:.200}")


def balanced(rows: Rows, n: int, seed: int) -> Rows:
    """`n` of the rows, half of each label, drawn and ordered at random.

    Raises:
        ValueError: n is odd or not positive, or there are fewer than n / 2 rows of a label.
    """
    if n < 2 or n % 2:
        raise ValueError(f"n must be even and at least 2, to be half of each label; got {n}")
    random = np.random.default_rng(seed)
    chosen: list[int] = []
    for label, name in enumerate(LABELS):
        places = [i for i, row in enumerate(rows) if row[1] == label]
        if len(places) < n // 2:
            raise ValueError(f"n = {n} needs {n // 2} {name} rows, there are {len(places)}")
        chosen += random.permutation(places)[: n // 2].tolist()
    return [rows[i] for i in random.permutation(chosen)]


def _part(folder: Path, name: str) -> Path:
    files = [path for suffix in SUFFIXES if (path := folder / f"{name}{suffix}").exists()]
    if len(files) != 1:
        names = " and ".join(path.name for path in files) or "none"
        raise ValueError(
            f"{folder}: want one file {name} in one of {', '.join(SUFFIXES)}; there: {names}"
        )
    return files[0]


def unpacked_text(path: Path) -> str:
    """The text of a file, which may be packed by gzip.

    Raises:
        ValueError: it cannot be read, is too large, not UTF-8 or not a whole gzip file.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path} holds more than {MAX_BYTES:,} bytes")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def _csv(text: str, path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    before = csv.field_size_limit()  # of a cell, for the whole process: 128 KiB, unless raised
    csv.field_size_limit(max(before, len(text)))
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise csv.Error(f"a name stands twice in the header: {', '.join(header):.200}")
        for cells in filter(None, lines):
            if len(cells) != len(header):
                raise csv.Error(f"{len(cells)} cells under a header of {len(header)}")
            rows.append((lines.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num} is not CSV: {error}") from None
    finally:
        csv.field_size_limit(before)
    return rows


def _row(fields: dict[str, Any], where: str) -> tuple[str, int]:
    text, label = text_of(fields, where), field(fields, LABEL, where)
    if label is None or str(label).strip() in ("", "-1"):
        raise ValueError(f"{where} has no label: got {label!r}, want one of {', '.join(VALUES)}")
    value = VALUES.get(str(label).strip().lower())
    if value is None:
        nearest = get_close_matches(str(label).lower(), VALUES, n=1, cutoff=0)[0]
        raise ValueError(
            f"{where}: label {label!r:.80} must be one of {', '.join(VALUES)}; nearest: {nearest}"
        )
    return text, value
